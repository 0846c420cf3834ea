"""The released UniFlow file, ``yuezhengrong/UniFlow``: its key layout. Sizes are read from the tensors.

The numbers of heads cannot be: they are those of the release, 16 in the condition tower and in the encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from vistok.errors import UserError
from vistok.files import load_weights
from vistok.key_maps import TIMM_BLOCK, KeyMap, KeyRule, layer_rules, load_strictly, published_file
from vistok.tokenizers.uniflow import Config, UniFlow, make_encoder

WEIGHTS = "model.safetensors"
UNUSED = "Distill_Adapter"
"""A part of the release that nothing calls."""


def _values_last(ours: str, theirs: str) -> KeyRule:
    """Columns of the values of a patch: channel by channel there, pixel by pixel here."""

    def pixels_first(x: Tensor) -> Tensor:
        return rearrange(x, "d (c p q) -> d (p q c)", c=3, p=isqrt(x.shape[1] // 3))

    def channels_first(x: Tensor) -> Tensor:
        return rearrange(x, "d (p q c) -> d (c p q)", c=3, p=isqrt(x.shape[1] // 3))

    return KeyRule(ours, (theirs,), pixels_first, channels_first)


def _values_first(ours: str, theirs: str) -> KeyRule:
    """The same for rows, and for a bias."""

    def pixels_first(x: Tensor) -> Tensor:
        return rearrange(x, "(c p q) ... -> (p q c) ...", c=3, p=isqrt(len(x) // 3))

    def channels_first(x: Tensor) -> Tensor:
        return rearrange(x, "(p q c) ... -> (c p q) ...", c=3, p=isqrt(len(x) // 3))

    return KeyRule(ours, (theirs,), pixels_first, channels_first)


def _table(ours: str, theirs: str) -> KeyRule:
    """``(1, rows * columns, width)`` <-> ``(rows, columns, width)`` of a square grid."""
    return KeyRule(
        ours, (theirs,), lambda x: x[0].unflatten(0, (isqrt(x.shape[1]), -1)), lambda x: x.flatten(0, 1)[None]
    )


def _encoder_rules() -> list[KeyRule]:
    ours, theirs = "encoder.model.blocks.{i}", "encoder.layers.{i}"
    names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    return [
        KeyRule("encoder.model.cls_token", ("embeddings.class_embedding",)),
        KeyRule("encoder.model.pos_embed", ("embeddings.position_embedding",)),
        *layer_rules("encoder.model.patch_embed.proj", "embeddings.patch_embedding"),
        *layer_rules(ours, theirs, {name: name for name in names}),
        *(KeyRule(f"{ours}.{name}.gamma", (f"{theirs}.{name}",)) for name in ("ls1", "ls2")),
    ]


def _decoder_rules() -> list[KeyRule]:
    net, hidden = "flow_head.net", {"up": "c_fc", "down": "c_proj"}
    flow = {"time.mlp.{i}": "time_embed.mlp.{i}", "condition_in": "cond_embed"}
    block = {"norm": "in_ln", "mlp.0": "mlp.0", "mlp.2": "mlp.2", "modulation.linear": "adaLN_modulation.1"}
    return [
        _table("tower.positions_before", "global_block_pos_embed"),
        _table("tower.positions_behind", "decoder_pos_embed"),
        *layer_rules("tower.blocks.{i}", "global_blocks.{i}", TIMM_BLOCK),
        *layer_rules("project", "chal_proj", hidden),
        *layer_rules("tower.up", "chal_unproj", hidden),
        *layer_rules("flow", net, flow),
        *layer_rules("flow.blocks.{i}", f"{net}.res_blocks.{{i}}", block),
        *layer_rules("flow.modulation.linear", f"{net}.final_layer.adaLN_modulation.1"),
        _values_last("flow.patch_in.weight", f"{net}.input_proj.weight"),
        KeyRule("flow.patch_in.bias", (f"{net}.input_proj.bias",)),
        *(_values_first(f"flow.head.{part}", f"{net}.final_layer.linear.{part}") for part in ("weight", "bias")),
    ]


PUBLISHED_KEYS = KeyMap("published UniFlow", _encoder_rules() + _decoder_rules())


def load_published(path_or_hub_id: str, image_size: int | None = None) -> UniFlow:
    """See :meth:`UniFlow.from_published`."""
    path = published_file(path_or_hub_id, "UniFlow", WEIGHTS)
    state = {key: value.float() for key, value in load_weights(path).items()}
    if unused := [key for key in state if UNUSED in key]:
        warnings.warn(
            f"{path}: {len(unused)} tensors that UniFlow does not use are not loaded ({unused[0]})", stacklevel=2
        )
    return from_state({key: value for key, value in state.items() if key not in unused}, str(path), image_size)


def from_state(state: Mapping[str, Tensor], source: str, image_size: int | None = None, **config: Any) -> UniFlow:
    """A UniFlow of a published state dict.

    Args:
        state: in the published layout.
        source: for messages.
        image_size: see :meth:`UniFlow.from_published`.
        config: values of its config that tensors cannot tell.

    Raises:
        UserError: naming the key or shape that is missing or does not fit.
    """
    ours = PUBLISHED_KEYS.to_ours(state)
    try:
        native = Config(**{**sizes_of(ours), **config})
    except KeyError as error:
        raise UserError(f"{source} is no published UniFlow: {error} is missing") from None
    wanted = Config(**{**vars(native), "image_size": image_size or native.image_size})
    model = UniFlow(wanted, make_encoder(wanted))
    if wanted.image_size != native.image_size:
        ours = _resampled(ours, model.encoder.grid)
    load_strictly(model, ours, source)
    return model.eval()


def sizes_of(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`Config` that the weights tell."""
    width, _, patch, _ = ours["encoder.model.patch_embed.proj.weight"].shape
    return {
        "image_size": patch * len(ours["tower.positions_before"]),
        "encoder_args": {
            "patch_size": patch,
            "embed_dim": width,
            "depth": _count(ours, "encoder.model.blocks"),
            # timm rounds the product down: half a channel more keeps it from losing one.
            "mlp_ratio": (len(ours["encoder.model.blocks.0.mlp.fc1.bias"]) + 0.5) / width,
            "qkv_bias": "encoder.model.blocks.0.attn.qkv.bias" in ours,
        },
        "latent_channels": len(ours["project.down.bias"]),
        "global_blocks": _count(ours, "tower.blocks"),
        "flow_blocks": _count(ours, "flow.blocks"),
        "flow_width": len(ours["flow.patch_in.bias"]),
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks below ``prefix``."""
    return len({key.removeprefix(f"{prefix}.").split(".")[0] for key in state if key.startswith(f"{prefix}.")})


def _resampled(ours: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """All tables of positions at another grid."""
    tables = {name: resample(ours[name], grid) for name in ("tower.positions_before", "tower.positions_behind")}
    name = "encoder.model.pos_embed"
    return {**ours, **tables, name: resample_encoder(ours[name], grid)}


def resample_encoder(table: Float[Tensor, "1 n D"], grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
    """The encoder's positions at another grid; the class token, which comes first, keeps its own."""
    side = isqrt(table.shape[1] - 1)
    patches = resample(table[0, 1:].unflatten(0, (side, side)), grid).flatten(0, 1)
    return torch.cat([table[:, :1], patches[None]], dim=1)


def resample(table: Float[Tensor, "h w D"], grid: tuple[int, int]) -> Float[Tensor, "rows columns D"]:
    """Bicubic, without antialiasing, as the released encoder does it."""
    resized = F.interpolate(table.permute(2, 0, 1)[None], grid, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0)
