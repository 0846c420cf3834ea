"""Tokens: what a generator models and a tokenizer decodes.

Two independent axes describe any discrete image code:

* the **layout** says where the positions are: on a grid, in an ordered sequence whose every prefix means something,
  or on a pyramid of scales;
* the **slots** say how many codes stand at one position: a tuple of vocabulary sizes.

Letters used throughout the package: B batch, N positions, S slots, C latent channels, D width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from vistok.errors import UserError


@dataclass(frozen=True)
class Grid2D:
    """Positions on a ``height x width`` grid, in raster order."""

    height: int
    width: int

    @property
    def num_positions(self) -> int:
        return self.height * self.width

    @property
    def prefixes(self) -> Sequence[int]:
        """Numbers of first positions that are a legal code: all or nothing."""
        return (self.num_positions,)


@dataclass(frozen=True)
class Ordered1D:
    """``length`` positions, coarse information first: any prefix of at least one position is a legal code."""

    length: int

    @property
    def num_positions(self) -> int:
        return self.length

    @property
    def prefixes(self) -> Sequence[int]:
        """Numbers of first positions that are a legal code."""
        return range(1, self.length + 1)


@dataclass(frozen=True)
class MultiScale:
    """A pyramid of ``(height, width)`` grids, coarse first, each in raster order: the first scales alone are a code."""

    sizes: tuple[tuple[int, int], ...]

    @property
    def num_positions(self) -> int:
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each scale."""
        return tuple(height * width for height, width in self.sizes)

    @property
    def prefixes(self) -> Sequence[int]:
        """Numbers of first positions that are a legal code: those of whole scales."""
        return tuple(accumulate(self.lengths))

    def split_scales(self, ids: Int[Tensor, "B N S"]) -> list[Int[Tensor, "B n S"]]:
        """The positions of each scale, coarse first."""
        return list(ids.split(self.lengths, dim=1))


Layout = Grid2D | Ordered1D | MultiScale
_LAYOUTS: dict[str, type] = {"grid_2d": Grid2D, "ordered_1d": Ordered1D, "multi_scale": MultiScale}


@dataclass(frozen=True)
class TokenSpec:
    """What a tokenizer emits.

    Args:
        layout: where the positions are.
        vocab_sizes: one vocabulary size per slot; empty for a continuous tokenizer.
        latent_dim: channels of one position of ``embed(tokens)``.
        image_size_px: side of the square images that the tokenizer reads and writes.
    """

    layout: Layout
    vocab_sizes: tuple[int, ...]
    latent_dim: int
    image_size_px: int

    @property
    def num_positions(self) -> int:
        return self.layout.num_positions

    @property
    def num_slots(self) -> int:
        return len(self.vocab_sizes)

    def to_dict(self) -> dict:
        """A JSON-friendly form; :meth:`from_dict` is its inverse."""
        kind = next(name for name, cls in _LAYOUTS.items() if isinstance(self.layout, cls))
        return {
            "layout": {"kind": kind, **asdict(self.layout)},
            "vocab_sizes": list(self.vocab_sizes),
            "latent_dim": self.latent_dim,
            "image_size_px": self.image_size_px,
        }

    @classmethod
    def from_dict(cls, data: dict) -> TokenSpec:
        fields = dict(data["layout"])
        layout = _LAYOUTS[fields.pop("kind")]
        if "sizes" in fields:
            fields["sizes"] = tuple(tuple(size) for size in fields["sizes"])
        return cls(layout(**fields), tuple(data["vocab_sizes"]), data["latent_dim"], data["image_size_px"])


@dataclass(frozen=True)
class Tokens:
    """Integer codes of a batch of images.

    Args:
        ids: int64 ``(B, N, S)``; entry ``[b, n, s]`` lies in ``[0, spec.vocab_sizes[s])``. N is one of
            ``spec.layout.prefixes``.
        spec: the tokenizer's specification.

    Raises:
        UserError: if rank, type, number of positions or slots, or a value does not fit ``spec``.
    """

    ids: Int[Tensor, "B N S"]
    spec: TokenSpec

    def __post_init__(self) -> None:
        ids, spec = self.ids, self.spec
        if ids.dtype != torch.int64 or ids.ndim != 3:
            raise UserError(f"token ids must be int64 (B, N, S), got {ids.dtype} {tuple(ids.shape)}")
        batch, positions, slots = ids.shape
        if positions not in spec.layout.prefixes or slots != spec.num_slots:
            raise UserError(
                f"token ids of shape {(batch, positions, slots)} do not fit {spec.layout} with {spec.num_slots} slot(s)"
            )
        # Reading values back would break a compiled graph.
        if batch and not ids.is_meta and not torch.compiler.is_compiling():
            sizes = torch.tensor(spec.vocab_sizes, device=ids.device)
            if bool(((ids < 0) | (ids >= sizes)).any()):
                raise UserError(
                    f"token ids span [{int(ids.min())}, {int(ids.max())}], outside the vocabulary {spec.vocab_sizes}"
                )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def prefix(self, num_tokens: int) -> Tokens:
        """The first ``num_tokens`` positions of an ordered code, or of whole scales; all of them of any code.

        Raises:
            UserError: if the layout has no such prefix, or this code has fewer positions.
        """
        legal = [length for length in self.spec.layout.prefixes if length <= self.ids.shape[1]]
        if num_tokens not in legal:
            raise UserError(f"cannot keep {num_tokens} tokens: {refusal(num_tokens, self.spec.layout, legal)}")
        return Tokens(self.ids[:, :num_tokens], self.spec)


def refusal(wanted: int, layout: Layout, legal: Sequence[int]) -> str:
    """Why ``wanted`` positions of a layout are not among the ``legal`` numbers."""
    if isinstance(layout, Ordered1D):
        return f"{wanted} is outside 1..{legal[-1]}"
    if isinstance(layout, MultiScale):
        return f"{wanted} is no prefix of whole scales ({', '.join(map(str, legal))})"
    return f"only an ordered layout has meaningful prefixes, not {layout}"
