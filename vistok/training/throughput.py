"""What share of a device's arithmetic a run makes use of."""

from __future__ import annotations

import re

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Operations per second of a GPU by a part of its name: dense matrix products in 16 bits, as its maker states them."""


def peak_flops(device_name: str) -> float | None:
    """Of the first entry of :data:`PEAK_FLOPS` whose words are in ``device_name``; None for an unknown device."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
