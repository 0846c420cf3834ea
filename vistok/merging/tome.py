"""Token Merging: neighbours in the sequence are split into two halves, and the most similar pairs become one token.

Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3; and a baseline that picks at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vistok.merging.matching import Matching, directions, match, positions, take
from vistok.rng import seeded_generator


@dataclass(frozen=True)
class ToMe:
    """Even positions may join odd ones; the ``r`` pairs of the largest cosine do.

    Args:
        in_order: without a prefix, sort the tokens of even positions that stay. The published code leaves them in
            order of similarity, so that near-ties decide who meets whom in the next layer; with a class token it sorts.
    """

    in_order: bool = True

    def match(self, metric: Float[Tensor, "B N d"], r: int, prefix: int, layer: int, depth: int) -> Matching:
        """See :class:`~vistok.merging.vit.Method`."""
        batch, tokens, _ = metric.shape
        unit = directions(metric)
        even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
        a, b = (positions(batch, start, tokens, 2, metric.device) for start in (even, odd))
        stay = positions(batch, 0, prefix, device=metric.device)
        return match(a, b, unit[:, even::2] @ unit[:, odd::2].mT, r, stay, self.in_order or prefix > 0)


@dataclass(frozen=True)
class Random:
    """``r`` tokens picked at random join the most similar of the others: what a matching is worth is the difference.

    The tokens depend on seed, layer and length alone, so that an image is the same in every batch.

    Args:
        seed: of the picks.
    """

    seed: int = 0

    def match(self, metric: Float[Tensor, "B N d"], r: int, prefix: int, layer: int, depth: int) -> Matching:
        """See :class:`~vistok.merging.vit.Method`."""
        batch, tokens, _ = metric.shape
        generator = seeded_generator("merging", self.seed, layer, tokens)
        order = prefix + torch.randperm(tokens - prefix, generator=generator).to(metric.device)
        a, b = (part.sort().values.expand(batch, -1) for part in (order[:r], order[r:]))
        unit = directions(metric)
        stay = positions(batch, 0, prefix, device=metric.device)
        return match(a, b, take(unit, a) @ take(unit, b).mT, r, stay)
