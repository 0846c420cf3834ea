"""The two sublayers of a transformer block, of ours or of someone else's model, found by what the block can do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vistok.errors import UserError, first_line
from vistok.rng import seeded_generator


class _Names(NamedTuple):
    """Where a library keeps the parts of a block.

    Args:
        norms: of the two sublayers.
        attention: the first sublayer.
        keys: the module in the attention that gives its keys.
        mask: argument of block and attention.
        may_mask: whether the blocks may be called with one, which then treats all patches alike.
    """

    norms: tuple[str, str]
    attention: str
    keys: str
    mask: str
    may_mask: bool = False


_LIBRARIES = (
    _Names(("norm1", "norm2"), "attn", "k_norm", "attn_mask"),  # timm
    _Names(("layer_norm1", "layer_norm2"), "self_attn", "k_proj", "attention_mask"),  # transformers
    _Names(("attention_norm", "mlp_norm"), "attention", "k_norm", "mask", may_mask=True),  # vistok.nn.transformer
)


class Sublayers:
    """``attend``, then ``feed``, is what the block computes; between the two its tokens can merge.

    The constructor runs both and compares with the block itself, and makes sure that a token of size 2 stands for two
    equal tokens. So a block that has another structure, adds positions to its attention or ignores the mask is found.

    Args:
        block: with attention and MLP one after the other, norms before or after them, and whatever of LayerScale,
            stochastic depth, normalised queries and keys, gates.
        name: what messages call it.

    Raises:
        UserError: a block that cannot merge, and why.
    """

    def __init__(self, block: Any, name: str) -> None:
        self.block, self.name = block, name
        found = [names for names in _LIBRARIES if hasattr(block, names.attention)]
        if not found:
            raise self._refusal(f"it has none of {', '.join(names.attention for names in _LIBRARIES)}")
        self._names = found[0]
        self._attention = getattr(block, self._names.attention)
        missing = [part for part in (*self._names.norms, "mlp") if not hasattr(block, part)]
        if missing or not hasattr(self._attention, self._names.keys):
            part = missing[0] if missing else f"{self._names.attention}.{self._names.keys}"
            raise self._refusal(f"it has no {part}")
        # Of its class: one that recomputes its insides in the backward pass hides them.
        self._parameters = list(inspect.signature(type(block).forward).parameters)[2:]
        self._keys: Tensor | None = None
        self._norm_first = True
        self._check()

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`attend` is called with, from the arguments of the block behind its tokens.

        Raises:
            UserError: a mask that the tokens of a merged sequence do not fit.
        """
        given = dict(zip(self._parameters, args)) | kwargs
        mask = given.pop(self._names.mask, None)
        causal = [given.pop(name, False) for name in ("causal", "is_causal")]
        if any(causal) or (mask is not None and not self._names.may_mask):
            raise UserError(f"{self.name}: attention masks do not go together with token merging")
        return given | {"mask": mask}

    def attend(
        self,
        x: Float[Tensor, "B M C"],
        size: Float[Tensor, "B M"] | None,
        mask: Bool[Tensor, "N N"] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "B M C"]:
        """``x + attention(norm(x))``.

        Args:
            x: tokens.
            size: a token counts as that many (proportional attention).
            mask: True where a query may look at a key, of the sequence before merges. It begins with the patches, which
                are alike, so that the one of the merged sequence is its end.
            kwargs: of the attention.
        """
        if mask is not None:
            mask = mask[..., -x.shape[1] :, -x.shape[1] :]
        if size is not None:
            weight = size.log().to(x.dtype)[:, None, None]
            mask = weight if mask is None else torch.where(mask, weight, -torch.inf)
        return self._add(x, 0, lambda y: self._attention(y, **{self._names.mask: mask}, **kwargs))

    def feed(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """``x + mlp(norm(x))``."""
        return self._add(x, 1, self.block.mlp)

    def take_keys(self) -> Float[Tensor, "B heads N d"]:
        """The keys of the last :meth:`attend`, before any rotation; they are let go of."""
        keys, self._keys = self._keys, None
        assert keys is not None, "watch_keys has not been called"
        return keys if keys.ndim == 4 else keys.unflatten(-1, (-1, self._attention.head_dim)).transpose(1, 2)

    def watch_keys(self) -> RemovableHandle:
        """Let every pass leave its keys for :meth:`take_keys`."""
        return getattr(self._attention, self._names.keys).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keys = output.detach()

    def _add(self, x: Tensor, index: int, sublayer: Any) -> Tensor:
        norm = getattr(self.block, self._names.norms[index])
        y = sublayer(norm(x) if self._norm_first else x)
        y = y[0] if isinstance(y, tuple) else y  # attention of transformers returns its weights too
        y = y if self._norm_first else norm(y)
        if (layer_scale := getattr(self.block, f"ls{index + 1}", None)) is not None:
            y = layer_scale(y)
        if (gamma := getattr(self.block, f"gamma_{index + 1}", None)) is not None:
            y = gamma * y
        if (dropout := getattr(self.block, "dropout", None)) is not None:
            y = dropout(y)
        if (drop_path := getattr(self.block, f"drop_path{index + 1}", None)) is not None:
            y = drop_path(y)
        return x + y

    @torch.no_grad()
    def _check(self) -> None:
        weight = next(self.block.mlp.parameters())
        width = weight.shape[-1]
        # Seven tokens: no grid, and no number that a table of positions could have been made for.
        draws = torch.randn(2, 7, width, generator=seeded_generator("merging"))
        x = draws.to(weight.device, weight.dtype)
        with _evaluating(self.block):
            try:
                expected = self.block(x, **{self._names.mask: None})
                for self._norm_first in (True, False):
                    if _same(self.feed(self.attend(x, None)), expected, x):
                        break
                else:
                    raise self._refusal("it is not attention and MLP, one after the other, with a norm for each")
                size = torch.ones(x.shape[:2], device=x.device)
                size[:, -1] = 2
                twice = self.attend(torch.cat([x, x[:, -1:]], dim=1), None)[:, :-1]
                if not _same(self.attend(x, size), twice, x):
                    raise self._refusal("in its attention, a token of size 2 does not act as two equal tokens")
            except (TypeError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
                raise self._refusal(f"it does not run on a sequence of seven tokens: {first_line(error)}") from error

    def _refusal(self, why: str) -> UserError:
        return UserError(f"cannot merge tokens in {self.name} ({type(self.block).__name__}): {why}")


def _same(ours: Tensor, theirs: Tensor, x: Tensor) -> bool:
    """Whether two ways of updating ``x`` agree up to rounding."""
    eps = torch.finfo(x.dtype).eps
    bound = math.sqrt(eps) * (theirs - x).abs().max() + 4 * eps * theirs.abs().max()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= bound)


@contextmanager
def _evaluating(block: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
