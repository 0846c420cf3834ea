"""Conditioning on a vector: timestep embedding and adaLN-zero (DiT, Peebles & Xie 2023, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """Sinusoids of a time in [0, 1], then two linear layers.

    Args:
        width: channels of the result.
        size: number of sinusoids, cosines first.
        base: ratio of the highest to the lowest frequency.
        max_timestep: the time that 1000 phase units stand for; 1 for times in [0, 1].
    """

    frequencies: Tensor

    def __init__(self, width: int, size: int = 256, base: float = 256.0, max_timestep: float = 1.0) -> None:
        super().__init__()
        half = size // 2
        frequencies = 1000.0 / max_timestep * torch.exp(-math.log(base) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embedding of ``time``; the phases are float32 under any autocast (they reach hundreds of radians)."""
        phases = time.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([phases.cos(), phases.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class AdaLN(nn.Module):
    """Shifts, scales and gates of a condition, zero at initialisation.

    Args:
        condition_dim: channels of the condition.
        width: channels to modulate.
        chunks: vectors for each segment (6 for a block, 2 for a head).
        segments: parts of the sequence with vectors of their own.
    """

    def __init__(self, condition_dim: int, width: int, chunks: int, segments: int = 1) -> None:
        super().__init__()
        self.shape = (segments, chunks * width)
        self.chunks = chunks
        self.linear = nn.Linear(condition_dim, segments * chunks * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, so that a modulated block starts as the identity."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Float[Tensor, "B C"] | Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B S D"], ...]:
        """``chunks`` vectors for each of the S segments, or for each of N positions with a condition of their own."""
        vectors = self.linear(nn.functional.silu(condition)).unflatten(-1, self.shape).flatten(1, -2)
        return vectors.chunk(self.chunks, dim=-1)


Lengths = Sequence[int] | None
"""Positions of each segment of a sequence; None for a sequence that is one segment."""


def modulate(
    x: Float[Tensor, "B N D"], shift: Float[Tensor, "B S D"], scale: Float[Tensor, "B S D"], lengths: Lengths = None
) -> Float[Tensor, "B N D"]:
    """``x * (1 + scale) + shift`` with the vectors of each position's segment."""
    return _by_segment(lambda x, shift, scale: torch.addcmul(shift, x, 1 + scale), lengths, (x,), (shift, scale))


def add_gated(
    x: Float[Tensor, "B N D"], y: Float[Tensor, "B N D"], gate: Float[Tensor, "B S D"], lengths: Lengths = None
) -> Float[Tensor, "B N D"]:
    """``x + gate * y`` with the gate of each position's segment."""
    return _by_segment(torch.addcmul, lengths, (x, y), (gate,))


def _by_segment(
    function: Callable[..., Tensor], lengths: Lengths, sequences: tuple[Tensor, ...], vectors: tuple[Tensor, ...]
) -> Tensor:
    """``function`` on each segment: repeating the vectors for every position would hold 6 D floats a position and
    block for the backward pass, more than the block itself."""
    if lengths is None:
        return function(*sequences, *vectors)
    cut = [sequence.split(list(lengths), dim=1) for sequence in sequences] + [
        vector.split(1, dim=1) for vector in vectors
    ]
    return torch.cat([function(*parts) for parts in zip(*cut, strict=True)], dim=1)
