"""HiPrune: keep the visual tokens of a vision-language model that its vision tower looks at (arXiv 2508.00553).

    anchors    the tokens that a middle layer (the "object layer") attends to most
    buffers    the four neighbours of the anchors on the grid
    registers  what a deep layer attends to most among the rest, up to the budget

:func:`select` is the method, on tensors. :class:`HiPrune` applies it to LLaVA, LLaVA-NeXT and Qwen2.5-VL of
``transformers`` by hooks; it works with every attention implementation, because the two columns
of means that it needs are recomputed from the queries and keys of two layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vistok.errors import UserError

Scores = tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]
"""Attention that tokens receive at the object layer and at the deep layer."""

QUERIES_AT_ONCE = 256


@torch.no_grad()
def received_attention(q: Float[Tensor, "B H N d"], k: Float[Tensor, "B H N d"], scale: float) -> Float[Tensor, "B N"]:
    """Attention that every token receives: mean over heads, sum over queries (so 1 on average), float32.

    A slab of queries at a time, so that no ``N x N`` map is held in memory.
    """
    rows = ((slab.float() @ k.float().mT * scale).softmax(-1).sum(2) for slab in q.split(QUERIES_AT_ONCE, dim=2))
    return torch.stack(list(rows)).sum(0).mean(1)


def num_anchors(budget: int, alpha: float) -> int:
    """Anchors among ``budget`` tokens: with their four neighbours they take the share ``alpha`` of it.

    Rounded to even at .5, as in the published code, but never so many that anchors and buffers outgrow the budget.
    """
    return min(round(budget * alpha / 5), budget // 5)


def with_neighbours(anchors: Int[Tensor, "B n"], grid: tuple[int, int], compat: bool = False) -> Bool[Tensor, "B N"]:
    """The anchors and the tokens above, below, left and right of them on a grid of (rows, columns).

    Args:
        anchors: flat positions.
        grid: rows and columns.
        compat: the published neighbourhood: left and right run on over the ends of a row, and what lies above the first
            or below the last token is that token.
    """
    height, width = grid
    moved = anchors[:, :, None] + anchors.new_tensor([0, -1, 1, -width, width])
    inside = (moved >= 0) & (moved < height * width)
    if not compat:
        here = anchors[:, :, None]
        inside &= (moved // width == here // width) | (moved % width == here % width)
        moved = torch.where(inside, moved, here)
    chosen = torch.zeros(len(anchors), height * width, dtype=torch.bool, device=anchors.device)
    return chosen.scatter(1, moved.clamp(0, height * width - 1).flatten(1), True)


def select(
    object_scores: Float[Tensor, "B N"],
    deep_scores: Float[Tensor, "B N"],
    grid: tuple[int, int],
    budget: int,
    alpha: float = 0.1,
    compat: bool = False,
    shown: Bool[Tensor, "B N"] | None = None,
) -> Bool[Tensor, "B N"]:
    """The tokens to keep, exactly ``budget`` in every row (or all that may be kept, if those are fewer).

    Args:
        object_scores: attention received at the object layer, in raster order.
        deep_scores: the same at the deep layer.
        grid: rows and columns, ``N`` in all.
        budget: tokens to keep of each image.
        alpha: share of the budget for anchors and buffers.
        compat: see :func:`with_neighbours`.
        shown: the tokens that may be kept, by default all.

    Raises:
        UserError: if the sizes do not fit, or budget or alpha are out of range.
    """
    height, width = grid
    if object_scores.shape != deep_scores.shape or object_scores.shape[-1] != height * width:
        shapes = f"{tuple(object_scores.shape)} and {tuple(deep_scores.shape)}"
        raise UserError(f"hiprune: scores {shapes} do not belong to a grid of {height}x{width}")
    if not 0 <= budget <= height * width:
        raise UserError(
            f"hiprune: budget must be 0 to {height * width} tokens of a {height}x{width} grid, got {budget}"
        )
    _check_alpha(alpha)
    shown = torch.ones_like(object_scores, dtype=torch.bool) if shown is None else shown
    anchors = object_scores.masked_fill(~shown, -torch.inf).topk(num_anchors(budget, alpha), dim=1).indices
    chosen = with_neighbours(anchors, grid, compat)
    kept = deep_scores.masked_fill(chosen, torch.inf).masked_fill(~shown, -torch.inf).topk(budget, dim=1).indices
    return torch.zeros_like(chosen).scatter(1, kept, True) & shown


class HiPrune:
    """Prunes the visual tokens of a vision-language model before its language model reads them.

        with HiPrune(model, budget=128):
            model.generate(**inputs)  # inputs as ever: placeholders, pixels, one or several images for each prompt

    Applied on construction, until :meth:`remove` or the end of the ``with``. For inference: logits come out for the
    kept positions only. Rows that keep fewer tokens than others of their batch are padded on the left. LLaVA-NeXT
    spends its budget on all tiles alike, on nothing that it crops away, and loses its newline tokens.

    Args:
        model: a LLaVA, LLaVA-NeXT or Qwen2.5-VL of ``transformers``, with or without its head.
        budget: tokens to keep of each image (an int), or the share of them (a float in (0, 1]); a sequence has one for
            each image. Published: 192, 128, 64 of 576 for LLaVA, 640, 320, 160 of 2880 for LLaVA-NeXT, shares .334,
            .223, .112 for Qwen2.5-VL.
        alpha: see :func:`select`.
        object_layer: counted from 1; by default 9 of 24, in proportion, or Qwen's middle layer of full attention.
        deep_layer: counted from 1; by default the layer whose output the language model reads, or Qwen's last.
        positions: ``keep`` the positions that the tokens had, or ``repack`` them without gaps. Published: repack for
            LLaVA, keep for Qwen2.5-VL.
        compat: see :func:`with_neighbours`.
        random_seed: as a baseline, choose tokens at random with this seed, whatever the attention says.

    Attributes:
        masks: which of the placeholders of each image were kept, of the last prompts that had images.
        scores: the attention received at the two layers that decided it, one row for each tile.

    Raises:
        UserError: if the model is none of these, is pruned already, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | Sequence[float],
        alpha: float = 0.1,
        object_layer: int | None = None,
        deep_layer: int | None = None,
        positions: Literal["keep", "repack"] = "keep",
        compat: bool = False,
        random_seed: int | None = None,
    ) -> None:
        for share in budget if isinstance(budget, Sequence) else [budget]:
            if share <= 0 or (isinstance(share, float) and share > 1):
                raise UserError(f"hiprune: budget must be a whole number of tokens or a share in (0, 1], got {share}")
        _check_alpha(alpha)
        if positions not in ("keep", "repack"):
            raise UserError(f"hiprune: positions must be keep or repack, got {positions!r}")
        base: Any = getattr(model, "model", model)
        self._tower = _find_tower(base)
        if "get_image_features" in vars(base):
            raise UserError("hiprune: the model is pruned already; remove() the first one")
        self.budget, self.positions, self.compat = budget, positions, compat
        # The baseline's scores take the place of the deep layer's, which decides alone if there are no anchors.
        self.alpha = alpha if random_seed is None else 0.0
        self._random_seed = random_seed
        self.masks: list[Bool[Tensor, " P"]] = []
        self.scores: Scores | None = None
        self._base = base
        self._signature = inspect.signature(base.forward)
        self._slots: Bool[Tensor, "B L"] | None = None
        self._kept: Bool[Tensor, "B K"] | None = None
        self._handles = [
            *self._tower.watch(object_layer, deep_layer),
            base.register_forward_pre_hook(self._remember, with_kwargs=True),
            base.language_model.register_forward_pre_hook(self._shorten, with_kwargs=True),
        ]
        # Called by forward, or by generate ahead of it, and the one place that knows the sizes of the images.
        base.get_image_features = self._choosing(base.get_image_features)

    def remove(self) -> None:
        """Let the model read every token again."""
        vars(self._base).pop("get_image_features", None)
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> HiPrune:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _choosing(self, read: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(read)

        @wraps(read)
        def read_and_choose(*args: Any, **kwargs: Any) -> Any:
            output = read(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            self.scores = self._tower.take_scores(given)
            if self._random_seed is not None:
                rng = torch.Generator().manual_seed(self._random_seed)
                objects, deep = self.scores
                self.scores = objects, torch.rand(deep.shape, generator=rng).to(deep.device)
            self.masks = self._choose(self.scores, given)
            return output

        return read_and_choose

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind(*args, **kwargs).arguments
        ids = given.get("input_ids")
        if ids is None and given.get("pixel_values") is not None:
            raise UserError("hiprune: needs input_ids, to know where the images are")
        self._slots = None if ids is None else ids == self._base.config.image_token_id

    @torch.no_grad()
    def _shorten(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the language model reads instead; for the steps after the prompt, the mask and the positions of it."""
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its older name
        seen = cache.get_seq_length() if cache is not None else 0
        has_images = self._slots is not None and bool(self._slots.any())
        if has_images and seen and embeds.shape[1] > 1:
            raise UserError("hiprune: images must be in the first prompt, not in one that continues a cache")
        if not seen and not has_images:
            self._kept = None
        if self._kept is None and not has_images:
            return None
        if mask is not None and (isinstance(mask, dict) or mask.ndim != 2):
            raise UserError("hiprune: needs attention_mask as (batch, length), which a static cache does not leave")
        changed = dict(kwargs)
        if seen:
            changed |= self._continue(embeds.shape[1], seen, mask)
        else:
            assert self._slots is not None
            changed |= self._prune(self._slots, embeds, mask, kwargs.get("position_ids"))
        if self.positions == "repack":
            length = changed["inputs_embeds"].shape[1]
            changed["position_ids"] = (changed["attention_mask"].long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif changed.get("position_ids") is None:
            first = self._length + seen - self._kept.shape[1]  # type: ignore[union-attr]
            changed["position_ids"] = torch.arange(first, first + embeds.shape[1], device=embeds.device)[None]
        return args, changed

    def _prune(
        self,
        slots: Bool[Tensor, "B L"],
        embeds: Float[Tensor, "B L D"],
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> dict[str, Tensor]:
        count = int(slots.sum())
        found = torch.cat([slots.new_zeros(0), *(mask.to(slots.device) for mask in self.masks)])
        if not len(found) or count % len(found):
            raise UserError(f"hiprune: {count} image tokens in the prompt, but the images have {len(found)}")
        # A search with several beams repeats every prompt; the images were read once.
        beams = count // len(found)
        found = torch.cat([row for row in found.split(slots.sum(1)[::beams].tolist()) for _ in range(beams)])
        keep = torch.ones_like(slots).masked_scatter(slots, found)
        batch, self._length = keep.shape
        # Kept tokens last, in their order; a row that keeps fewer than the others begins with some that are masked.
        index = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]
        mask = slots.new_ones(slots.shape, dtype=torch.long) if mask is None else mask
        self._kept = mask.gather(1, index) * keep.gather(1, index)
        if positions is None:
            positions = torch.arange(self._length, device=slots.device)[None]
        positions = positions.expand(*positions.shape[:-2], batch, -1)
        return {
            "inputs_embeds": embeds.take_along_dim(index[:, :, None], 1),
            "attention_mask": self._kept,
            "position_ids": positions.take_along_dim(index.expand(*positions.shape[:-2], -1, -1), -1),
        }

    def _continue(self, new: int, seen: int, mask: Tensor | None) -> dict[str, Tensor]:
        kept = self._kept
        assert kept is not None
        after = kept.new_ones(len(kept), seen + new - kept.shape[1]) if mask is None else mask[:, self._length :]
        return {"attention_mask": torch.cat([kept, after.to(kept)], dim=1)}

    def _choose(self, scores: Scores, given: dict[str, Any]) -> list[Bool[Tensor, " P"]]:
        """One mask for each image, over its placeholders."""
        images = self._tower.images(given, len(scores[0]))
        budgets = self.budget if isinstance(self.budget, Sequence) else [self.budget] * len(images)
        if len(budgets) != len(images):
            raise UserError(f"hiprune: {len(budgets)} budgets for {len(images)} images")
        masks, start = [], 0
        for image, wanted in zip(images, budgets):
            height, width = image.grid
            size = height * width
            objects, deep = (s.flatten()[start : start + image.tiles * size].view(image.tiles, size) for s in scores)
            start += image.tiles * size
            order = image.order.to(deep.device)
            shown = torch.zeros_like(deep, dtype=torch.bool)
            shown.view(-1)[order[order >= 0]] = True
            total = int(shown.sum())
            budget = round(total * wanted) if isinstance(wanted, float) else min(wanted, total)
            # Tiles share the budget alike; the first ones get what cannot be shared.
            counts = [min(size, budget // image.tiles + (tile < budget % image.tiles)) for tile in range(image.tiles)]
            kept = [
                select(middle, late, image.grid, count, self.alpha, self.compat, visible)
                for middle, late, visible, count in zip(objects.split(1), deep.split(1), shown.split(1), counts)
            ]
            masks.append((order >= 0) & torch.cat(kept).flatten()[order])
        return masks


@dataclass(frozen=True)
class Image:
    """How the visual tokens of one image lie in the prompt.

    Args:
        grid: rows and columns of a tile.
        tiles: tiles that the tower saw.
        order: for each placeholder its token, counted through all tiles, or -1 for one that is no visual token.
    """

    grid: tuple[int, int]
    tiles: int
    order: Int[Tensor, " P"]


class _Tower:
    """The attention layers of a vision tower, and what two of them compute."""

    projections: tuple[str, ...]

    def __init__(self, attentions: list[Any], object_layer: int, deep_layer: int) -> None:
        self._attentions = attentions
        self._defaults = object_layer, deep_layer
        self._heard: dict[tuple[int, str], Any] = {}

    def watch(self, object_layer: int | None, deep_layer: int | None) -> list[RemovableHandle]:
        """Listen to two layers (counted from 1, or the usual ones).

        Raises:
            UserError: if the tower has no such layer.
        """
        given = {"object_layer": object_layer, "deep_layer": deep_layer}
        self._layers = [usual if layer is None else layer for layer, usual in zip(given.values(), self._defaults)]
        for name, layer in zip(given, self._layers):
            self._check(name, layer)
        return [handle for layer in set(self._layers) for handle in self.listen(layer)]

    def _check(self, name: str, layer: int) -> None:
        if not 1 <= layer <= len(self._attentions):
            raise UserError(f"hiprune: {name} must be 1 to {len(self._attentions)}, got {layer}")

    def listen(self, layer: int) -> list[RemovableHandle]:
        def hear(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            self._heard[layer, name] = output.detach()

        attention = self._attentions[layer - 1]
        return [getattr(attention, name).register_forward_hook(partial(hear, name)) for name in self.projections]

    def take_scores(self, given: dict[str, Any]) -> Scores:
        """Attention received at the two layers in the last run of the tower, one row for each tile.

        Args:
            given: what the model's ``get_image_features`` got, by name.
        """
        objects, deep = (self.received(layer, given) for layer in self._layers)
        self._heard.clear()
        return objects, deep

    def received(self, layer: int, given: dict[str, Any]) -> Float[Tensor, "T N"]:
        """Of the tokens that the language model may read, in raster order."""
        raise NotImplementedError

    def images(self, given: dict[str, Any], tiles: int) -> list[Image]:
        """How the tokens of each image lie; ``tiles`` is the number of tiles in all."""
        raise NotImplementedError


class ClipTower(_Tower):
    """The CLIP or SigLIP tower of a LLaVA or LLaVA-NeXT."""

    projections = ("q_proj", "k_proj")

    def __init__(self, base: Any) -> None:
        tower, self._base = base.vision_tower, base
        if tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise UserError(f"hiprune: the tower must be a CLIP or SigLIP, got {type(tower).__name__}")
        attentions = [module for module in tower.modules() if hasattr(module, "q_proj")]
        read = base.config.vision_feature_layer
        deepest = max(layer % (len(attentions) + 1) for layer in ([read] if isinstance(read, int) else read))
        super().__init__(attentions, max(1, len(attentions) * 9 // 24), deepest)

    def received(self, layer: int, given: dict[str, Any]) -> Float[Tensor, "T N"]:
        """Of every tile, without the class token."""
        attention = self._attentions[layer - 1]
        q, k = (
            self._heard[layer, name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for name in self.projections
        )
        first = self._base.config.vision_feature_select_strategy == "default"
        return received_attention(q, k, attention.scale)[:, int(first) :]

    def images(self, given: dict[str, Any], tiles: int) -> list[Image]:
        """Where the tokens of the images lie; LLaVA-NeXT's tiles are put together, cropped and broken into lines."""
        config = self._base.config.vision_config
        grid = (config.image_size // config.patch_size,) * 2
        size = grid[0] * grid[1]
        if not hasattr(self._base, "pack_image_features"):
            return [Image(grid, 1, torch.arange(size))] * tiles
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        images = []
        for image_size in given["image_sizes"]:
            count = image_size_to_num_patches(image_size, self._base.config.image_grid_pinpoints, config.image_size)
            numbers = torch.arange(count * size, dtype=torch.float64).view(count, size, 1)
            packed, _ = self._base.pack_image_features([numbers], image_size[None], "default", -torch.ones(1))
            images.append(Image(grid, count, packed[0][:, 0].long()))
        return images


class QwenTower(_Tower):
    """The tower of a Qwen2.5-VL: most layers attend within windows, each language token comes from 2 x 2 patches."""

    projections = ("qkv",)

    def __init__(self, base: Any) -> None:
        self._visual = base.visual
        self._full = sorted(self._visual.fullatt_block_indexes)
        attentions = [block.attn for block in self._visual.blocks]
        super().__init__(attentions, self._full[(len(self._full) - 1) // 2] + 1, len(attentions))

    def _check(self, name: str, layer: int) -> None:
        super()._check(name, layer)
        if layer - 1 not in self._full:
            full = ", ".join(str(index + 1) for index in self._full)
            raise UserError(f"hiprune: {name} {layer} of this tower attends within windows; full attention: {full}")

    def listen(self, layer: int) -> list[RemovableHandle]:
        def hear(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._heard[layer, "rotation"] = kwargs["position_embeddings"]
            self._heard[layer, "ends"] = kwargs["cu_seqlens"]

        attention = self._attentions[layer - 1]
        return [*super().listen(layer), attention.register_forward_pre_hook(hear, with_kwargs=True)]

    def received(self, layer: int, given: dict[str, Any]) -> Float[Tensor, "1 N"]:
        """Of the merged tokens of all images, in raster order."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        attention = self._attentions[layer - 1]
        q, k, _ = self._heard[layer, "qkv"].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *self._heard[layer, "rotation"])
        lengths = self._heard[layer, "ends"].diff().tolist()
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k)))
        patches = torch.cat([received_attention(q, k, attention.scaling) for q, k in parts], dim=1)
        merge = self._visual.spatial_merge_size
        scores = patches.view(-1, merge**2).mean(1)
        # Windows of an image come row by row, and so do the tokens in a window.
        side = self._visual.window_size // merge // self._visual.patch_size
        ordered, start = [], 0
        for image in self.images(given, 1):
            rows, columns = image.order // image.grid[1], image.order % image.grid[1]
            windows = rows // side * image.grid[1] + columns // side
            ordered.append(start + windows.argsort(stable=True).argsort())
            start += len(image.order)
        return scores[torch.cat(ordered).to(scores.device)][None]

    def images(self, given: dict[str, Any], tiles: int) -> list[Image]:
        """One tile for each image, of its own size."""
        merge = self._visual.spatial_merge_size
        grids = [(height // merge, width // merge) for _, height, width in given["image_grid_thw"].tolist()]
        return [Image(grid, 1, torch.arange(grid[0] * grid[1])) for grid in grids]


def _find_tower(base: Any) -> ClipTower | QwenTower:
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind in ("llava", "llava_next"):
        return ClipTower(base)
    if kind == "qwen2_5_vl":
        return QwenTower(base)
    raise UserError(f"hiprune: knows LLaVA, LLaVA-NeXT and Qwen2.5-VL of transformers, not {type(base).__name__}")


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"hiprune: alpha must be in [0, 1], got {alpha}")
