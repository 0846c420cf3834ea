"""The numbers that every transformer of codes has, and which of them no model can have."""

from __future__ import annotations

from typing import Any

from vistok.errors import UserError


def check_ranges(where: str, config: Any, *sizes: str, per_head: int = 1) -> None:
    """Check ``width``, ``depth``, ``heads``, further ``sizes``, and the shares that are dropped.

    Args:
        where: begins the messages.
        config: of a generator or of a head.
        sizes: names of more numbers that are at least 1.
        per_head: what the channels of a head must be a multiple of.

    Raises:
        UserError: for a number that no model can have.
    """
    for name in ("width", "depth", "heads", *sizes):
        if getattr(config, name) < 1:
            raise UserError(f"{where}: {name} must be at least 1, got {getattr(config, name)}")
    if config.width % (config.heads * per_head):
        multiple = f"a multiple of {config.heads * per_head} for its {config.heads} heads"
        raise UserError(f"{where}: width must be {multiple}, got {config.width}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"{where}: dropout must lie in [0, 1), got {config.dropout}")
    if not 0 <= getattr(config, "condition_dropout", 0) <= 1:
        raise UserError(f"{where}: condition_dropout must lie in [0, 1], got {config.condition_dropout}")
