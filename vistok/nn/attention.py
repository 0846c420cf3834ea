"""Multi-head self-attention with its key-value cache, and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok.nn.rope import Rotation, rotate


def training_attention(device: torch.device) -> AbstractContextManager:
    """Kernels for a pass with gradients: plain products on a CPU, whose flash kernel is slow backwards.

    Measured on one core with the 64 codes of ``configs/shapes/gpt_text.yaml`` (bfloat16): 1.5 times the updates.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


Context = tuple[Float[Tensor, "B heads L d"], Float[Tensor, "B heads L d"], Bool[Tensor, "B 1 1 L"]]
"""What a :class:`CrossAttention` looks at: keys, values, and True where there are any."""


class KVCache:
    """Keys and values of the positions already seen, for all layers of a transformer.

    Memory is taken once a layer, at its first positions, in the type that they have; attention reads only the filled
    part. The batch may shrink to its first rows.

    Args:
        num_layers: transformer blocks.
        capacity: most positions that will be stored.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._store: list[Tensor | None] = [None] * num_layers
        self.length = 0
        self._is_glance = False
        self._position: Tensor | None = None

    def glance(self) -> KVCache:
        """The same past for one pass whose own positions are forgotten; what is stored stays as it is."""
        other = copy(self)
        other._is_glance = True
        return other

    def fixed(self) -> KVCache:
        """The same past for passes of one position, all of one shape, as a compiled pass needs them.

        Attention reads the whole memory, so it needs the mask of :func:`ordered_mask`; the position is a tensor.
        """
        other = copy(self)
        stores = [store for store in self._store if store is not None]
        for store in stores:
            torch._dynamo.mark_static_address(store, guard=False)  # or CUDA graphs would copy it in every pass
        other._position = torch.tensor([self.length], device=stores[0].device)
        return other

    def place(self, count: int) -> slice | Int[Tensor, " 1"]:
        """Where the next ``count`` positions stand."""
        return slice(self.length, self.length + count) if self._position is None else self._position

    def extend(
        self, layer: int, keys: Float[Tensor, "B heads n d"], values: Float[Tensor, "B heads n d"]
    ) -> tuple[Float[Tensor, "B heads N d"], Float[Tensor, "B heads N d"]]:
        """Store the new positions of ``layer`` and return all of them; :meth:`advance` makes them past."""
        store = self._store[layer]
        if store is None:
            batch, heads, _, head_dim = keys.shape
            # Zeros, because a fixed cache reads what it has not written, and a masked NaN is a NaN.
            store = self._store[layer] = keys.new_zeros(2, batch, heads, self.capacity, head_dim)
        all_keys, all_values = store[0, : len(keys)], store[1, : len(keys)]
        if self._position is not None:
            all_keys.index_copy_(2, self._position, keys)
            all_values.index_copy_(2, self._position, values)
            return all_keys, all_values
        past, end = self.length, self.length + keys.shape[2]
        if self._is_glance:
            return torch.cat([all_keys[:, :, :past], keys], 2), torch.cat([all_values[:, :, :past], values], 2)
        all_keys[:, :, past:end] = keys
        all_values[:, :, past:end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def advance(self, count: int) -> None:
        """Call once all layers have stored ``count`` new positions."""
        self.length += count
        if self._position is not None:
            self._position += count


def ordered_mask(
    step: Int[Tensor, " N"], here: slice | Int[Tensor, " n"], there: Bool[Tensor, "B P"] | None = None
) -> Bool[Tensor, "n N"] | Bool[Tensor, "B 1 n N"]:
    """Whether the positions ``here`` of a sequence may look at those up to the last of them.

    Args:
        step: when each position comes; it sees those that come no later.
        here: positions that look; given one by one, they may look at the whole sequence.
        there: False at positions of the beginning that are nothing: each of them is seen by itself alone.
    """
    step = step[: here.stop] if isinstance(here, slice) else step
    mask = step[here, None] >= step
    if there is None:
        return mask
    there = F.pad(there, (0, len(step) - there.shape[1]), value=True)[:, None, None]
    itself = torch.arange(len(step), device=step.device)
    return mask & there | (itself[here, None] == itself)


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
        """Attend to ``context``, which has something to look at in every row, and may have rows behind those of x."""
        k, v, mask = (part[: len(x)] for part in context)
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))
