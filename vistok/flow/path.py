"""The straight path of rectified flow (Liu et al. 2022): time 0 is data, time 1 is noise."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, time: Float[Tensor, " B"]) -> Tensor:
    """``time * noise + (1 - time) * data``, one time for each sample."""
    time = time.view(-1, *[1] * (data.ndim - 1))
    return time * noise + (1 - time) * data


def target_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Derivative of :func:`interpolate` with respect to time: ``noise - data``."""
    return noise - data
