"""Images as sequences of patches, and their fixed positions."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def patchify(x: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B N D"]:
    """Non-overlapping ``size x size`` patches in raster order, each flattened as (row, column, channel)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def unpatchify(x: Float[Tensor, "B N D"], size: int, height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Inverse of :func:`patchify` for a grid of ``height x width`` patches."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=size, q=size)


def sincos_2d(height: int, width: int, dim: int) -> Float[Tensor, "height width dim"]:
    """Fixed 2D positions (MAE, He et al. 2022): the first half of the channels encodes the row, the second the column.

    Each half is ``[sin, cos]`` of the integer coordinate at frequencies ``10000^(-i / (dim / 4))``.
    """
    quarter = dim // 4
    if quarter * 4 != dim:
        raise ValueError(f"2D sin-cos positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(count: int) -> Tensor:
        angles = torch.arange(count)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()

    rows = axis(height)[:, None].expand(height, width, dim // 2)
    columns = axis(width)[None].expand(height, width, dim // 2)
    return torch.cat([rows, columns], dim=-1)
