"""Token merging inside the vision transformers of timm and the CLIP and SigLIP towers of transformers.

    with merge_tokens(model, "pitome", ratio=0.925) as merging:
        logits = model(images)
    merging.lengths, merging.size, merging.slots, merging.unmerge(...)

A block ``x + attention(norm(x))``, then ``x + mlp(norm(x))`` merges between the two, on the keys of its attention
(ToMe, arXiv 2210.09461, section 3). No class is swapped and no weight touched: each block runs its own sublayers, and
whether that is what it computes is tried out, see :class:`~vistok.merging.blocks.Sublayers`. What cannot merge is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.errors import UserError
from vistok.merging.blocks import Sublayers
from vistok.merging.matching import Matching, group_means, take
from vistok.merging.pitome import PiToMe
from vistok.merging.schedules import Schedule
from vistok.merging.tome import Random, ToMe


class Method(Protocol):
    """Decides which tokens merge."""

    def match(self, metric: Float[Tensor, "B N d"], r: int, prefix: int, layer: int, depth: int) -> Matching:
        """Choose ``r`` merges.

        Args:
            metric: what similarity is measured on: the keys of a block's attention, mean over heads.
            r: tokens to merge away, at most half of those behind the prefix.
            prefix: leading tokens (class, distillation, registers) that neither move nor merge.
            layer: of the block, from 0.
            depth: number of blocks.
        """
        ...


METHODS: dict[str, Method] = {
    "tome": ToMe(),
    "pitome": PiToMe(),
    "pitome_deit": PiToMe(0.75, "elu", "bsm_first"),
    "pitome_mae": PiToMe(0.75, "elu", "bsm_last"),
    "random": Random(),
}
"""By name: ToMe, PiToMe as its paper says, as its code does for DeiT and for MAE models, and a random baseline."""


def apply(
    model: nn.Module,
    method: str | Method = "tome",
    *,
    r: int | Sequence[int] | None = None,
    ratio: float | None = None,
    inflection: float = 0.0,
    proportional: bool = True,
    unmerge: bool = False,
) -> Merging:
    """Make ``model`` merge tokens until :func:`remove`; a model that already does changes to this setting.

    Its parameters and state dict stay as they are. One model serves one forward pass at a time.

    Args:
        model: a vision transformer of timm, or the CLIP or SigLIP vision tower of transformers (or what contains one
            as ``vision_model``).
        method: one of :data:`METHODS`, or one with settings of its own.
        r: see :class:`~vistok.merging.schedules.Schedule`, as ``ratio`` and ``inflection``.
        ratio: see there.
        inflection: see there.
        proportional: let a token count in attention as often as the patches that it stands for, by the logarithm of
            their number on its logits. Off for models trained without labels (MAE) that were not trained with merging.
        unmerge: blocks hand on a value for every position, so that whatever reads features on the patch grid works
            unchanged. Off, the features are as short as the merges make them, prefix first.

    Raises:
        UserError: a setting out of range, or a model or a block of it that cannot merge.
    """
    schedule = Schedule(r, ratio, inflection)
    if isinstance(method, str) and method not in METHODS:
        raise UserError(f"no merging method {method!r}: choose from {', '.join(METHODS)}")
    remove(model)
    chosen = METHODS[method] if isinstance(method, str) else method
    return Merging(_tower(model), chosen, schedule, proportional, unmerge)


def remove(model: nn.Module) -> None:
    """Undo :func:`apply`: the model computes what it did before, bit for bit."""
    merging = getattr(_tower(model).module, "token_merging", None)
    if merging is not None:
        merging.undo()


@contextmanager
def merge_tokens(model: nn.Module, method: str | Method = "tome", **settings: Any) -> Iterator[Merging]:
    """Merge tokens inside a ``with`` block; arguments as of :func:`apply`."""
    merging = apply(model, method, **settings)
    try:
        yield merging
    finally:
        remove(model)


class _Tower(NamedTuple):
    """What is to know of a model: its blocks, their place in it, and what reads the tokens behind them."""

    module: Any
    blocks: Sequence[nn.Module]
    path: str
    prefix: int
    patches: int
    entries: tuple[str, ...]
    attention_pool: nn.Module | None
    checkpoint_flags: list[tuple[Any, str]]


def _tower(model: Any) -> _Tower:
    module = getattr(model, "vision_model", model)
    for read, parts in _LIBRARIES:
        if hasattr(module, parts[0]):
            if missing := [part for part in parts if not hasattr(module, part)]:
                raise UserError(f"cannot merge tokens of {type(module).__name__}: it has no {missing[0]}")
            return read(module)
    raise UserError(
        f"cannot merge tokens of {type(module).__name__}: it has neither blocks (vision transformers of timm) nor an "
        "encoder (vision towers of transformers)"
    )


def _timm(module: Any) -> _Tower:
    pool = getattr(module, "attn_pool", None)
    if pool is not None and ("attn_mask" not in signature(pool.forward).parameters or pool.pos_embed is not None):
        raise UserError(f"cannot merge tokens of {type(module).__name__}: its attn_pool cannot weigh them by size")
    return _Tower(
        module,
        module.blocks,
        path="blocks",
        prefix=module.num_prefix_tokens,
        patches=module.patch_embed.num_patches,
        entries=("forward_features", "forward_intermediates"),
        attention_pool=pool,
        checkpoint_flags=[(module, "grad_checkpointing")],
    )


def _transformers(module: Any) -> _Tower:
    layers = module.encoder.layers
    return _Tower(
        module,
        layers,
        path="encoder.layers",
        prefix=int(hasattr(module.embeddings, "class_embedding")),
        patches=module.embeddings.num_patches,
        entries=("forward",),
        attention_pool=getattr(getattr(module, "head", None), "attention", None),
        checkpoint_flags=[(layer, "gradient_checkpointing") for layer in layers],
    )


_LIBRARIES: tuple[tuple[Callable[[Any], _Tower], tuple[str, ...]], ...] = (
    (_timm, ("blocks", "num_prefix_tokens", "patch_embed", "forward_features", "forward_intermediates", "pool")),
    (_transformers, ("encoder", "embeddings")),
)
"""How a library's models are read, and what they must have: the first part tells whose a model is."""


class Merging:
    """What a model merges, and what its last forward pass did; :func:`apply` makes it.

    Attributes:
        prefix: leading tokens that never merge.
        merges: tokens merged away by each block in the last pass; before the first one, for images of the model's size.
        size: positions in each token of the last pass; None while nothing has merged.
        slots: the token that each position of the last pass is part of; None while nothing has merged.
    """

    size: Float[Tensor, "B M"] | None
    slots: Int[Tensor, "B N"] | None
    _tokens: Float[Tensor, "B M C"] | None

    def __init__(
        self, tower: _Tower, method: Method, schedule: Schedule, proportional: bool, full_length: bool
    ) -> None:
        self._tower, self._method, self._schedule = tower, method, schedule
        self._proportional, self._full_length = proportional, full_length
        self.prefix = tower.prefix
        self._sublayers = [Sublayers(block, f"{tower.path}.{i}") for i, block in enumerate(tower.blocks)]
        self._plans: dict[int, list[int]] = {}
        self._checkpointing = self._intermediates = False
        self._begin(tower.patches + tower.prefix)
        self._replaced: list[tuple[Any, str, Any]] = []
        self._hooks = [sublayers.watch_keys() for sublayers in self._sublayers]
        for index, block in enumerate(tower.blocks):
            self._replace(block, "forward", partial(self._block, index))
        module = tower.module
        for name in tower.entries:
            self._replace(module, name, partial(self._enter, getattr(module, name), name == "forward_intermediates"))
        if hasattr(module, "pool"):
            self._replace(module, "pool", partial(self._pool, module.pool))
        if tower.attention_pool is not None:
            hook = tower.attention_pool.register_forward_pre_hook(self._weigh_attention_pool, with_kwargs=True)
            self._hooks.append(hook)
        self._replace(module, "token_merging", self)

    @property
    def lengths(self) -> list[int]:
        """Tokens behind each block, prefix included, where :attr:`merges` holds."""
        return [self._length - merged for merged in accumulate(self.merges)]

    def unmerge(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B N C"]:
        """Values of the tokens of the last pass, prefix included, as values of the positions that they stand for."""
        return x if self.slots is None else take(x, self.slots)

    def undo(self) -> None:
        """Give the model back what it had."""
        for hook in self._hooks:
            hook.remove()
        for owner, name, before in reversed(self._replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        # On the instance, in front of the method of its class.
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def _begin(self, length: int) -> None:
        """A new forward pass."""
        if length not in self._plans:
            self._plans[length] = self._schedule.merges(len(self._sublayers), length - self.prefix)
        self.merges, self._length = self._plans[length], length
        self.size = self.slots = self._tokens = None
        self._unmerging = self._full_length or self._intermediates

    def _enter(self, forward: Callable[..., Any], intermediates: bool, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass of the model."""
        # The model would run a block again without what the blocks before it made of size and slots.
        flags = [(owner, name) for owner, name in self._tower.checkpoint_flags if getattr(owner, name, False)]
        self._checkpointing, self._intermediates = bool(flags), intermediates
        for owner, name in flags:
            setattr(owner, name, False)
        try:
            return forward(*args, **kwargs)
        finally:
            self._checkpointing = self._intermediates = False
            for owner, name in flags:
                setattr(owner, name, True)

    def _block(self, index: int, x: Float[Tensor, "B N C"], *args: Any, **kwargs: Any) -> Float[Tensor, "B M C"]:
        """Run a block of the model."""
        arguments = self._sublayers[index].arguments(args, kwargs)
        if index == 0:
            self._begin(x.shape[1])
        elif self._tokens is not None:
            x = self._tokens
        if self.slots is not None and arguments.get("rope") is not None:
            arguments["rope"] = self._merged_rope(arguments["rope"])
        step = partial(self._step, index, arguments)
        if self._checkpointing and torch.is_grad_enabled():
            x, self.size, self.slots = checkpoint(step, x, self.size, self.slots, use_reentrant=False)
        else:
            x, self.size, self.slots = step(x, self.size, self.slots)
        if not self._unmerging:
            return x
        self._tokens = x
        return self.unmerge(x)

    def _step(
        self, index: int, arguments: dict[str, Any], x: Tensor, size: Tensor | None, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        sublayers, merges = self._sublayers[index], self.merges[index]
        x = sublayers.attend(x, size if self._proportional else None, **arguments)
        keys = sublayers.take_keys()
        if merges:
            matching = self._method.match(keys.mean(1), merges, self.prefix, index, len(self._sublayers))
            x, size = matching.merge(x, size)
            slots = matching.slots if slots is None else matching.slots.gather(1, slots)
        return sublayers.feed(x), size, slots

    def _merged_rope(self, table: Tensor) -> Float[Tensor, "B heads M d"]:
        """Sines and cosines of the patches, mean of each token: its logits are the means of what its patches' were.

        Args:
            table: (T, d), (heads, T, d) or (B, 1 or heads, T, d).
        """
        assert self.slots is not None and self.size is not None
        batch, length = self.size.shape
        table = table[(None,) * (4 - table.ndim)].expand(batch, -1, -1, -1)
        rows = table.transpose(1, 2).flatten(2)
        merged = group_means(rows, self.slots[:, self.prefix :] - self.prefix, length - self.prefix)
        return merged.unflatten(2, (table.shape[1], -1)).transpose(1, 2)

    def _pool(
        self, pool: Callable[..., Tensor], x: Float[Tensor, "B M C"], pool_type: str | None = None
    ) -> Float[Tensor, "B C"]:
        """Average pooling of timm, over positions."""
        module = self._tower.module
        kind = module.global_pool if pool_type is None else pool_type
        if (
            self.size is None
            or self._unmerging
            or kind not in ("avg", "avgmax")
            or self._tower.attention_pool is not None
        ):
            return pool(x, pool_type)
        start = 0 if getattr(module, "pool_include_prefix", False) else self.prefix
        x, size = x[:, start:], self.size[:, start:, None]
        mean = ((x * size).sum(1) / size.sum(1)).to(x.dtype)
        return mean if kind == "avg" else (x.amax(1) + mean) / 2

    def _weigh_attention_pool(
        self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Proportional attention in an attention pooling: of timm over (x,), of torch over (query, x, x)."""
        if self.size is None or self._unmerging:
            return args, kwargs
        x = args[-1]
        mask = self.size[:, -x.shape[1] :].log().to(x.dtype)[:, None]
        if isinstance(module, nn.MultiheadAttention):
            mask = mask.repeat_interleave(module.num_heads, dim=0)
        else:
            mask = mask[:, None]
        return args, kwargs | {"attn_mask": mask}
