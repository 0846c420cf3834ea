"""Where the blocks of a model are, which of its tokens may merge, and what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from vistok.errors import UserError
from vistok.interfaces import Autoencoder
from vistok.nn.vision_teacher import VisionTower


class Tower(NamedTuple):
    """What is to know of a transformer whose tokens shall merge.

    Args:
        module: the model.
        blocks: its blocks.
        path: where they are in it.
        prefix: tokens in front of the patches.
        patches: in an image of the model's size.
        suffix: tokens behind the patches.
        entries: methods that run the blocks.
        attention_pool: what pools tokens by attention.
        checkpoint_flags: owners and names of the flags for gradient checkpointing.
        on_grid: whether the model needs a token for every patch behind its blocks.
    """

    module: Any
    blocks: Sequence[nn.Module]
    path: str
    prefix: int
    patches: int
    suffix: int = 0
    entries: tuple[str, ...] = ("forward",)
    attention_pool: nn.Module | None = None
    checkpoint_flags: Sequence[tuple[Any, str]] = ()
    on_grid: bool = False


def find_tower(model: Any) -> Tower:
    """The transformer of ``model`` whose tokens can merge.

    Args:
        model: a vision transformer of timm, or a :class:`~vistok.nn.vision_teacher.VisionTower` of one; the CLIP or
            SigLIP vision tower of transformers, or what contains one as ``vision_model``; a transformer of this package
            that says what its tokens are by ``num_patches``, ``num_suffix_tokens`` and ``reads_grid``; or an
            autoencoder with one of these as its :attr:`~vistok.interfaces.Autoencoder.encoding_tower`.

    Raises:
        UserError: naming the model, and what it lacks.
    """
    if isinstance(model, Autoencoder):
        if (tower := model.encoding_tower) is None:
            name = type(model).__name__
            raise UserError(f"cannot merge tokens of {name}: it has no encoding_tower, a transformer that reads images")
        return find_tower(tower)
    if isinstance(model, VisionTower):
        return find_tower(model.model)._replace(on_grid=True)
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


def _ours(module: Any) -> Tower:
    return Tower(
        module,
        module.blocks,
        path="blocks",
        prefix=0,
        patches=module.num_patches,
        suffix=module.num_suffix_tokens,
        on_grid=module.reads_grid,
    )


def _timm(module: Any) -> Tower:
    pool = getattr(module, "attn_pool", None)
    if pool is not None and ("attn_mask" not in signature(pool.forward).parameters or pool.pos_embed is not None):
        raise UserError(f"cannot merge tokens of {type(module).__name__}: its attn_pool cannot weigh them by size")
    return Tower(
        module,
        module.blocks,
        path="blocks",
        prefix=module.num_prefix_tokens,
        patches=module.patch_embed.num_patches,
        entries=("forward_features", "forward_intermediates"),
        attention_pool=pool,
        checkpoint_flags=[(module, "grad_checkpointing")],
    )


def _transformers(module: Any) -> Tower:
    layers = module.encoder.layers
    return Tower(
        module,
        layers,
        path="encoder.layers",
        prefix=int(hasattr(module.embeddings, "class_embedding")),
        patches=module.embeddings.num_patches,
        attention_pool=getattr(getattr(module, "head", None), "attention", None),
        checkpoint_flags=[(layer, "gradient_checkpointing") for layer in layers],
    )


_LIBRARIES: tuple[tuple[Callable[[Any], Tower], tuple[str, ...]], ...] = (
    (_ours, ("num_suffix_tokens", "num_patches", "reads_grid", "blocks")),
    (_timm, ("blocks", "num_prefix_tokens", "patch_embed", "forward_features", "forward_intermediates", "pool")),
    (_transformers, ("encoder", "embeddings")),
)
"""How a library's models are read, and what they must have: the first part tells whose a model is."""
