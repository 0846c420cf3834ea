"""From logits to codes: one implementation of guidance, filtering and drawing for every generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.errors import UserError
from vistok.flow.guidance import guide
from vistok.interfaces import SampleOptions
from vistok.tokens import TokenSpec, refusal


def num_positions(spec: TokenSpec, wanted: int | None) -> int:
    """Positions to generate: ``wanted``, or all.

    Raises:
        UserError: for a prefix that the layout does not have.
    """
    if wanted is None:
        return spec.num_positions
    if wanted not in spec.layout.prefixes:
        raise UserError(f"num_tokens: {refusal(wanted, spec.layout, spec.layout.prefixes)}")
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


Schedule = Literal["constant", "linear", "half_linear", "power_cosine"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "half_linear": lambda progress: min(1.0, 2 * progress),
    "power_cosine": lambda progress: (1 - math.cos(math.pi * progress**2.75)) / 2,
}
"""How guidance grows: its share when this share of the tokens is known. ``linear`` is that of VAR and MAR,
``half_linear`` Token-Shuffle's as we read it (up to the middle), ``power_cosine`` RAR's with the power of its B."""


def scheduled(schedule: str, scale: float, progress: float) -> float:
    """The guidance scale when the share ``progress`` of the tokens is known: from 1 (no guidance) to ``scale``.

    There is nothing to grow to a scale below 1.

    Raises:
        UserError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"guidance_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return scale if scale <= 1 else 1 + (scale - 1) * SCHEDULES[schedule](progress)


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
