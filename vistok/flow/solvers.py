"""Integrating a velocity from noise (time 1) to data (time 0)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def euler(
    velocity: Callable[[Tensor, Float[Tensor, " B"]], Tensor],
    noise: Tensor,
    steps: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """``steps`` Euler steps of equal length; the state stays float32 whatever the velocity is computed in.

    Args:
        velocity: ``(state, time) -> d state / d time``.
        noise: state at time 1.
        steps: at least 1.
        progress: called with 1 after each step.
    """
    state = noise.float()
    for step in range(steps, 0, -1):
        time = torch.full((state.shape[0],), step / steps, device=state.device)
        state = state - velocity(state, time).float() / steps
        if progress is not None:
            progress(1)
    return state
