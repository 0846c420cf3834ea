"""How much of a text is read: the one place that cuts, or refuses, what is longer than an encoder's ``max_length``.

The ``Config`` of every text encoder inherits :class:`LengthConfig`; the encoder makes a :class:`Limit` of it, cuts its
texts itself (only it knows what must end them) and tells :meth:`Limit.exceeded_by` which ones it cut.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from vistok.errors import UserError


@dataclass
class LengthConfig:
    """How much of a text an encoder reads.

    Args:
        max_length: tokens, with those that begin and end a text.
        on_long: ``cut`` off what a text has more, with a warning, or ``refuse`` the text.
    """

    max_length: int = 128
    on_long: Literal["cut", "refuse"] = "cut"


class Limit:
    """Applies a :class:`LengthConfig` and counts.

    Args:
        name: of the encoder, for messages.
        config: the limit.

    Raises:
        UserError: if ``max_length`` leaves no room for a word beside the end of the text.
    """

    def __init__(self, name: str, config: LengthConfig) -> None:
        if config.max_length < 2:
            raise UserError(f"{name}: max_length must be at least 2, got {config.max_length}")
        self.name, self.max_length, self.on_long = name, config.max_length, config.on_long
        self.num_texts = self.num_long = 0

    def exceeded_by(self, long: list[str], texts: list[str]) -> None:
        """Warn of the ``long`` ones among ``texts``.

        A line for the 1st, 10th, 100th ... text that loses words: training reads texts without end.

        Raises:
            UserError: if there is one and ``on_long`` is ``refuse``.
        """
        known = self.num_long
        self.num_texts, self.num_long = self.num_texts + len(texts), known + len(long)
        if not long:
            return
        such = f"such as {shorten(long[0], 60)!r}"
        if self.on_long == "refuse":
            raise UserError(
                f"{self.name}: {len(long)} of {len(texts)} texts longer than max_length={self.max_length} tokens, "
                f"{such} (on_long=cut cuts them)"
            )
        if not known or len(str(self.num_long)) > len(str(known)):
            warnings.warn(
                f"{self.name}: cut {self.num_long} of {self.num_texts} texts after max_length={self.max_length} "
                f"tokens, {such}",
                stacklevel=3,
            )
