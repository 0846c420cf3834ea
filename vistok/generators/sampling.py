"""From logits to codes: one implementation of guidance, filtering and drawing for every generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.errors import UserError
from vistok.flow.guidance import guide
from vistok.interfaces import SampleOptions
from vistok.tokens import Ordered1D, TokenSpec


def num_positions(spec: TokenSpec, wanted: int | None) -> int:
    """Positions to generate: ``wanted``, or all.

    Raises:
        UserError: for a prefix of a layout that has none, or of no legal length.
    """
    total = spec.num_positions
    if wanted is None:
        return total
    if not isinstance(spec.layout, Ordered1D) and wanted != total:
        raise UserError(f"only ordered codes have prefixes: {spec.layout} needs all {total} tokens")
    if not 1 <= wanted <= total:
        raise UserError(f"num_tokens must lie in 1..{total}, got {wanted}")
    return wanted


def filter_logits(logits: Float[Tensor, "B V"], top_k: int, top_p: float) -> Float[Tensor, "B V"]:
    """Set the logits outside the top k, then outside the top-p nucleus, to -inf.

    The nucleus is the smallest set of most likely codes whose probability reaches ``top_p`` (Holtzman et al. 2020);
    the code that crosses the threshold stays. Ties with the k-th code stay too.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        outside = probability.cumsum(dim=-1) - probability > top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def draw(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], temperature: float, top_k: int, top_p: float
) -> Int[Tensor, " B"]:
    """One code for each row by inverting its cumulative distribution at ``uniform`` in [0, 1).

    A given draw picks the same code whatever the rest of the batch is. Temperature 0 takes the most likely code.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Double precision: with 64,000 codes a float32 sum drifts by more than the rarest probabilities.
    probability = filter_logits(logits / temperature, top_k, top_p).double().softmax(dim=-1)
    cumulative = probability.cumsum(dim=-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


@dataclass(frozen=True)
class Picker:
    """Turns predictions of a batch into codes; a guided batch holds the conditional rows, then as many null rows.

    Args:
        options: filtering and temperature.
        scale: of the guidance.
    """

    options: SampleOptions
    scale: float

    def guide(self, predictions: Float[Tensor, "B2 C"], rows: int) -> Float[Tensor, "B C"]:
        """The ``rows`` guided predictions (features or logits), float32; without null rows, the conditional ones."""
        conditional, *null = predictions.float().split(rows)
        return guide(conditional, null[0], self.scale) if null and self.scale != 1 else conditional

    def __call__(self, logits: Float[Tensor, "B2 V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """One code for each uniform draw in [0, 1)."""
        options = self.options
        return draw(self.guide(logits, len(uniform)), uniform, options.temperature, options.top_k, options.top_p)
