"""Randomness that is passed in: one stream per sample for inference, one generator per update for training.

A sample must not change when its neighbours in the batch do, and a resumed or distributed run must see the draws
of an uninterrupted one. Both follow from deriving every stream from (seed, index) instead of keeping a state.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all ``parts`` and on nothing else (stable across processes and versions)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` seeded by :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


class SampleRng:
    """Independent random streams, one for each sample of a batch.

    Draws are made on the CPU, so that a seed names the same image on every device.

    Args:
        seeds: one seed for each sample.
    """

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = list(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    @classmethod
    def from_seed(cls, seed: int, count: int, start: int = 0) -> SampleRng:
        """Streams of the samples ``start .. start + count - 1`` of the run named by ``seed``."""
        return cls([derive_seed("sample", seed, start + index) for index in range(count)])

    def __len__(self) -> int:
        return len(self.seeds)

    def normal(self, *shape: int) -> Float[Tensor, B * shape]:
        """Standard normal noise, float32 on the CPU."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def uniform(self, *shape: int) -> Float[Tensor, B * shape]:
        """Uniform draws in [0, 1), float32 on the CPU."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self._generators])
