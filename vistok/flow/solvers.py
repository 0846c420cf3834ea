"""Integrating a velocity from noise (time 1) to data (time 0)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def euler(
    velocity: Callable[[Tensor, Float[Tensor, " B"]], Tensor],
    noise: Tensor,
    steps: int,
    progress: Callable[[int], None] | None = None,
    power: float = 1.0,
) -> Tensor:
    """``steps`` Euler steps; the state stays float32 whatever the velocity is computed in.

    Args:
        velocity: ``(state, time) -> d state / d time``.
        noise: state at time 1.
        steps: at least 1.
        progress: called with 1 after each step.
        power: of the schedule: step k of S, counted down, begins at time ``(k / S) ** (1 / power)``. 1 makes all steps
            equal, less than 1 long ones near the noise and short ones near the data.
    """
    state = noise.float()
    times = [(step / steps) ** (1 / power) for step in range(steps, -1, -1)]
    for now, after in pairwise(times):
        time = torch.full((state.shape[0],), now, device=state.device)
        state = state + (after - now) * velocity(state, time).float()
        if progress is not None:
            progress(1)
    return state
