"""Finite scalar quantization (Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class FSQ(nn.Module):
    """Rounds each channel to a few levels; the code of a vector is the mixed-radix number of its levels.

    There are no parameters and nothing is stored. All arithmetic is float32: in bfloat16 nearly every index of a
    64,000-entry code comes back wrong.

    Args:
        levels: number of levels of each channel; the first channel is the fastest digit of the index.
    """

    _count: Tensor
    _half: Tensor
    _offset: Tensor
    _shift: Tensor
    _basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least two levels in every channel, got {list(levels)}")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        count = torch.tensor(levels)
        half = (count - 1) * 1.001 / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        basis = torch.cat([torch.ones(1, dtype=torch.int64), count.cumprod(0)[:-1]])
        for name, value in (
            ("_count", count),
            ("_half", half),
            ("_offset", offset),
            ("_shift", torch.atanh(offset / half)),
            ("_basis", basis),
        ):
            self.register_buffer(name, value, persistent=False)

    @property
    def dim(self) -> int:
        """Channels of a code."""
        return len(self.levels)

    def bound(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Squash into the interval whose rounding gives exactly the levels of each channel."""
        return torch.tanh(z.float() + self._shift) * self._half - self._offset

    def forward(self, z: Float[Tensor, "... C"]) -> tuple[Float[Tensor, "... C"], Int[Tensor, ...]]:
        """Codes in [-1, 1] with straight-through gradients, and their int64 indices."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        half_width = self._count // 2
        ids = ((rounded.detach().round().long() + half_width) * self._basis).sum(-1)
        return rounded / half_width, ids

    def decode(self, ids: Int[Tensor, ...]) -> Float[Tensor, "... C"]:
        """Codes of ``ids`` in ``[0, codebook_size)``; inverse of the indices of :meth:`forward`."""
        half_width = self._count // 2
        digits = ids[..., None] // self._basis % self._count
        return (digits - half_width).float() / half_width
