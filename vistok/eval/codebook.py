"""How much of a codebook is in use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from vistok.eval.protocol import number
from vistok.tokens import Layout, MultiScale


class CodebookUsage(Metric):
    """Usage, entropy and perplexity of the codes seen since the last reset.

    For each slot, with ``p`` the share of each code among all codes seen: usage is the share of the vocabulary seen
    at least once, entropy ``H = -sum p log2 p`` in bits, perplexity ``2^H`` the effective number of codes. The state is
    one count per code (and scale), summed over processes, so the result does not depend on how images were spread.

    Args:
        vocab_sizes: vocabulary size of each slot, as in :class:`vistok.tokens.TokenSpec`.
        layout: of the tokens; a :class:`~vistok.tokens.MultiScale` one is also measured scale by scale: ``scales`` are
            their names.
    """

    full_state_update = False
    counts: Int[Tensor, "scales V"]

    def __init__(self, vocab_sizes: tuple[int, ...], layout: Layout | None = None) -> None:
        super().__init__()
        self.vocab_sizes = tuple(vocab_sizes)
        self.layout = layout if isinstance(layout, MultiScale) else None
        self.scales = [f"scale_{height}x{width}" for height, width in self.layout.sizes] if self.layout else []
        counts = torch.zeros(max(1, len(self.scales)), sum(vocab_sizes), dtype=torch.int64)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, ids: Int[Tensor, "B N S"]) -> None:
        """Count the codes of one batch; those of a multi-scale layout may be the first scales only."""
        starts = torch.tensor((0, *self.vocab_sizes[:-1]), device=ids.device).cumsum(0)
        lengths = self.layout.lengths if self.layout else (ids.shape[1],)
        scale = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[: ids.shape[1], None].to(ids.device)
        places = (ids + starts + scale * self.counts.shape[1]).flatten()
        self.counts += torch.bincount(places, minlength=self.counts.numel()).view_as(self.counts).to(self.counts.device)

    def compute(self) -> dict[str, float]:
        """``usage`` in [0, 1], ``entropy_bits`` and ``perplexity``: means over slots; ``codes`` are the window.

        The window is the number of codes of each slot that were counted: few codes cannot use a large vocabulary, so
        figures compare only over windows of one size.
        With several slots there is also ``slot_0/usage`` and so on for each one, with several scales
        ``scale_4x4/usage`` and so on (means over slots).
        """
        slots = self._slots(self.counts.sum(dim=0))
        figures = _means(slots) | {"codes": self.counts[:, : self.vocab_sizes[0]].sum().item()}
        if len(slots) > 1:
            figures |= {f"slot_{i}/{name}": value for i, slot in enumerate(slots) for name, value in slot.items()}
        for scale, counts in zip(self.scales, self.counts):
            figures |= {f"{scale}/{name}": value for name, value in _means(self._slots(counts)).items()}
        return figures

    def _slots(self, counts: Int[Tensor, " V"]) -> list[dict[str, float]]:
        return [_statistics(slot) for slot in counts.split(self.vocab_sizes)]


def describe(figures: Mapping[str, float]) -> list[str]:
    """Figures of :meth:`CodebookUsage.compute` in words: a line for all codes together, one for each scale."""
    figures = dict(figures)
    window = f" over {figures.pop('codes')} codes" if "codes" in figures else ""  # of an older result
    lines: dict[str, list[str]] = {}
    for name, value in figures.items():
        part, _, figure = name.rpartition("/")
        if not part.startswith("slot_"):
            lines.setdefault(part.replace("scale_", ", scale "), []).append(f"{figure} {number(value)}")
    return [f"codebook{part or window}: {', '.join(figures)}" for part, figures in lines.items()]


def _means(slots: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(slot[name] for slot in slots) / len(slots) for name in slots[0]}


def _statistics(counts: Int[Tensor, " K"]) -> dict[str, float]:
    share: Float[Tensor, " K"] = counts.double() / counts.sum().clamp(min=1)
    entropy_bits = -torch.special.xlogy(share, share).sum().item() / torch.log(torch.tensor(2.0).double()).item()
    return {
        "usage": (counts > 0).double().mean().item(),
        "entropy_bits": entropy_bits,
        "perplexity": 2.0**entropy_bits,
    }
