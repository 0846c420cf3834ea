"""How many tokens each block merges away: constant, linear, listed, or a share of what is there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from vistok.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Merges per block, for every method alike: give ``r`` or ``ratio``.

    Args:
        r: merges in every block, or a list of them from the first block on (blocks behind its end merge nothing).
        ratio: share of the patches that every block keeps, in (0, 1].
        inflection: with one ``r``, lets it change linearly over depth at the same sum: -1 starts at ``2r`` and ends at
            0, +1 the other way round.

    Raises:
        UserError: neither or both of ``r`` and ``ratio``, or a value out of its range.
    """

    r: int | Sequence[int] | None = None
    ratio: float | None = None
    inflection: float = 0.0

    def __post_init__(self) -> None:
        if (self.r is None) == (self.ratio is None):
            raise UserError("token merging takes either r (merges per block) or ratio (share of the patches to keep)")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UserError(f"ratio must lie in (0, 1], got {self.ratio}")
        if any(count < 0 for count in self._listed):
            raise UserError(f"r must not be negative, got {self.r}")
        if not -1 <= self.inflection <= 1:
            raise UserError(f"inflection must lie in [-1, 1], got {self.inflection}")
        if self.inflection and not isinstance(self.r, int):
            raise UserError("inflection bends one r for all blocks: it goes with no list and no ratio")

    @property
    def _listed(self) -> list[int]:
        return [] if self.r is None else [self.r] if isinstance(self.r, int) else list(self.r)

    def asked(self, depth: int) -> list[int]:
        """Merges asked of each of ``depth`` blocks by ``r``, whatever the number of tokens.

        Raises:
            UserError: a list longer than the model is deep.
        """
        if len(self._listed) > depth:
            raise UserError(f"r lists {len(self._listed)} blocks, the model has {depth}")
        if not isinstance(self.r, int):
            return self._listed + [0] * (depth - len(self._listed))
        if depth == 1:
            return [self.r]
        first = int(self.r * (1 - self.inflection))
        step = (2 * self.r - 2 * first) / (depth - 1)
        return [int(first + step * layer) for layer in range(depth)]

    def merges(self, depth: int, patches: int) -> list[int]:
        """Merges in each of ``depth`` blocks, starting from ``patches`` tokens that may merge.

        A block can merge half of its patches at most; more is cut down to that, with a warning.
        """
        asked, counts, left = self.asked(depth), [], patches
        for layer in range(depth):
            # 1e-9: the product of a share and a whole number may fall just short of the whole number that it is.
            wish = asked[layer] if self.ratio is None else math.floor(left - left * self.ratio + 1e-9)
            counts.append(min(wish, left // 2))
            left -= counts[-1]
            asked[layer] = wish
        if short := [layer for layer in range(depth) if counts[layer] < asked[layer]]:
            layer = short[0]
            warnings.warn(
                f"block {layer} was asked to merge {asked[layer]} tokens and can merge {counts[layer]}: from there on "
                f"blocks merge at most half of their patches ({left} of {patches} are left in the end)",
                stacklevel=2,
            )
        return counts
