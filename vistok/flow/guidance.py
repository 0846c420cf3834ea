"""Guidance: one convention for every sampler, ``u + scale * (c - u)``."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): 1 is the conditional prediction, 0 the unconditional one."""
    return unconditional + scale * (conditional - unconditional)


def guide_projected(
    conditional: Float[Tensor, B * shape],
    unconditional: Float[Tensor, B * shape],
    scale: float,
    running: Float[Tensor, B * shape] | None = None,
    momentum: float = -0.5,
    eta: float = 0.0,
    threshold: float = 2.5,
) -> tuple[Float[Tensor, B * shape], Float[Tensor, B * shape]]:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): strong guidance without oversaturation.

    The difference of the branches gets a (negative) momentum over the steps, a bound on its norm, and loses the part
    that is parallel to the conditional prediction, which only makes it longer. The defaults are the constants of the
    published FlexTok sampler, which applies it to velocities.

    Args:
        conditional: prediction under the condition.
        unconditional: prediction without.
        scale: guidance scale; 1 returns ``conditional``.
        running: what the previous step returned; None at the first.
        momentum: share of ``running`` added to the difference.
        eta: share of the parallel part that is kept.
        threshold: largest norm of the difference of a sample; 0 sets no bound.

    Returns:
        The guided prediction, and the running difference for the next step.
    """
    running = conditional - unconditional + (0 if running is None else momentum * running)
    difference = running.flatten(1)
    if threshold > 0:
        norm = difference.norm(dim=1, keepdim=True)
        difference = difference * (threshold / norm).clamp(max=1)
    # Double precision: the parallel part of two nearly orthogonal vectors is a small difference of large products.
    direction = F.normalize(conditional.flatten(1).double(), dim=1)
    parallel = (difference.double() * direction).sum(dim=1, keepdim=True) * direction
    step = (difference.double() - (1 - eta) * parallel).to(conditional.dtype)
    return conditional + (scale - 1) * step.view_as(conditional), running
