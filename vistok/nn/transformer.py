"""The transformer block of every model here: pre-norm attention and SwiGLU, optionally modulated by adaLN-zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.nn.attention import Attention, KVCache
from vistok.nn.modulation import AdaLN, modulate
from vistok.nn.rope import Rotation


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)`` without biases (Shazeer 2020), gate and up from one projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    With ``condition_dim`` both sublayers are modulated: ``x + gate * f(norm(x) * (1 + scale) + shift)``.

    Args:
        width: channels.
        heads: attention heads.
        hidden: hidden channels of the MLP.
        norm: makes a normalisation layer for a width.
        qk_norm: see :class:`Attention`.
        scale: see :class:`Attention`.
        dropout: on the output of both sublayers.
        condition_dim: channels of the modulating condition; None for a plain block.
        segments: see :class:`AdaLN`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm: Callable[[int], nn.Module],
        qk_norm: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        condition_dim: int | None = None,
        segments: int = 1,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = Attention(width, heads, qk_norm, scale)
        self.mlp_norm = norm(width)
        self.mlp = SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.modulation = None if condition_dim is None else AdaLN(condition_dim, width, 6, segments)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "N N"] | None = None,
        causal: bool = False,
        rope: Rotation | None = None,
        cache: tuple[KVCache, int] | None = None,
        condition: Float[Tensor, "B C"] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Arguments as in :meth:`Attention.forward` and :meth:`AdaLN.forward`."""
        if self.modulation is None:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask, causal, rope, cache))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = self.modulation(condition, lengths)
        y = modulate(self.attention_norm(x), shift_a, scale_a)
        x = x + gate_a * self.dropout(self.attention(y, mask, causal, rope, cache))
        y = modulate(self.mlp_norm(x), shift_m, scale_m)
        return x + gate_m * self.dropout(self.mlp(y))
