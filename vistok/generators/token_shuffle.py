"""Token-Shuffle: the codes of a window of the grid share one position of the backbone.

Ma et al., "Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models", 2025 (arXiv
2504.17789).

    s x s codes -> embeddings, each compressed to D / s^2 channels -> side by side (D) -> MLP blocks -> backbone
    backbone -> MLP blocks (D) -> s^2 parts of D / s^2 channels, each expanded to D -> s^2 predictions

The backbone sees s^2 times fewer positions, and sampling takes s^2 times fewer steps. The codes of a window are drawn
from one hidden state: given the past they are independent of each other, which is what a larger s costs.

No code was released. Ours: windows in raster order, as are the codes inside; linear compression and expansion; blocks
``x + mlp(norm(x))`` of two layers as wide as the backbone; a norm in front of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.generators.sampling import Picker
from vistok.nn.rope import coordinates
from vistok.nn.transformer import MLP, matrix_flops
from vistok.tokens import Grid2D, TokenSpec

_norm = partial(nn.RMSNorm, eps=1e-5)


@dataclass
class Config:
    """Sizes of the windows.

    Args:
        window: side s of a window; 1 gives every code its own position.
        blocks: MLP blocks before the backbone, and as many behind it.
    """

    window: int = 1
    blocks: int = 2


class ResidualMLP(nn.Module):
    """``x + mlp(norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.mlp = MLP(width, width)

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        return x + self.mlp(self.norm(x))


class TokenShuffle(nn.Module):
    """The adapter for windows of a grid; see the module docstring.

    Args:
        spec: one code at each position of a grid.
        width: channels D of the backbone.
        config: see :class:`Config`.

    Raises:
        UserError: as :meth:`check`, or if the sizes do not fit each other.
    """

    order: Tensor

    def __init__(self, spec: TokenSpec, width: int, config: Config) -> None:
        super().__init__()
        grid = self.check(spec, config.window)
        self.codes_per_position = config.window**2
        if width % self.codes_per_position:
            raise UserError(
                f"token_shuffle: width {width} must be a multiple of the {self.codes_per_position} codes of a window"
            )
        windows = Grid2D(grid.height // config.window, grid.width // config.window)
        self.num_positions = windows.num_positions
        self.coordinates = coordinates(windows)
        self.register_buffer("order", window_order(grid, config.window), persistent=False)
        part = width // self.codes_per_position
        self.embedding = nn.Embedding(spec.vocab_sizes[0], width)
        self.compress = nn.Linear(width, part)
        self.fuse = nn.Sequential(*(ResidualMLP(width) for _ in range(config.blocks)))
        self.untangle = nn.Sequential(*(ResidualMLP(width) for _ in range(config.blocks)))
        self.expand = nn.Linear(part, width)
        self.norm = _norm(width)
        self.head = nn.Linear(width, spec.vocab_sizes[0], bias=False)

    @classmethod
    def check(cls, spec: TokenSpec, window: int) -> Grid2D:
        """The grid of ``spec``.

        Raises:
            UserError: unless it has one, of single codes, that windows of this side divide.
        """
        grid = spec.layout
        if not isinstance(grid, Grid2D):
            raise UserError(
                f"token_shuffle fuses neighbours on a grid, and {type(grid).__name__} has none: set shuffle.window=1"
            )
        if spec.num_slots != 1:
            raise UserError(
                f"token_shuffle fuses single codes, and these tokens have {spec.num_slots} slots: set shuffle.window=1"
            )
        if window < 1 or grid.height % window or grid.width % window:
            raise UserError(f"token_shuffle: windows of side {window} do not divide {grid.height} x {grid.width} codes")
        return grid

    def reset_parameters(self) -> None:
        """A zero head: the first loss is exactly the log of the vocabulary."""
        nn.init.zeros_(self.head.weight)

    @property
    def train_flops(self) -> int:
        """Of a sample, see :attr:`Generator.train_flops`."""
        codes = matrix_flops(self.codes_per_position * self.num_positions, self.compress, self.expand, self.head)
        return codes + matrix_flops(self.num_positions, self.fuse, self.untangle)

    def arrange(self, ids: Int[Tensor, "B N 1"]) -> Int[Tensor, "B N 1"]:
        """Codes in raster order -> window after window."""
        return ids[:, self.order]

    def restore(self, ids: Int[Tensor, "B N 1"]) -> Int[Tensor, "B N 1"]:
        """Inverse of :meth:`arrange`."""
        return ids[:, self.order.argsort()]

    def embed(self, ids: Int[Tensor, "B k 1"]) -> Float[Tensor, "B n D"]:
        """Inputs of the backbone, one for the codes of each window."""
        parts = self.compress(self.embedding(ids[:, :, 0]))
        return self.fuse(parts.unflatten(1, (-1, self.codes_per_position)).flatten(2))

    def logits(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B k 1"]) -> Float[Tensor, "B k V"]:
        """Predictions of ``ids`` from the backbone's outputs (alone: a window does not see itself)."""
        parts = self.untangle(hidden).unflatten(2, (self.codes_per_position, -1)).flatten(1, 2)
        return self.head(self.norm(self.expand(parts)))

    def sample(self, hidden: Float[Tensor, "B2 D"], uniform: Float[Tensor, "B k 1"], pick: Picker) -> Tensor:
        """Codes ``(B, codes_per_position, 1)`` of one window."""
        logits = self.logits(hidden[:, None], uniform)
        codes = pick(logits.flatten(0, 1), uniform.flatten())
        return codes.view(uniform.shape)


def window_order(grid: Grid2D, window: int) -> Int[Tensor, " N"]:
    """Raster numbers of the codes, window after window in raster order, and in raster order inside each."""
    numbers = torch.arange(grid.num_positions).view(grid.height // window, window, grid.width // window, window)
    return numbers.transpose(1, 2).flatten()
