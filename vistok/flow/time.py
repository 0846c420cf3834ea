"""Densities of training times (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def mode_time(uniform: Float[Tensor, " B"], scale: float) -> Float[Tensor, " B"]:
    """Mode sampling with heavy tails: ``1 - u - scale * (cos^2(pi u / 2) - 1 + u)``; scale 0 is uniform.

    At scale 0 the draw itself is returned, as the published FlexTok code does (same density).
    """
    if scale == 0:
        return uniform
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def logit_normal_time(normal: Float[Tensor, " B"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, " B"]:
    """Sigmoid of a normal draw: most mass in the middle of the path."""
    return torch.sigmoid(mean + std * normal)


def fat_logit_normal_time(
    normal: Float[Tensor, ...], uniform: Float[Tensor, ...], choice: Float[Tensor, ...], share: float = 0.1
) -> Float[Tensor, ...]:
    """Logit-normal times of which a ``share`` is uniform instead, so that no time is left out (FlowMo, UniFlow).

    Args:
        normal: standard normal draws.
        uniform: draws in [0, 1), the times of that share.
        choice: draws in [0, 1) that say which.
        share: of uniform times.
    """
    return torch.where(choice < share, uniform, logit_normal_time(normal))
