"""Multi-head self-attention and its key-value cache."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.nn.rope import Rotation, rotate


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

    def extend(
        self, layer: int, keys: Float[Tensor, "B heads n d"], values: Float[Tensor, "B heads n d"]
    ) -> tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]]:
        """Store the new positions of ``layer`` and return all of them; :meth:`advance` makes them past."""
        store = self._store[layer]
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
    """Self-attention without biases, queries, keys and values from one projection.

    Args:
        width: channels in and out.
        heads: attention heads.
        qk_norm: normalise queries and keys over the channels of a head (LayerNorm without affine).
        scale: factor on the logits; None means ``1 / sqrt(head_dim)``.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, scale: float | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.heads, self.head_dim, self.scale = heads, width // heads, scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        norm = nn.LayerNorm(self.head_dim, eps=1e-5, elementwise_affine=False) if qk_norm else nn.Identity()
        self.qk_norm = norm

    def forward(
        self,
        x: Float[Tensor, "B n D"],
        mask: Bool[Tensor, "n N"] | None = None,
        causal: bool = False,
        rope: Rotation | None = None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Attend to the ``n`` given positions and, with a cache, to those before them.

        Args:
            x: input.
            mask: True where a query may look at a key.
            causal: hide later positions; only for sequences that start at position 0.
            rope: angles of the given positions.
            cache: the cache and the index of this layer in it.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.qk_norm(q), self.qk_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            store, layer = cache
            k, v = store.extend(layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))
