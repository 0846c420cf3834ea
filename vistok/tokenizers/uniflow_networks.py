"""The decoder of UniFlow: a tower that makes a condition of each patch, and the flow of its pixels."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.nn.modulation import AdaLN, TimestepEmbedding, modulate
from vistok.nn.patch import sincos_2d
from vistok.nn.transformer import MLP, Block


class ConditionTower(nn.Module):
    """Latents -> the condition of each patch; its global blocks let patches agree, without them a grid of seams shows.

    Two learned tables of positions, one before and one behind the blocks, start from the same sinusoids.

    Args:
        latent_channels: C.
        width: channels D.
        grid: rows and columns of patches.
        depth: global blocks.
        heads: their attention heads.

    Attributes:
        num_patches: positions of a latent.
        num_suffix_tokens: 0, no tokens but these.
        reads_grid: True: where tokens merge (see :mod:`vistok.merging`) there is one for each patch again at the end.
    """

    num_suffix_tokens = 0
    reads_grid = True

    def __init__(self, latent_channels: int, width: int, grid: tuple[int, int], depth: int, heads: int) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.up = MLP(latent_channels, width, out=width)
        # The sinusoids of MAE as its code has them: columns in the first half of the channels.
        table = sincos_2d(grid[1], grid[0], width).transpose(0, 1)
        self.positions_before, self.positions_behind = (nn.Parameter(table.clone()) for _ in range(2))
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, norm, mlp=MLP, bias=True) for _ in range(depth))

    def forward(self, latents: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        x = self.up(latents) + self.positions_before.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x + self.positions_behind.flatten(0, 1)


class FlowBlock(nn.Module):
    """``x + gate * mlp(norm(x) * (1 + scale) + shift)``, on one patch at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = AdaLN(width, width, 3)

    def forward(self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        shift, scale, gate = self.modulation(condition)
        return torch.addcmul(x, gate, self.mlp(modulate(self.norm(x), shift, scale)))


class PatchFlow(nn.Module):
    """Velocity of the pixels of each patch, given its condition alone: patches do not see each other.

    Time runs as in the released weights, from noise (0) to data (1), and the velocity is ``data - noise``. (The MLP is
    that of MAR's diffusion head, Li et al. 2024.)

    Args:
        values: of a patch.
        condition_dim: channels of a condition.
        width: channels of the MLP.
        depth: residual blocks.
    """

    def __init__(self, values: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.patch_in = nn.Linear(values, width)
        self.condition_in = nn.Linear(condition_dim, width)
        self.time = TimestepEmbedding(width, base=10000.0)
        self.blocks = nn.ModuleList(FlowBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = AdaLN(width, width, 2)
        self.head = nn.Linear(width, values)

    def forward(
        self, x: Float[Tensor, "B N V"], time: Float[Tensor, "B n"], condition: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B N V"]:
        """Velocity at ``time``, one for each patch (n = N) or for all of an image (n = 1)."""
        y = self.time(time.flatten()).unflatten(0, time.shape) + self.condition_in(condition)
        x = self.patch_in(x.to(self.patch_in.weight.dtype))
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.modulation(y)
        return self.head(modulate(self.norm(x), shift, scale))
