"""Which tokens become one, and what that does to their values: the part that all merging methods share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """N tokens become M: output token m is token ``keep[m]`` together with all sources whose target is m.

    Args:
        keep: positions that stay, in output order.
        sources: positions that go.
        targets: the output token that each of them joins.
    """

    keep: Int[Tensor, "B M"]
    sources: Int[Tensor, "B r"]
    targets: Int[Tensor, "B r"]

    @property
    def slots(self) -> Int[Tensor, "B N"]:
        """The output token that each input token is part of."""
        batch, length = self.keep.shape
        slots = self.keep.new_empty(batch, length + self.sources.shape[1])
        slots.scatter_(1, self.keep, torch.arange(length, device=slots.device).expand(batch, -1))
        return slots.scatter_(1, self.sources, self.targets)

    def followed_by(self, count: int) -> Matching:
        """The same in a sequence that goes on for ``count`` tokens, which stay behind all others."""
        batch, length = self.keep.shape
        first = length + self.sources.shape[1]
        more = positions(batch, first, first + count, device=self.keep.device)
        return replace(self, keep=torch.cat([self.keep, more], dim=1))

    def merge(
        self, x: Float[Tensor, "B N C"], size: Float[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B M C"], Float[Tensor, "B M"]]:
        """The mean of each group weighted by ``size`` (None: ones), and the sizes after the merge in float32.

        Tokens that nothing joins come out bit for bit as they were.
        """
        size = torch.ones(x.shape[:2], device=x.device) if size is None else size
        kept, joining = size.gather(1, self.keep), size.gather(1, self.sources)
        total = kept.scatter_add(1, self.targets, joining)
        share = joining / total.gather(1, self.targets)
        # The mean as a step away from the token that stays: only the rows of the pairs are touched.
        step = take(x, self.sources) - take(x, self.keep.gather(1, self.targets))
        merged = take(x, self.keep).flatten(0, 1)
        merged.index_add_(0, _rows(self.targets, total.shape[1]), (share[..., None] * step).flatten(0, 1).to(x.dtype))
        return merged.unflatten(0, total.shape), total

    def unmerge(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B N C"]:
        """Give every token the value of its group."""
        return take(x, self.slots)


def match(
    a: Int[Tensor, "B A"],
    b: Int[Tensor, "B T"],
    similarity: Float[Tensor, "B A T"],
    r: int,
    stay: Int[Tensor, "B S"],
    in_order: bool = True,
) -> Matching:
    """Let the ``r`` tokens of ``a`` that are most similar to one of ``b`` join that one (bipartite soft matching).

    The output order is ``stay``, the rest of ``a``, ``b``.

    Args:
        a: positions of the tokens that may go.
        b: positions of those that they may join.
        similarity: of each pair.
        r: number of merges, at most A.
        stay: positions that take no part.
        in_order: sort the rest of ``a`` by position; otherwise by falling similarity.
    """
    best, partner = similarity.max(dim=-1)
    if r == a.shape[1]:
        return Matching(torch.cat([stay, b], dim=1), a, partner + stay.shape[1])
    order = best.argsort(dim=-1, descending=True)
    go, rest = order[:, :r], a.gather(1, order[:, r:])
    keep = torch.cat([stay, rest.sort(dim=-1).values if in_order else rest, b], dim=1)
    return Matching(keep, a.gather(1, go), partner.gather(1, go) + (keep.shape[1] - b.shape[1]))


def directions(metric: Float[Tensor, "B N d"]) -> Float[Tensor, "B N d"]:
    """Unit vectors in float32, apart from the graph: their products are cosines. A zero vector stays zero."""
    return F.normalize(metric.detach().float(), dim=-1)


def positions(batch: int, start: int, stop: int, step: int = 1, device: torch.device | None = None) -> Tensor:
    """``start, start + step, ...`` for each image of a batch, (batch, count) int64."""
    return torch.arange(start, stop, step, device=device).expand(batch, -1)


def take(x: Float[Tensor, "B N C"], index: Int[Tensor, "B M"]) -> Float[Tensor, "B M C"]:
    """The tokens at ``index``, each image its own."""
    return x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])).unflatten(0, index.shape)


def group_means(x: Float[Tensor, "B N C"], slots: Int[Tensor, "B N"], length: int) -> Float[Tensor, "B M C"]:
    """The plain mean of the tokens in each of ``length`` slots, none of them empty."""
    sums = x.new_zeros(x.shape[0] * length, x.shape[2])
    sums.index_add_(0, _rows(slots, length), x.flatten(0, 1))
    counts = x.new_zeros(x.shape[0], length).scatter_add_(1, slots, x.new_ones(slots.shape))
    return sums.unflatten(0, counts.shape) / counts[..., None]


def _rows(index: Int[Tensor, "B M"], length: int) -> Int[Tensor, " BM"]:
    """Positions in a batch of sequences laid end to end (moving whole rows is what makes merging cheap)."""
    return (index + length * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()
