"""Token merging inside the vision transformers of timm, the CLIP and SigLIP towers of transformers, and tokenizers.

    with merge_tokens(model, "pitome", ratio=0.925) as merging:
        logits = model(images)
    merging.lengths, merging.size, merging.slots, merging.unmerge(...)

    with merge_tokens(tokenizer, "tome", ratio=0.9):
        tokens = tokenizer.tokenize(images)

A block ``x + attention(norm(x))``, then ``x + mlp(norm(x))`` merges between the two, on the keys of its attention
(ToMe, arXiv 2210.09461, section 3). No class is swapped and no weight touched: each block runs its own sublayers, and
whether that is what it computes is tried out, see :class:`~vistok.merging.blocks.Sublayers`. What cannot merge is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

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
from vistok.merging.towers import Tower, find_tower


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
        model: see :func:`~vistok.merging.towers.find_tower`; of a tokenizer, the transformer that encodes merges.
        method: one of :data:`METHODS`, or one with settings of its own.
        r: see :class:`~vistok.merging.schedules.Schedule`, as ``ratio`` and ``inflection``.
        ratio: see there.
        inflection: see there.
        proportional: let a token count in attention as often as the patches that it stands for, by the logarithm of
            their number on its logits. Off for models trained without labels (MAE) that were not trained with merging.
        unmerge: blocks hand on a value for every position, so that whatever reads features on the patch grid works
            unchanged; always so where the model itself does, as a tokenizer of codes on a grid. Off, the features are
            as short as the merges make them, prefix first.

    Raises:
        UserError: a setting out of range, or a model or a block of it that cannot merge.
    """
    schedule = Schedule(r, ratio, inflection)
    if isinstance(method, str) and method not in METHODS:
        raise UserError(f"no merging method {method!r}: choose from {', '.join(METHODS)}")
    remove(model)
    chosen = METHODS[method] if isinstance(method, str) else method
    return Merging(find_tower(model), chosen, schedule, proportional, unmerge)


def remove(model: nn.Module) -> None:
    """Undo :func:`apply`: the model computes what it did before, bit for bit."""
    merging = getattr(find_tower(model).module, "token_merging", None)
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


class Merging:
    """What a model merges, and what its last forward pass did; :func:`apply` makes it.

    Attributes:
        prefix: leading tokens that never merge.
        suffix: tokens behind the patches that never merge (the registers of FlexTok).
        merges: tokens merged away by each block in the last pass; before the first one, for images of the model's size.
        size: positions in each token of the last pass; None while nothing has merged.
        slots: the token that each position of the last pass is part of; None while nothing has merged.
    """

    size: Float[Tensor, "B M"] | None
    slots: Int[Tensor, "B N"] | None
    _tokens: Float[Tensor, "B M C"] | None

    def __init__(self, tower: Tower, method: Method, schedule: Schedule, proportional: bool, full_length: bool) -> None:
        self._tower, self._method, self._schedule = tower, method, schedule
        self._proportional, self._full_length = proportional, full_length or tower.on_grid
        self.prefix, self.suffix = tower.prefix, tower.suffix
        self._sublayers = [Sublayers(block, f"{tower.path}.{i}") for i, block in enumerate(tower.blocks)]
        self._plans: dict[int, list[int]] = {}
        self._checkpointing = self._intermediates = False
        self._begin(tower.prefix + tower.patches + tower.suffix)
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
        """Tokens behind each block, prefix and suffix included, where :attr:`merges` holds."""
        return [self._length - merged for merged in accumulate(self.merges)]

    def unmerge(self, x: Float[Tensor, "B M C"]) -> Float[Tensor, "B N C"]:
        """Values of the tokens of the last pass, all of them, as values of the positions that they stand for."""
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
            self._plans[length] = self._schedule.merges(len(self._sublayers), length - self.prefix - self.suffix)
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
            metric = keys[:, :, : x.shape[1] - self.suffix].mean(1)
            matching = self._method.match(metric, merges, self.prefix, index, len(self._sublayers))
            matching = matching.followed_by(self.suffix) if self.suffix else matching
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
