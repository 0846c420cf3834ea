"""Distillation of a frozen vision model's features.

Of one map of features: BEiT v2 (Peng et al. 2022, equation 2) and TokenFlow (Qu et al. 2024, section 3.2). Of all
layers, so that an encoder can learn to serve pixels and stay itself: UniFlow's layer-wise adaptive self-distillation
(Yue et al. 2025). Layer l of L is pulled towards the same layer of the encoder that it started as, the more the deeper
it is and the further it has strayed:

    alpha_l = 1 - mean cos(student_l, teacher_l)
    w_l     = (l / L) exp(beta alpha_l) / sum_k (k / L) exp(beta alpha_k)
    loss    = sum_l w_l alpha_l

Ours there, where no source states it: the weights are not differentiated, alpha is the mean over the batch, class and
register tokens play no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.errors import UserError


def distillation_loss(decoded: Float[Tensor, "B N C"], target: Float[Tensor, "B N C"]) -> Float[Tensor, ""]:
    """One minus the mean cosine of the vectors at each position, in [0, 2] and float32."""
    return 1 - F.cosine_similarity(decoded.float(), target.float(), dim=-1).mean()


def layer_distances(
    student: Sequence[Float[Tensor, "B N C"]], teacher: Sequence[Float[Tensor, "B N C"]]
) -> Float[Tensor, " L"]:
    """:func:`distillation_loss` of each layer, the alphas above.

    Raises:
        UserError: if one has more layers than the other.
    """
    if len(student) != len(teacher):
        raise UserError(f"layer-wise distillation: the student has {len(student)} layers, the teacher {len(teacher)}")
    return torch.stack([distillation_loss(ours, theirs) for ours, theirs in zip(student, teacher)])


def layer_weights(distances: Float[Tensor, " L"], beta: float) -> Float[Tensor, " L"]:
    """Share of each layer in the loss, the w above; they add up to 1 and carry no gradient."""
    distances = distances.detach()
    weights = torch.arange(1, len(distances) + 1, device=distances.device) * torch.exp(beta * distances)
    return weights / weights.sum()
