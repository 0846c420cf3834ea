"""The convolutional autoencoder of VQGAN (Esser et al., "Taming Transformers", CVPR 2021, arXiv 2012.09841, table 7).

    image --conv_in--> levels, each half the side of the one before --middle--> --conv_out--> map (B, z, h, w)

The same network stands in LlamaGen, VAR and TokenFlow. Attention works at the deepest level only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut around them.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        groups: of the normalisations.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """Every position of a map looks at all of them, with one head.

    Args:
        channels: channels in and out.
        groups: of the normalisation.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y[:, 0].mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Conv2d):
    """Half the side, by a convolution that reads one row below and one column right of the map, both zero."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h/2 w/2"]:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: the nearest value, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C 2*h 2*w"]:
        return super().forward(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        blocks: residual blocks.
        groups: of every normalisation.
        attention: after each block.
        resample: makes the step of a map of ``out_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        attention: bool,
        resample: type[Downsample | Upsample] | None,
    ) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * blocks
        self.res = nn.ModuleList(ResBlock(*pair, groups) for pair in pairwise(channels))
        self.attention = nn.ModuleList(SpatialAttention(out_channels, groups) for _ in range(blocks * attention))
        self.resample = resample(out_channels) if resample else nn.Identity()

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D H W"]:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attention:
                x = self.attention[index](x)
        return self.resample(x)


class CNNEncoder(nn.Module):
    """Images to a map whose side is ``2 ** (len(multipliers) - 1)`` times smaller.

    Args:
        in_channels: of the images.
        out_channels: of the map.
        width: channels of the first convolution.
        multipliers: channels of each level, in units of ``width``.
        blocks: residual blocks of a level.
        groups: of every normalisation; divides the channels of every level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        *,
        groups: int = 32,
    ) -> None:
        super().__init__()
        channels = [width, *(width * multiplier for multiplier in multipliers)]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.levels = _levels(channels, blocks, groups, Downsample, deepest=len(multipliers) - 1)
        self.middle = _middle(channels[-1], groups)
        self.norm_out = _norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Z h w"]:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class CNNDecoder(nn.Module):
    """A map to images whose side is ``2 ** (len(multipliers) - 1)`` times larger; unbounded values.

    Args:
        in_channels: of the map.
        out_channels: of the images.
        width: the unit of ``multipliers``.
        multipliers: channels of each level, beginning at the images, as those of the encoder.
        blocks: residual blocks of a level.
        groups: as those of the encoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 3,
        *,
        groups: int = 32,
    ) -> None:
        super().__init__()
        channels = [width * multiplier for multiplier in (multipliers[-1], *reversed(multipliers))]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.middle = _middle(channels[0], groups)
        self.levels = _levels(channels, blocks, groups, Upsample, deepest=0)
        self.norm_out = _norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B C H W"]:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _levels(
    channels: list[int], blocks: int, groups: int, resample: type[Downsample | Upsample], deepest: int
) -> nn.ModuleList:
    """Levels of the given channels in the order of their work; all but the last resample."""
    last = len(channels) - 2
    return nn.ModuleList(
        Level(*pair, blocks, groups, index == deepest, resample if index < last else None)
        for index, pair in enumerate(pairwise(channels))
    )


def _middle(channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, groups), SpatialAttention(channels, groups), ResBlock(channels, channels, groups)
    )


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)
