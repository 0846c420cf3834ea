"""Rotary position embedding for any number of position axes (RoFormer, Su et al. 2021; 2D form as in LlamaGen)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.tokens import Grid2D, Layout

Rotation = tuple[Float[Tensor, "N half"], Float[Tensor, "N half"]]
"""Cosines and sines, one row for each position, one column for each pair of neighbouring channels.

Where samples have positions of their own, both are ``(B, N, half)``.
"""


def coordinates(layout: Layout) -> Float[Tensor, "N axes"]:
    """Positions of a layout: the cell on a grid; in a sequence code n is at n + 1, behind what conditions it at 0."""
    if isinstance(layout, Grid2D):
        rows, columns = torch.meshgrid(torch.arange(layout.height), torch.arange(layout.width), indexing="ij")
        return torch.stack([rows, columns], dim=-1).flatten(0, 1).float()
    return torch.arange(1, layout.num_positions + 1)[:, None].float()


def rotation(positions: Float[Tensor, "N axes"], head_dim: int, base: float = 10000.0) -> Rotation:
    """Angles of ``positions``: the channel pairs are shared out evenly among the axes, first axis first.

    Pair k of an axis turns by ``position * base^(-k / pairs_per_axis)``.

    Args:
        positions: coordinates, one column for each axis (1 for sequences, 2 for grids: row, column).
        head_dim: channels of a head; ``head_dim / 2`` must be a multiple of the number of axes.
        base: wavelength base.
    """
    axes = positions.shape[1]
    pairs = head_dim // 2 // axes
    if pairs * axes * 2 != head_dim:
        raise ValueError(f"head_dim {head_dim} cannot be split over {axes} rotary axes")
    frequencies = base ** -(torch.arange(pairs, dtype=torch.float32, device=positions.device) / pairs)
    angles = (positions.float()[:, :, None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B heads N head_dim"], table: Rotation) -> Float[Tensor, "B heads N head_dim"]:
    """Turn the channel pairs (2i, 2i + 1) of every position by its angle, in float32."""
    cos, sin = (part.unsqueeze(-3) for part in table)  # alike for all heads
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
