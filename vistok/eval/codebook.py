"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Usage, entropy and perplexity of the codes seen since the last reset.

    For each slot, with ``p`` the share of each code among all codes seen: usage is the share of the vocabulary seen
    at least once, entropy ``H = -sum p log2 p`` in bits, perplexity ``2^H`` the effective number of codes. The state is
    one count per code, summed over processes, so the result does not depend on how images were spread over them.

    Args:
        vocab_sizes: vocabulary size of each slot, as in :class:`vistok.tokens.TokenSpec`.
    """

    full_state_update = False
    counts: Int[Tensor, " V"]

    def __init__(self, vocab_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab_sizes = tuple(vocab_sizes)
        self.add_state("counts", torch.zeros(sum(self.vocab_sizes), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Int[Tensor, "B N S"]) -> None:
        """Count the codes of one batch."""
        starts = torch.tensor((0, *self.vocab_sizes[:-1]), device=ids.device).cumsum(0)
        self.counts += torch.bincount((ids + starts).flatten(), minlength=len(self.counts)).to(self.counts.device)

    def compute(self) -> dict[str, float]:
        """``usage`` in [0, 1], ``entropy_bits`` and ``perplexity``: means over slots.

        With several slots there is also ``slot_0/usage`` and so on for each one.
        """
        slots = [_statistics(counts) for counts in self.counts.split(self.vocab_sizes)]
        means = {name: sum(slot[name] for slot in slots) / len(slots) for name in slots[0]}
        if len(slots) == 1:
            return means
        return means | {f"slot_{i}/{name}": value for i, slot in enumerate(slots) for name, value in slot.items()}


def _statistics(counts: Int[Tensor, " K"]) -> dict[str, float]:
    share: Float[Tensor, " K"] = counts.double() / counts.sum().clamp(min=1)
    entropy_bits = -torch.special.xlogy(share, share).sum().item() / torch.log(torch.tensor(2.0).double()).item()
    return {
        "usage": (counts > 0).double().mean().item(),
        "entropy_bits": entropy_bits,
        "perplexity": 2.0**entropy_bits,
    }
