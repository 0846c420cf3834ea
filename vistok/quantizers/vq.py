"""Vector quantization: the code of a vector is the nearest row of a table.

van den Oord et al., "Neural Discrete Representation Learning", 2017 (arXiv 1711.00937). The table learns by gradient
(section 3.2; with l2-normalised rows as in LlamaGen's VQ-16, Sun et al. 2024, arXiv 2406.06525), or each row is the
moving average of the vectors that chose it (appendix A.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.utilities.distributed import gather_all_tensors

from vistok.errors import UserError
from vistok.nn.precision import exact

SCORES = {"cpu": 2**21}
"""Scores of vectors against entries in memory at one time, by kind of device: on a CPU what its cache holds."""

TEMPERATURE = 0.01
"""Of the softmax over entries in the entropy penalty, as published."""


@dataclass
class Quantized:
    """A batch of vectors and the codes they became.

    Args:
        codes: float32 rows of the table, with the gradient of the (normalised) vectors: straight-through.
        ids: int64, in ``[0, vocab_size)``.
        terms: the weighted scalars of the loss by name: ``codebook``, ``commitment``, ``entropy``.
    """

    codes: Float[Tensor, "B N C"]
    ids: Int[Tensor, "B N"]
    terms: dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class CodebookOptions:
    """How a codebook is used and learns.

    Args:
        normalized: vectors and rows are l2-normalised wherever they meet, as in LlamaGen and TokenFlow.
        raw_codes: what is normalised is normalised for the comparison alone, and a code is the row as it is: VAR's
            ``using_znorm``.
        beta: weight of the commitment term, which pulls vectors to their codes.
        entropy: weight of the entropy penalty, which wants every vector sure and all entries used; 0 skips its
            (vectors x entries) softmax.
        ema_decay: share of the moving averages that one batch keeps; 0 lets gradients move the table.
        kmeans: start from k-means of the first training batch.
        revive_after: batches that an entry may go without use before it takes a vector of the batch; 0 never.

    Raises:
        UserError: if a value is outside its range.
    """

    normalized: bool = True
    raw_codes: bool = False
    beta: float = 0.25
    entropy: float = 0.0
    ema_decay: float = 0.0
    kmeans: bool = False
    revive_after: int = 0

    def __post_init__(self) -> None:
        for name in ("beta", "entropy", "ema_decay", "revive_after"):
            if getattr(self, name) < 0:
                raise UserError(f"codebook: {name} must be at least 0, got {getattr(self, name)}")
        if self.ema_decay >= 1:
            raise UserError(f"codebook: ema_decay must be below 1, got {self.ema_decay}")


class Codebook(nn.Module):
    """A table of ``vocab_size`` rows and the lookup of the nearest. All arithmetic is float32 under any autocast.

    What a table learns from a batch without gradients (moving averages, use, k-means, revival) it learns from the
    batches of all processes together, so that their tables stay equal.

    Args:
        vocab_size: number of rows.
        dim: channels of a row.
        options: see :class:`CodebookOptions`.
        widths: channels of the branches that are normalised, each by itself; together ``dim``. One branch by default.
        weights: of the squared distances of the branches.

    Raises:
        UserError: for a table without rows, or weights that are negative or all zero.
    """

    _weight: Tensor
    _idle: Tensor
    _count: Tensor
    _sum: Tensor
    _started: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        options: CodebookOptions | None = None,
        *,
        widths: Sequence[int] | None = None,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        if vocab_size < 1 or dim < 1:
            raise UserError(f"a codebook needs entries and channels, got {vocab_size} x {dim}")
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise UserError(f"weights of distances must be at least 0 and not all 0, got {list(weights)}")
        self.vocab_size, self.dim = vocab_size, dim
        self.options = options or CodebookOptions()
        self.widths = tuple(widths or (dim,))
        learns = self.options.ema_decay == 0
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(vocab_size, width).uniform_(-1 / vocab_size, 1 / vocab_size), learns)
            for width in self.widths
        )
        self.set_rows(self.rows())
        per_channel = torch.cat([torch.full((width,), float(weight)) for width, weight in zip(self.widths, weights)])
        self.register_buffer("_weight", per_channel, persistent=False)
        if self.options.revive_after:
            self.register_buffer("_idle", torch.zeros(vocab_size, dtype=torch.int64))
        if not learns:
            self.register_buffer("_count", torch.zeros(vocab_size))
            self.register_buffer("_sum", torch.zeros(vocab_size, dim))
        if self.options.kmeans:
            self.register_buffer("_started", torch.zeros((), dtype=torch.int64))

    # ------------------------------------------------------------------ lookup

    def normalize(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Vectors as they are used, float32: each branch of unit norm, or unchanged.

        Raises:
            UserError: if they have another number of channels than the table.
        """
        return z.float() if self.options.raw_codes else self._comparable(z)

    def _comparable(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        if z.shape[-1] != self.dim:
            raise UserError(f"this codebook is for vectors of {self.dim} channels, got {z.shape[-1]}")
        if not self.options.normalized:
            return z.float()
        return torch.cat([F.normalize(part, dim=-1) for part in z.float().split(self.widths, dim=-1)], dim=-1)

    def rows(self) -> Float[Tensor, "K C"]:
        """All rows as they are used."""
        return self.normalize(torch.cat(list(self.tables), dim=-1))

    def embed(self, ids: Int[Tensor, ...]) -> Float[Tensor, "... C"]:
        """Rows ``ids`` as they are used."""
        return self.normalize(torch.cat([F.embedding(ids, table) for table in self.tables], dim=-1))

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "... C"]) -> Int[Tensor, ...]:
        """Int64 ids of the rows nearest to ``z``; distances are weighted sums over the branches."""
        vectors, (rows, offset) = self._comparable(z).flatten(0, -2), self._compared()
        ids = torch.empty(len(vectors), dtype=torch.int64, device=z.device)
        with exact(z.device):
            for chunk, place in zip(self._chunks(vectors), self._chunks(ids)):
                place.copy_(F.linear(chunk, rows, offset).argmax(dim=-1))
        return ids.view(z.shape[:-1])

    def _compared(self) -> tuple[Float[Tensor, "K C"], Float[Tensor, " K"] | None]:
        """Rows and offset that turn a squared distance into a product: -d/2 = z·row + offset + (what ids share)."""
        rows = self._comparable(self.rows())
        weighted = rows * self._weight
        # Rows of unit norm are equally far from the origin.
        return weighted, None if self.options.normalized else -(rows * weighted).sum(dim=-1) / 2

    def _chunks(self, vectors: Shaped[Tensor, "M ..."]) -> tuple[Shaped[Tensor, "m ..."], ...]:
        return vectors.split(max(1, SCORES.get(vectors.device.type, 2**25) // self.vocab_size))

    # ------------------------------------------------------------------ training

    def forward(self, z: Float[Tensor, "B N C"], rng: torch.Generator | None = None) -> Quantized:
        """Quantize a batch; in training also learn from it.

        Args:
            z: vectors, not yet normalised.
            rng: for the start by k-means and for revival; torch's own stream if None.
        """
        self.start(lambda: z, rng)
        quantized = self.quantize(z)
        self.learn(z, quantized.ids, rng)
        return quantized

    def quantize(self, z: Float[Tensor, "B N C"]) -> Quantized:
        """Codes, ids and loss terms of ``z``; nothing is learnt."""
        z = self.normalize(z)
        ids = self.nearest(z)
        codes = self.embed(ids)
        terms = {} if self.options.ema_decay else {"codebook": F.mse_loss(codes, z.detach())}
        terms["commitment"] = self.options.beta * F.mse_loss(z, codes.detach())
        if self.options.entropy:
            terms["entropy"] = self.options.entropy * self._entropy(z)
        return Quantized(z + (codes - z).detach(), ids, terms)

    def _entropy(self, z: Float[Tensor, "B N C"]) -> Float[Tensor, ""]:
        """Mean entropy of a vector's softmax over entries, less the entropy of the mean of all softmaxes, in nats."""
        vectors, (rows, offset) = self._comparable(z).flatten(0, -2), self._compared()
        with exact(z.device):
            parts = [
                checkpoint(_softmax_sums, chunk, rows, offset, use_reentrant=False) for chunk in self._chunks(vectors)
            ]
        entropies, shares = (sum(column) / len(vectors) for column in zip(*parts))
        return entropies + (shares * (shares + 1e-5).log()).sum()

    @torch.no_grad()
    def start(
        self, vectors: Callable[[], Float[Tensor, "B N C"]], rng: torch.Generator | None = None, rounds: int = 10
    ) -> None:
        """Set the rows by k-means of ``vectors()``, if this is the first batch of a training that wants it.

        Rows beyond the number of vectors stay where they are.
        """
        if not (self.training and self.options.kmeans) or bool(self._started):
            return
        z = _of_all_processes(self.normalize(vectors()).flatten(0, -2))
        chosen = _draw(z, self.vocab_size, rng)
        self.set_rows(chosen, slice(len(chosen)))
        for _ in range(rounds):
            count, total = self._sums(z, self.nearest(z))
            used = (count > 0).nonzero()[:, 0]
            self.set_rows(total[used] / count[used, None], used)
        self.set_rows(_of_first_process(self.rows()))
        self._started.fill_(1)

    @torch.no_grad()
    def learn(self, z: Float[Tensor, "B N C"], ids: Int[Tensor, "B N"], rng: torch.Generator | None = None) -> None:
        """Follow a training batch: moving averages of the vectors that chose each row; new rows for unused entries."""
        options = self.options
        if not self.training or not (options.ema_decay or options.revive_after):
            return
        z = self.normalize(z).flatten(0, -2)
        count, total = _sum_over_processes(*self._sums(z, ids.flatten()))
        used = count > 0
        if options.ema_decay:
            self._count.lerp_(count, 1 - options.ema_decay)
            self._sum.lerp_(total, 1 - options.ema_decay)
            # An entry that nothing chose keeps its quotient, of two sums that fade away together.
            rows = used.nonzero()[:, 0]
            self.set_rows(self._sum[rows] / self._count[rows, None], rows)
        if options.revive_after:
            self._idle.add_(1).masked_fill_(used, 0)
            dead = (self._idle >= options.revive_after).nonzero()[:, 0]
            if len(dead):
                self._revive(dead, z, rng)

    def _revive(self, dead: Int[Tensor, " D"], z: Float[Tensor, "M C"], rng: torch.Generator | None) -> None:
        chosen = _of_first_process(_draw(_of_all_processes(z), len(dead), rng))
        dead = dead[: len(chosen)]
        self.set_rows(chosen, dead)
        self._idle[dead] = 0
        if self.options.ema_decay:
            self._count[dead], self._sum[dead] = 0, 0

    @torch.no_grad()
    def set_rows(self, rows: Float[Tensor, "k C"], where: slice | Tensor = slice(None)) -> None:
        """Replace all rows, or those that are named."""
        for table, part in zip(self.tables, self.normalize(rows).split(self.widths, dim=-1)):
            table[where] = part

    def _sums(
        self, z: Float[Tensor, "M C"], ids: Int[Tensor, " M"]
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, "K C"]]:
        """How many vectors chose each row, and their sum."""
        count = torch.bincount(ids, minlength=self.vocab_size).float()
        return count, z.new_zeros(self.vocab_size, self.dim).index_add_(0, ids, z)


def _softmax_sums(z: Tensor, rows: Tensor, offset: Tensor | None) -> tuple[Float[Tensor, ""], Float[Tensor, " K"]]:
    """Sums over vectors of the entropy of each one's softmax, and of the softmax."""
    logs = (F.linear(z, rows, offset) * (2 / TEMPERATURE)).log_softmax(dim=-1)
    shares = logs.exp()
    return -(shares * logs).sum(), shares.sum(dim=0)


def _draw(vectors: Float[Tensor, "M C"], count: int, rng: torch.Generator | None) -> Float[Tensor, "m C"]:
    """``count`` different ones of the vectors, or all if there are fewer, in random order."""
    order = torch.randperm(len(vectors), generator=rng, device="cpu" if rng is None else rng.device)
    return vectors[order[:count].to(vectors.device)]


# ---------------------------------------------------------------------- processes


def _are_many() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    if _are_many():
        for value in values:
            dist.all_reduce(value)
    return values


def _of_all_processes(vectors: Float[Tensor, "m C"]) -> Float[Tensor, "M C"]:
    """The vectors of all processes, in the order of their ranks."""
    return torch.cat(gather_all_tensors(vectors)) if _are_many() else vectors


def _of_first_process(value: Tensor) -> Tensor:
    """What the first process has: draws differ between ranks, and sums on a GPU in their last digits."""
    if _are_many():
        value = value.contiguous()
        dist.broadcast(value, src=0)
    return value
