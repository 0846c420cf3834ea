"""Multi-head self-attention with its key-value cache, and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.nn.rope import Rotation, rotate

Context = tuple[Float[Tensor, "B heads L d"], Float[Tensor, "B heads L d"], Bool[Tensor, "B 1 1 L"]]
"""What a :class:`CrossAttention` looks at: keys, values, and True where there are any."""


class KVCache:
    """Keys and values of the positions already seen, for all layers of a transformer.

    Memory is taken once a layer, at its first positions; attention reads only the filled part.

    Args:
        num_layers: transformer blocks.
        capacity: most positions that will be stored.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._store: list[Tensor | None] = [None] * num_layers
        self.length = 0
        self._is_glance = False

    def glance(self) -> KVCache:
        """The same past for one pass whose own positions are forgotten; what is stored stays as it is."""
        other = copy(self)
        other._is_glance = True
        return other

    def extend(
        self, layer: int, keys: Float[Tensor, "B heads n d"], values: Float[Tensor, "B heads n d"]
    ) -> tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]]:
        """Store the new positions of ``layer`` and return all of them; :meth:`advance` makes them past."""
        store = self._store[layer]
        if self._is_glance:
            assert store is not None, "there is no past to look back at"
            past = store[:, :, :, : self.length]
            return torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        if store is None:
            batch, heads, _, head_dim = keys.shape
            store = self._store[layer] = keys.new_empty(2, batch, heads, self.capacity, head_dim)
        end = self.length + keys.shape[2]
        store[0, :, :, self.length : end] = keys
        store[1, :, :, self.length : end] = values
        return store[0, :, :, :end], store[1, :, :, :end]

    def advance(self, count: int) -> None:
        """Call once all layers have stored ``count`` new positions."""
        self.length += count


class Attention(nn.Module):
    """Self-attention, queries, keys and values from one projection.

    Args:
        width: channels in and out.
        heads: attention heads.
        qk_norm: makes a normalisation of the queries, and one of the keys, over the channels of a head.
        scale: factor on the logits; None means ``1 / sqrt(head_dim)``.
        bias: of both projections.
        dropout: on the attention weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: Callable[[int], nn.Module] | None = None,
        scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.head_dim, self.scale, self.dropout = heads, width // heads, scale, dropout
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.q_norm, self.k_norm = (qk_norm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "B n D"],
        mask: Bool[Tensor, "n N"] | Bool[Tensor, "B 1 n N"] | Float[Tensor, "B 1 1 N"] | None = None,
        causal: bool = False,
        rope: Rotation | None = None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Attend to the ``n`` given positions and, with a cache, to those before them.

        Args:
            x: input.
            mask: True where a query may look at a key, or what to add to its logit.
            causal: hide later positions; only for sequences that start at position 0.
            rope: angles of the given positions.
            cache: the cache and the index of this layer in it.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            store, layer = cache
            k, v = store.extend(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of a sequence to another one, without biases and positions.

    Args:
        width: channels of both sequences.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def context(self, states: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Context:
        """Keys and values of ``states``: the same for all queries, so computed once for a whole generation."""
        k, v = self.kv(states).unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return k, v, mask[:, None, None]

    def forward(self, x: Float[Tensor, "B n D"], context: Context) -> Float[Tensor, "B n D"]:
        """Attend to ``context``, which has something to look at in every row."""
        k, v, mask = context
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))
