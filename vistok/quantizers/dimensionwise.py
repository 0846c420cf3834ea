"""Dimension-wise quantization: every channel of a latent is rounded by itself, with a table made after training.

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation", 2025 (arXiv 2503.16430).
Their table serves latents of unit variance. It stretches the range [-5, 5] onto [-3, 3], cuts a standard normal there
into cells of equal probability, and represents each cell by its mean. A value takes the nearest of these means; the
edges of the cells decide nothing. The stretch by 5/3 looks like a mistake and is close to the optimum: the mean squared
error on a unit normal at 64 levels is 6.6e-4, that of the best table 6.5e-4, that without the stretch 4.0e-3.

Other latents are not of unit variance: there a table is fitted to each channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.config import nearest
from vistok.errors import UserError

CELLS = 2048
"""Cells of the grid that :meth:`DimensionwiseQuantizer.quantize` looks values up in."""

KL16_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The published order of the 16 channels of KL-16: lowest frequencies first, see :func:`spectral_order`."""


def gaussian_cells(num_levels: int, limit: float = 3.0) -> tuple[Float[Tensor, " edges"], Float[Tensor, " levels"]]:
    """Equally likely cells of a standard normal.

    Args:
        num_levels: number of cells.
        limit: the outermost edges are clamped to plus and minus this.

    Returns:
        ``num_levels + 1`` edges and the means of the cells between them, ascending, float64.

    Raises:
        UserError: for less than two levels, or so many that clamping leaves the outermost cells empty.
    """
    most = int(1 / torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64, device="cpu")))
    if not 2 <= num_levels <= most:
        raise UserError(f"the number of levels must lie in 2..{most}, got {num_levels}")
    edges = torch.special.ndtri(torch.arange(num_levels + 1, dtype=torch.float64, device="cpu") / num_levels)
    edges = edges.clamp(-limit, limit)
    density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
    means = -density.diff() / torch.special.ndtr(edges).diff()
    return edges, (means - means.flip(0)) / 2


def published_levels(
    num_levels: int, low: float = -5.0, high: float = 5.0, limit: float = 3.0
) -> Float[Tensor, " levels"]:
    """The paper's levels: the means of :func:`gaussian_cells`, stretched from [-limit, limit] to [low, high]; float64.

    Raises:
        UserError: as :func:`gaussian_cells`.
    """
    return (gaussian_cells(num_levels, limit)[1] + limit) / (2 * limit) * (high - low) + low


class DimensionwiseQuantizer(nn.Module):
    """Rounds each channel to the nearest level of its own table. All arithmetic is float32.

    A new one has the published table in every channel; :meth:`fit` replaces it by tables for given latents. Nothing is
    trained: levels and the midpoints between them are buffers.

    Args:
        channels: of the latents.
        num_levels: of each channel.

    Raises:
        UserError: for a number of levels that the published table cannot have.
    """

    levels: Tensor
    midpoints: Tensor
    _low: Tensor
    _cells_per_unit: Tensor
    _first: Tensor
    _upper: Tensor

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.channels, self.num_levels = channels, num_levels
        self.set_levels(published_levels(num_levels).expand(channels, -1))
        self.register_load_state_dict_post_hook(lambda module, _: module._index())

    @torch.no_grad()
    def quantize(self, x: Float[Tensor, "... C"]) -> Int[Tensor, "... C"]:
        """Ids in ``[0, num_levels)`` of the nearest levels; the lower one in the middle between two.

        The result of ``bucketize`` on the midpoints, without its search: a uniform grid says how many midpoints lie in
        the cells below a value, and comparisons say how many of those in its own (hardly ever more than one).

        Raises:
            UserError: if the latents have another number of channels than the tables.
        """
        if x.shape[-1] != self.channels:
            raise UserError(f"this quantizer is for latents of {self.channels} channels, got {x.shape[-1]}")
        x = x.float()
        channel = torch.arange(self.channels, device=x.device, dtype=torch.int32)
        ids = self._first.index_select(0, self._cells(x).add_(channel * CELLS).flatten())
        values = x.flatten()
        for _ in range(self._most_in_a_cell):
            ids += values > self._upper.index_select(0, ids)
        return ids.view(x.shape).sub_(channel * self.num_levels).long()

    def decode(self, ids: Int[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Values of the levels ``ids``."""
        return self.levels[torch.arange(self.channels, device=ids.device), ids]

    def forward(self, x: Float[Tensor, "... C"]) -> tuple[Float[Tensor, "... C"], Int[Tensor, "... C"]]:
        """Values of the nearest levels, with the gradient of ``x`` (straight-through), and their ids."""
        ids = self.quantize(x)
        x = x.float()
        return x + (self.decode(ids) - x).detach(), ids

    @torch.no_grad()
    def fit(self, latents: Float[Tensor, "... C"], mode: str) -> None:
        """Make a table for each channel, after standardising it.

        Args:
            latents: of a few thousand images.
            mode: one of :data:`TABLES`: ``gaussian`` the published table; ``uniform`` equal cells over the range of the
                data; ``quantile`` equally likely cells, each with its mean; ``lloyd_max`` the least mean squared error.

        Raises:
            UserError: for an unknown mode, or naming the channel that is constant, is not finite, or has too few
                distinct values.
        """
        if mode not in TABLES:
            raise UserError(f"unknown kind of table {mode!r}{nearest(mode, list(TABLES))}")
        if latents.shape[-1] != self.channels:
            raise UserError(f"this quantizer is for latents of {self.channels} channels, got {latents.shape[-1]}")
        x = latents.reshape(-1, self.channels).T.double().contiguous()
        if x.shape[1] < self.num_levels:
            raise UserError(f"{self.num_levels} levels cannot be fitted to {x.shape[1]} values: give more images")
        check_latents(latents)
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        levels = mean + std * TABLES[mode]((x - mean) / std, self.num_levels)
        self.set_levels(levels.to(self.levels.device))

    def set_levels(self, levels: Float[Tensor, "C levels"]) -> None:
        """Replace the tables by ``levels``, ascending in each channel.

        Raises:
            UserError: naming a channel whose levels float32 cannot tell apart.
        """
        levels = levels.float()
        midpoints = ((levels[:, 1:].double() + levels[:, :-1].double()) / 2).float()
        between = (levels[:, :-1] < midpoints) & (midpoints < levels[:, 1:])
        _refuse(~between.all(dim=1), f"has too few distinct values for {self.num_levels} levels")
        self.register_buffer("levels", levels.contiguous())
        self.register_buffer("midpoints", midpoints)
        self._index()

    def _index(self) -> None:
        """Make the grid in which values are looked up: it follows from the midpoints."""
        low, width = self.midpoints[:, 0], self.midpoints[:, -1] - self.midpoints[:, 0]
        self.register_buffer("_low", low, persistent=False)
        self.register_buffer("_cells_per_unit", CELLS / torch.where(width > 0, width, 1), persistent=False)
        # Midpoints go through the very arithmetic of the values, so that rounding cannot put one on the wrong side.
        cells = self._cells(self.midpoints.T).T.contiguous()
        number = torch.arange(CELLS + 1, device=cells.device, dtype=torch.int32).expand(len(cells), -1)
        below = torch.searchsorted(cells, number.contiguous(), out_int32=True)
        start = self.num_levels * torch.arange(len(cells), device=cells.device, dtype=torch.int32)[:, None]
        self.register_buffer("_first", (below[:, :-1] + start).flatten(), persistent=False)
        self.register_buffer("_upper", F.pad(self.midpoints, (0, 1), value=torch.inf).flatten(), persistent=False)
        self._most_in_a_cell = int(below.diff(dim=1).max())

    def _cells(self, x: Float[Tensor, "... C"]) -> Int[Tensor, "... C"]:
        cells = (x - self._low).mul_(self._cells_per_unit)
        return cells.nan_to_num_(0.0).clamp_(0, CELLS - 1).int()


def check_latents(latents: Float[Tensor, "... C"]) -> None:
    """Raise UserError naming a channel of ``latents`` that is constant or not finite."""
    x = latents.reshape(-1, latents.shape[-1]).double()
    _refuse(~x.isfinite().all(dim=0), "holds values that are not finite")
    _refuse(x.std(dim=0) <= 1e-6 * x.mean(dim=0).abs(), "is constant")


def spectral_order(latents: Float[Tensor, "M h w C"], cutoff: float = 0.25, drop_dc: bool = False) -> Int[Tensor, " C"]:
    """Channels by their share of energy at low frequencies, highest first.

    The paper states the principle and neither cut-off nor data. Ours: the mean power spectrum of each channel over the
    images, without a window; low is a radius of at most ``cutoff`` times that of Nyquist (half a cycle per position).

    Args:
        latents: of a few thousand images, on their grid.
        cutoff: radius of what is low, as a share of Nyquist's.
        drop_dc: leave the mean of each image out of all sums.

    Raises:
        UserError: if no frequency of the grid is that low.
    """
    power = torch.fft.fft2(latents.double(), dim=(1, 2)).abs().square().mean(dim=0)
    rows, columns = (torch.fft.fftfreq(size, device=latents.device) for size in power.shape[:2])
    low = (rows[:, None].square() + columns.square()).sqrt() <= cutoff / 2
    if drop_dc:
        power[0, 0], low[0, 0] = 0, False
    if not bool(low.any()):
        raise UserError(f"no frequency of a {len(rows)} x {len(columns)} grid lies within {cutoff} of Nyquist's")
    share = power[low].sum(dim=0) / power.sum(dim=(0, 1))
    return share.argsort(descending=True, stable=True)


# ---------------------------------------------------------------------- tables of standardised values


def _gaussian(x: Float[Tensor, "C M"], num_levels: int) -> Float[Tensor, "C levels"]:
    return published_levels(num_levels).to(x).expand(len(x), -1)


def _uniform(x: Float[Tensor, "C M"], num_levels: int) -> Float[Tensor, "C levels"]:
    low, high = x.aminmax(dim=1, keepdim=True)
    return low + (high - low) * (torch.arange(num_levels).to(x) + 0.5) / num_levels


def _quantile(x: Float[Tensor, "C M"], num_levels: int) -> Float[Tensor, "C levels"]:
    cells = x.sort(dim=1).values.tensor_split(num_levels, dim=1)
    return torch.stack([cell.mean(dim=1) for cell in cells], dim=1)


def _lloyd_max(x: Float[Tensor, "C M"], num_levels: int, most_rounds: int = 2000) -> Float[Tensor, "C levels"]:
    """Lloyd's iteration (Lloyd 1982, Max 1960) from each of the other tables; the best end for each channel.

    A round never increases the error, so that no other table fits these values better.
    """
    x = x.sort(dim=1).values
    sums, squares = (F.pad(value.cumsum(dim=1), (1, 0)) for value in (x, x.square()))
    ends = []
    for start in (_gaussian, _uniform, _quantile):
        levels = start(x, num_levels)
        for _ in range(most_rounds):
            cuts = torch.searchsorted(x, (levels[:, 1:] + levels[:, :-1]) / 2)
            cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=x.shape[1])
            count, total = cuts.diff(dim=1), sums.gather(1, cuts).diff(dim=1)
            moved = torch.where(count > 0, total / count.clamp(min=1), levels)
            done, levels = bool((moved - levels).abs().max() < 1e-6), moved
            if done:
                break
        error = squares[:, -1] - (2 * total * levels - count * levels.square()).sum(dim=1)
        ends.append((error, levels))
    errors, tables = (torch.stack(parts) for parts in zip(*ends))
    return tables[errors.argmin(dim=0), torch.arange(len(x), device=x.device)]


TABLES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "gaussian": _gaussian,
    "uniform": _uniform,
    "quantile": _quantile,
    "lloyd_max": _lloyd_max,
}
"""From standardised values ``(C, M)`` and the number of levels to ascending levels ``(C, levels)``, by mode."""


def _refuse(channels: Tensor, problem: str) -> None:
    """Raise UserError that names the first of the marked channels."""
    if bool(channels.any()):
        raise UserError(f"channel {int(channels.nonzero()[0])} {problem}")
