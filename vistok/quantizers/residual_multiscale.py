"""Multi-scale residual quantization: every scale quantizes what the coarser ones have left over.

Tian et al., "Visual Autoregressive Modeling", 2024 (arXiv 2404.02905, algorithms 1 and 2), and with normalised codes
Qu et al., "TokenFlow", 2024 (arXiv 2412.03069, section 3.1). :data:`Mode` says what differs between the two.

Codes of all scales form one sequence, coarse scales first, each in raster order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.nn.precision import exact
from vistok.quantizers.vq import Codebook, Quantized
from vistok.tokens import MultiScale, refusal

Mode = Literal["cascade", "residual"]
"""``cascade`` (TokenFlow): each scale is straight-through and has the codebook's losses, on the (normalised) residual;
a generator reads, for the next scale, the running sum resized from scale to scale. ``residual`` (VAR): the sum of all
scales is straight-through as a whole, and the losses compare each running sum with the map; a generator reads the
running sum of the full grid, averaged down to the next scale."""


def scale_sizes(sides: Sequence[int], grid: int) -> tuple[tuple[int, int], ...]:
    """Sizes of square scales with these sides.

    Raises:
        UserError: unless the sides grow and end at ``grid``, the side of the map that is quantized.
    """
    if not sides or list(sides) != sorted(set(sides)) or sides[0] < 1 or sides[-1] != grid:
        raise UserError(f"scales must grow and end at the grid of {grid} x {grid} positions, got {list(sides)}")
    return tuple((side, side) for side in sides)


class _Scales(nn.Module, ABC):
    """What code vectors of several scales add up to, and what a generator reads of them.

    Args:
        dim: channels of a code.
        sizes: ``(height, width)`` of each scale, coarse first; the last is the grid.
        phi: number of 3 x 3 convolutions that refine an upsampled scale, shared by neighbouring scales; 0 for none.
        mode: see :data:`Mode`.
        phi_ratio: share of the convolution in what it refines.
    """

    def __init__(
        self, dim: int, sizes: Sequence[tuple[int, int]], phi: int = 0, mode: Mode = "cascade", phi_ratio: float = 0.5
    ) -> None:
        super().__init__()
        self.layout = MultiScale(tuple((height, width) for height, width in sizes))
        self.mode, self.phi_ratio = mode, phi_ratio
        self.phi = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(phi))
        self._phi_of_scale = [_nearest_tick(scale, len(sizes), phi) for scale in range(len(sizes))] if phi else []

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each scale, coarse first."""
        return self.layout.sizes

    @abstractmethod
    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        """Code vectors."""

    def decode(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B C H W"]:
        """The map that the codes of the first scales add up to.

        Args:
            ids: of all scales or any whole-scale prefix.

        Raises:
            UserError: if the ids end inside a scale.
        """
        return self.add_up(self.embed(ids))

    def add_up(self, codes: Float[Tensor, "B n C"]) -> Float[Tensor, "B C H W"]:
        """:meth:`decode` of code vectors."""
        with exact(codes.device):
            steps = [self._spread(part, scale) for scale, part in enumerate(self._maps(codes))]
        return torch.stack(steps).sum(dim=0)

    def inputs(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B m C"]:
        """What a generator reads to predict the second and later scales, one vector for each of their positions.

        Args:
            ids: of all scales, or of the first ones: then the last inputs are those of the scale that comes next.

        Raises:
            UserError: if the ids end inside a scale.
        """
        with exact(ids.device):
            states = zip(self.sizes[1:], self._states(ids))
            parts = [_rows(self._resized(state, size)) for size, state in states]
            return torch.cat([self.embed(ids[:, :0]), *parts], dim=1)

    def refined_inputs(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B m C"]:
        """What a generator reads to predict the last of the given scales once more, its present codes included."""
        with exact(ids.device):
            *_, state = self._states(ids)
            return _rows(self._resized(state, self.sizes[self._num_scales(ids.shape[1]) - 1]))

    def _states(self, ids: Int[Tensor, "B n"]) -> Iterator[Float[Tensor, "B C h w"]]:
        """Running sums after each of the given scales, on its own grid (``cascade``) or the full one."""
        state: Tensor | None = None
        for scale, codes in enumerate(self._maps(self.embed(ids))):
            step = codes if self.mode == "cascade" else self._spread(codes, scale)
            state = step if state is None else _bicubic(state, step.shape[-2:]) + step
            yield state

    def _resized(self, state: Float[Tensor, "B C h w"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        return _bicubic(state, size) if self.mode == "cascade" else F.adaptive_avg_pool2d(state, size)

    def _spread(self, codes: Float[Tensor, "B C h w"], scale: int) -> Float[Tensor, "B C H W"]:
        """What one scale adds to the full grid."""
        full = _bicubic(codes, self.sizes[-1])
        return full.lerp(self.phi[self._phi_of_scale[scale]](full), self.phi_ratio) if len(self.phi) else full

    def _maps(self, codes: Float[Tensor, "B n C"]) -> list[Float[Tensor, "B C h w"]]:
        scales = self._num_scales(codes.shape[1])
        parts = codes.split(self.layout.lengths[:scales], dim=1)
        return [_map(part, size) for part, size in zip(parts, self.sizes)]

    def _num_scales(self, length: int) -> int:
        if length not in self.layout.prefixes:
            raise UserError(f"cannot add up {length} codes: {refusal(length, self.layout, self.layout.prefixes)}")
        return self.layout.prefixes.index(length) + 1


class ScaleCodes(_Scales):
    """The part of a multi-scale quantizer that a next-scale generator owns a copy of: code vectors and φ, frozen.

    Args:
        vocab_size: number of codes.
        dim: channels of a code.
        sizes: as :class:`ResidualMultiscale`, like everything else.
        phi: number of convolutions.
        mode: see :data:`Mode`.
        phi_ratio: share of the convolution.
    """

    codes: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        sizes: Sequence[tuple[int, int]],
        phi: int = 0,
        mode: Mode = "cascade",
        phi_ratio: float = 0.5,
    ) -> None:
        super().__init__(dim, sizes, phi, mode, phi_ratio)
        self.register_buffer("codes", torch.zeros(vocab_size, dim))
        self.requires_grad_(False)

    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        return F.embedding(ids, self.codes).float()


class ResidualMultiscale(_Scales):
    """A codebook that all scales of a map share. All arithmetic is float32 under any autocast.

    Args:
        codebook: a :class:`~vistok.quantizers.vq.Codebook` or
            :class:`~vistok.quantizers.shared_dual_vq.SharedDualCodebook`.
        sizes: ``(height, width)`` of each scale, coarse first; the last is the grid.
        phi: number of 3 x 3 convolutions that refine an upsampled scale, shared by neighbouring scales; 0 for none.
        mode: see :data:`Mode`.
        phi_ratio: share of the convolution in what it refines.
        drop: how often a training batch goes without one of its scales (never the first).

    Raises:
        UserError: for an entropy penalty in mode ``residual``, whose losses are not those of single vectors, or a
            ``drop`` outside [0, 1].
    """

    def __init__(
        self,
        codebook: Codebook,
        sizes: Sequence[tuple[int, int]],
        phi: int = 0,
        mode: Mode = "cascade",
        phi_ratio: float = 0.5,
        drop: float = 0.0,
    ) -> None:
        super().__init__(codebook.dim, sizes, phi, mode, phi_ratio)
        if mode == "residual" and codebook.options.entropy:
            raise UserError("mode residual has no entropy penalty: set entropy to 0, or take mode cascade")
        if not 0 <= drop <= 1:
            raise UserError(f"scale_drop must lie in [0, 1], got {drop}")
        self.codebook, self.drop = codebook, drop

    def embed(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n C"]:
        return self.codebook.embed(ids)

    def scale_codes(self) -> ScaleCodes:
        """A frozen copy of what a generator needs."""
        codes = ScaleCodes(
            self.codebook.vocab_size, self.codebook.dim, self.sizes, len(self.phi), self.mode, self.phi_ratio
        )
        phi = {name: value for name, value in self.state_dict().items() if name.startswith("phi.")}
        codes.load_state_dict({"codes": self.codebook.rows().detach(), **phi})
        return codes.to(self.codebook.tables[0].device)

    @torch.no_grad()
    def encode(self, h: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Ids of all scales.

        Raises:
            UserError: if the map is not of the size of the last scale.
        """
        return self.quantize(h)[0].ids

    def forward(self, h: Float[Tensor, "B C H W"], rng: torch.Generator | None = None) -> Quantized:
        """Quantize a map; in training also drop a scale now and then, and let the codebook learn.

        Args:
            h: on the grid of the last scale.
            rng: for scale drop, k-means and revival; torch's own stream if None.

        Returns:
            codes ``(B, H*W, C)`` of the full grid in raster order; ids ``(B, N)`` of all scales. Those of a dropped
            scale are what it would have been: they count as used, but add nothing to the codes.

        Raises:
            UserError: if the map is not of the size of the last scale.
        """
        self.codebook.start(lambda: self._exact_vectors(h), rng)
        quantized, vectors = self.quantize(h, self._drawn_scale(rng))
        self.codebook.learn(vectors, quantized.ids, rng)
        return quantized

    def quantize(
        self, h: Float[Tensor, "B C H W"], dropped: int | None = None
    ) -> tuple[Quantized, Float[Tensor, "B N C"]]:
        """As :meth:`forward` without the scale ``dropped``, learning nothing; also the vectors that became codes."""
        if tuple(h.shape[-2:]) != self.sizes[-1]:
            raise UserError(f"the last scale is {self.sizes[-1]}, but the map to quantize is {tuple(h.shape[-2:])}")
        with exact(h.device):
            return (self._cascade if self.mode == "cascade" else self._residual)(h.float(), dropped)

    def _cascade(self, h: Float[Tensor, "B C H W"], dropped: int | None) -> tuple[Quantized, Float[Tensor, "B N C"]]:
        vectors: list[Tensor] = []
        scales: list[Quantized] = []

        def lookup(z: Tensor) -> Tensor:
            vectors.append(z)
            scales.append(self.codebook.quantize(z))
            return scales[-1].codes

        total = torch.stack(list(self._steps(h, lookup, dropped))).sum(dim=0)
        terms = [scale.terms for number, scale in enumerate(scales) if number != dropped]
        means = {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}
        ids = torch.cat([scale.ids for scale in scales], dim=1)
        return Quantized(_rows(total), ids, means), torch.cat(vectors, dim=1)

    def _residual(self, h: Float[Tensor, "B C H W"], dropped: int | None) -> tuple[Quantized, Float[Tensor, "B N C"]]:
        vectors: list[Tensor] = []
        ids: list[Tensor] = []

        def lookup(z: Tensor) -> Tensor:
            vectors.append(z)
            ids.append(self.codebook.nearest(z))
            return self.codebook.embed(ids[-1])

        sums = list(accumulate(self._steps(h.detach(), lookup, dropped)))
        terms = {
            "codebook": torch.stack([F.mse_loss(running, h.detach()) for running in sums]).mean(),
            "commitment": self.codebook.options.beta
            * torch.stack([F.mse_loss(h, running.detach()) for running in sums]).mean(),
        }
        codes = h + (sums[-1] - h).detach()
        return Quantized(_rows(codes), torch.cat(ids, dim=1), terms), torch.cat(vectors, dim=1)

    def _steps(
        self, h: Float[Tensor, "B C H W"], lookup: Callable[[Tensor], Tensor], dropped: int | None = None
    ) -> Iterator[Float[Tensor, "B C H W"]]:
        """What each scale adds, with ``lookup`` from vectors ``(B, n, C)`` to codes; the dropped one adds zeros."""
        left = h
        for scale, size in enumerate(self.sizes):
            codes = lookup(_rows(F.adaptive_avg_pool2d(left, size)))
            step = self._spread(_map(codes, size), scale)
            if scale == dropped:
                step = 0.0 * step  # and no less: processes that train together wait for a gradient of each φ
            left = left - step.detach()
            yield step

    def _exact_vectors(self, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C"]:
        """The vectors of all scales if every code were what it stands for: what k-means should find."""
        vectors: list[Tensor] = []

        def lookup(z: Tensor) -> Tensor:
            vectors.append(self.codebook.normalize(z))
            return vectors[-1]

        with exact(h.device):
            list(self._steps(h.float(), lookup))
        return torch.cat(vectors, dim=1)

    def _drawn_scale(self, rng: torch.Generator | None) -> int | None:
        """The scale to drop from this batch."""
        if not (self.training and self.drop) or len(self.sizes) < 2:
            return None
        chance, place = torch.rand(2, generator=rng, device="cpu" if rng is None else rng.device).tolist()
        return 1 + int(place * (len(self.sizes) - 1)) if chance < self.drop else None


def _rows(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B n C"]:
    return x.flatten(2).transpose(1, 2)


def _map(rows: Float[Tensor, "B n C"], size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    return rows.transpose(1, 2).unflatten(2, size)


def _bicubic(x: Float[Tensor, "B C h w"], size: Sequence[int]) -> Float[Tensor, "B C H W"]:
    return x if x.shape[-2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bicubic")


def _nearest_tick(scale: int, num_scales: int, phi: int) -> int:
    """Which of ``phi`` convolutions refines a scale: the released weights count on float64 to settle ties as here."""
    margin = 1 / 3 / phi if phi == 4 else 1 / 2 / phi
    ticks = np.linspace(margin, 1 - margin, phi)
    return int(np.abs(ticks - scale / max(num_scales - 1, 1)).argmin())
