"""PiToMe: tokens in crowded regions of the key space merge, lonely ones are protected.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging" (arXiv 2405.16148), section 3. The
energy of a token is its mean similarity to all tokens, bent below a margin that falls with depth; high energy means
crowded. Paper and published code differ in the energy, the margin and the matching: see :class:`PiToMe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.merging.matching import Matching, directions, match, positions, take

Form = Literal["elu", "paper", "gauss"]
Partition = Literal["ordered", "bsm", "bsm_first", "bsm_last", "halves"]

_ROWS = 144
"""Rows of the similarity matrix at a time: small enough to stay in a core's cache."""


@dataclass(frozen=True)
class PiToMe:
    """Energy decides who may merge.

    Args:
        margin: at the first layer; at layer i of L it is ``margin * (1 - i / L)``.
        form: of the energy, see :func:`energy`. The paper's equation 4 jumps by the margin where the code's is smooth.
        partition: ``ordered`` (paper): the ``2r`` tokens of the highest energy alternate between the halves, and the
            first half joins the second. ``bsm``: all tokens alternate by energy, the ``r`` most similar pairs merge.
            ``bsm_first`` and ``bsm_last``: ``bsm`` in that half of the layers, ``ordered`` in the other. ``halves``
            (published for text): the ``r`` tokens of the highest energy join the ``r`` next ones.
        alpha: see :func:`energy`.
    """

    margin: float = 0.9
    form: Form = "paper"
    partition: Partition = "ordered"
    alpha: float = 1.0

    def match(self, metric: Float[Tensor, "B N d"], r: int, prefix: int, layer: int, depth: int) -> Matching:
        """See :class:`~vistok.merging.vit.Method`."""
        batch, tokens, _ = metric.shape
        unit = directions(metric)
        scores = energy(unit[:, prefix:], self.margin * (1 - layer / depth), self.form, self.alpha)
        order = prefix + scores.argsort(dim=-1, descending=True)
        crowd = tokens - prefix if self._bsm(layer, depth) else 2 * r
        crowded, protected = order[:, :crowd], order[:, crowd:]
        halves = self.partition == "halves"
        a, b = (crowded[:, :r], crowded[:, r:]) if halves else (crowded[:, ::2], crowded[:, 1::2])
        stay = torch.cat([positions(batch, 0, prefix, device=metric.device), protected], dim=1)
        return match(a, b, take(unit, a) @ take(unit, b).mT, r, stay, in_order=False)

    def _bsm(self, layer: int, depth: int) -> bool:
        half = math.ceil(depth / 2)
        return {"bsm": True, "bsm_first": layer < half, "bsm_last": layer >= half}.get(self.partition, False)


def energy(unit: Float[Tensor, "B N d"], margin: float, form: Form, alpha: float = 1.0) -> Float[Tensor, "B N"]:
    """The mean over all tokens (itself included) of a function of their cosine.

    Args:
        unit: directions of the tokens.
        margin: cosine at which two tokens count as alike.
        form: the function of cosine s and margin m. ``elu``: ``s - m``, below the margin ``alpha (exp(s - m) - 1)``;
            ``paper``: ``s`` in place of ``s - m``; ``gauss`` (the published text models): the normal density of
            ``1 - s`` of standard deviation ``1 - m``.
        alpha: how far ``elu`` and ``paper`` fall below 0.
    """
    batch, tokens, _ = unit.shape
    total = unit.new_zeros(batch, tokens)
    # The matrix is symmetric: rows from the diagonal on are enough, their columns serve the later rows.
    for start in range(0, tokens, _ROWS):
        stop = min(start + _ROWS, tokens)
        values = _bend(unit[:, start:stop] @ unit[:, start:].mT, margin, form, alpha)
        total[:, start:stop] += values.sum(dim=2)
        total[:, stop:] += values[:, :, stop - start :].sum(dim=1)
    return total / tokens


def _bend(cosine: Tensor, margin: float, form: Form, alpha: float) -> Tensor:
    if form == "gauss":
        sigma = 1 - margin
        return (-(((1 - cosine) / sigma) ** 2) / 2).exp() / (sigma * math.sqrt(2 * math.pi))
    values = F.elu_(cosine.sub_(margin), alpha)
    if form == "paper":
        values.add_(torch.ge(values, 0, out=torch.empty_like(values)), alpha=margin)
    return values
