"""From logits to codes: one implementation of guidance, filtering and drawing for every generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

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


def filter_logits(
    logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "B V"]:
    """Set the logits outside the top k, then outside the top-p nucleus, then below min-p, to -inf.

    The nucleus is the smallest set of most likely codes whose probability reaches ``top_p`` (Holtzman et al. 2020);
    the code that crosses the threshold stays. Ties with the k-th code stay too. Min-p is the share of the likeliest
    code's probability that a code must have (Nguyen et al. 2024).
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        outside = probability.cumsum(dim=-1) - probability > top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    if min_p > 0:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def draw(
    logits: Float[Tensor, "B V"],
    uniform: Float[Tensor, " B"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Int[Tensor, " B"]:
    """One code for each row by inverting its cumulative distribution at ``uniform`` in [0, 1).

    A given draw picks the same code whatever the rest of the batch is. Temperature 0 takes the most likely code.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Double precision: with 64,000 codes a float32 sum drifts by more than the rarest probabilities.
    logits = logits / max(temperature, 1e-5)  # where float32 ends, nothing is left to draw
    probability = filter_logits(logits, top_k, top_p, min_p).double().softmax(dim=-1)
    cumulative = probability.cumsum(dim=-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


Schedule = Literal["constant", "linear", "half_linear", "power_cosine"]

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: progress,
    "half_linear": lambda progress, power: min(1.0, 2 * progress),
    "power_cosine": lambda progress, power: (1 - math.cos(math.pi * progress**power)) / 2,
}
"""How guidance grows: its share when this share of the tokens is known. ``linear`` is that of VAR and MAR,
``half_linear`` Token-Shuffle's as we read it (up to the middle), ``power_cosine`` RAR's."""

POWER = 2.75
"""Of ``power_cosine`` in RAR-B; L, XL and XXL have 2.5, 1.5 and 1.2."""


def scheduled(schedule: str, scale: float, progress: float, power: float = POWER) -> float:
    """The guidance scale when the share ``progress`` of the tokens is known: from 1 (no guidance) to ``scale``.

    There is nothing to grow to a scale below 1.
    """
    return scale if scale <= 1 else 1 + (scale - 1) * SCHEDULES[schedule](progress, power)


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
        guided = self.guide(logits, len(uniform))
        return draw(guided, uniform, options.temperature, options.top_k, options.top_p, options.min_p)


class Sampler:
    """How the codes of one generation are picked: makes the :class:`Picker` of each step.

    Args:
        options: guidance, temperature and filtering.
        settings: the schedule of guidance, see :meth:`defaults`.

    Raises:
        UserError: for an unknown schedule.
    """

    def __init__(self, options: SampleOptions, settings: dict[str, Any]) -> None:
        self.options = options
        self.schedule, self.power = settings["guidance_schedule"], settings["guidance_power"]
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance_schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not self.power > 0:
            raise UserError(f"guidance_power must be above 0, got {self.power}")

    @staticmethod
    def defaults(schedule: str) -> dict[str, Any]:
        """Sampling options of every generator: how guidance grows, and the power of ``power_cosine``."""
        return {"guidance_schedule": schedule, "guidance_power": POWER}

    def will_guide(self, known: float) -> bool:
        """Whether there is guidance at or after the step at which this share of the codes is known."""
        return self.options.cfg_scale != 1 and known < self.options.guidance_interval[1]

    def at(self, known: float, progress: float | None = None) -> Picker:
        """What picks the codes of a step.

        Args:
            known: share of the codes that are known before the step.
            progress: what the guidance grows with, where that is published as something else than ``known``.
        """
        options, scale = self.options, 1.0
        first, end = options.guidance_interval
        if first <= known < end:
            progress = known if progress is None else progress
            scale = scheduled(self.schedule, options.cfg_scale, progress, self.power)
        if options.final_temperature is not None:
            change = options.final_temperature - options.temperature
            options = replace(options, temperature=options.temperature + known * change)
        return Picker(options, scale)
