"""Guidance: one convention for every sampler, ``u + scale * (c - u)``."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): 1 is the conditional prediction, 0 the unconditional one."""
    return unconditional + scale * (conditional - unconditional)
