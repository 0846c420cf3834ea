"""From logits to codes: one implementation of guidance, filtering and drawing for every generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.flow.guidance import guide
from vistok.interfaces import SampleOptions

Picker = Callable[[Float[Tensor, "B2 V"], Float[Tensor, " B"]], Int[Tensor, " B"]]
"""Turns the logits of a (possibly guided) batch and one uniform draw for each sample into ids."""


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


def picker(options: SampleOptions, position: int) -> Picker:
    """Guidance, filter and draw of ``options`` at ``position``; guided batches hold the conditional rows, then the null
    rows."""
    scale = options.scale_at(position)

    def pick(logits: Float[Tensor, "B2 V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        conditional, *null = logits.float().split(len(uniform))
        logits = conditional if scale == 1 else guide(conditional, null[0], scale)
        return draw(logits, uniform, options.temperature, options.top_k, options.top_p)

    return pick
