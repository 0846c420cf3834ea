"""The transformer block of every model here: pre-norm attention and MLP, optionally with adaLN-zero or a context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.errors import UserError
from vistok.nn.attention import Attention, Context, CrossAttention, KVCache
from vistok.nn.modulation import AdaLN, Lengths, add_gated, modulate
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


class MLP(nn.Module):
    """``down(dropout(gelu(up x)))`` with biases, as in vision transformers.

    Args:
        width: channels in.
        hidden: hidden channels.
        dropout: on the hidden channels.
        out: channels out; None for ``width``.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, out: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width if out is None else out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N C"]:
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    With ``norm_after`` the norms act on what the sublayers return: ``x + norm(attention(x))``. With ``condition_dim``
    both sublayers are modulated: ``x + gate * f(norm(x) * (1 + scale) + shift)``.

    Args:
        width: channels.
        heads: attention heads.
        hidden: hidden channels of the MLP.
        norm: makes a normalisation layer for a width.
        qk_norm: normalise queries and keys too, with layers of their own: such ones, or those that it makes.
        scale: see :class:`Attention`.
        dropout: on the output of both sublayers.
        condition_dim: channels of the modulating condition; None for a plain block.
        segments: see :class:`AdaLN`.
        cross: a plain block's third sublayer between the two, ``x + cross_attention(norm(x), context)``.
        mlp: makes the MLP for a width and its hidden channels.
        bias: of the attention's projections.
        attention_dropout: on the attention weights.
        norm_after: of a plain block, normalise outputs of the sublayers in place of their inputs.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm: Callable[[int], nn.Module],
        qk_norm: bool | Callable[[int], nn.Module] = False,
        scale: float | None = None,
        dropout: float = 0.0,
        condition_dim: int | None = None,
        segments: int = 1,
        cross: bool = False,
        mlp: Callable[[int, int], nn.Module] = SwiGLU,
        bias: bool = False,
        attention_dropout: float = 0.0,
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        self.norm_after = norm_after
        self.attention_norm = norm(width)
        qk = norm if qk_norm is True else qk_norm or None
        self.attention = Attention(width, heads, qk, scale, bias, attention_dropout)
        if cross:
            self.cross_norm = norm(width)
            self.cross_attention = CrossAttention(width, heads)
        self.mlp_norm = norm(width)
        self.mlp = mlp(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.modulation = None if condition_dim is None else AdaLN(condition_dim, width, 6, segments)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "n N"] | Bool[Tensor, "B 1 n N"] | None = None,
        causal: bool = False,
        rope: Rotation | None = None,
        cache: tuple[KVCache, int] | None = None,
        condition: Float[Tensor, "B C"] | Float[Tensor, "B N C"] | None = None,
        lengths: Lengths = None,
        context: Context | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Arguments as in :meth:`Attention.forward`, :func:`modulate` and :meth:`CrossAttention.forward`."""
        if self.modulation is None:
            x = self._add(x, lambda y: self.attention(y, mask, causal, rope, cache), self.attention_norm)
            if context is not None:
                x = self._add(x, lambda y: self.cross_attention(y, context), self.cross_norm)
            return self._add(x, self.mlp, self.mlp_norm)
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = self.modulation(condition)
        y = modulate(self.attention_norm(x), shift_a, scale_a, lengths)
        x = add_gated(x, self.dropout(self.attention(y, mask, causal, rope, cache)), gate_a, lengths)
        y = modulate(self.mlp_norm(x), shift_m, scale_m, lengths)
        return add_gated(x, self.dropout(self.mlp(y)), gate_m, lengths)

    def _add(
        self, x: Float[Tensor, "B N D"], sublayer: Callable[[Tensor], Tensor], norm: nn.Module
    ) -> Float[Tensor, "B N D"]:
        return x + self.dropout(norm(sublayer(x)) if self.norm_after else sublayer(norm(x)))


def matrix_flops(positions: int, *layers: nn.Module) -> int:
    """Operations of a forward and backward pass of ``positions`` through the linear layers in ``layers``."""
    modules = [module for layer in layers for module in layer.modules()]
    return 6 * positions * sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear))


def attention_flops(positions: int, width: int, depth: int) -> int:
    """The same of ``depth`` attentions of ``positions`` to one another; a causal mask, which hides half, saves none."""
    return 12 * positions**2 * width * depth


def recompute_blocks(net: nn.Module) -> None:
    """Let every :class:`Block` in ``net`` forget its insides and compute them again in the backward pass, in place.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). Gradients stay the same, dropout
    included, and so do the names of parameters.

    Raises:
        UserError: if there is no block.
    """
    blocks = [module for module in net.modules() if isinstance(module, Block)]
    if not blocks:
        raise UserError(f"activation_checkpointing is for transformer blocks, and {type(net).__name__} has none")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
