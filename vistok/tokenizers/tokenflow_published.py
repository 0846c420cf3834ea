"""The released TokenFlow tokenizers and other checkpoints of the authors' code: their key layouts and sizes.

``tokenflow_clipb_32k_enhanced.pt`` (B with the enhanced pixel decoder) and ``tokenflow_siglip_32k.pt`` (XL) are torch
files with the weights under ``ema``, ``model`` or ``state_dict``. There "vqkd" means semantic and "vqgan" pixel. The
size is recognised by the keys of the semantic encoder.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vistok.errors import UserError
from vistok.key_maps import TIMM_BLOCK, KeyMap, KeyRule, layer_rules, load_strictly, load_torch_file, published_file
from vistok.tokenizers.cnn_published import LLAMAGEN
from vistok.tokenizers.tokenflow import ENHANCED, Config, TokenFlow, preset

CONTAINERS = ("ema", "model", "state_dict")

NAMES = {"b": "TokenFlow-B", "l": "TokenFlow-L", "xl": "TokenFlow-XL"}
MARKS = {
    "b": "encoder_vqkd.class_embedding",
    "l": "encoder_vqkd.patch_embed.backbone.stem.conv1.weight",
    "xl": "encoder_vqkd.embeddings.patch_embedding.weight",
}
"""A key that only this size has."""

IMAGE_SIZES = {"b": {224: "b", 256: "b_256"}, "l": {256: "l"}, "xl": {384: "xl"}}
"""Presets of each released size, by side of the images."""

UNUSED = re.compile(
    r"quantize\.codebook_used"  # ids that the training chose lately
    r"|scaling_layer\.(shift|scale)"  # mean and standard deviation, which the tower has itself
    r"|encoder_vqkd\.(post_layernorm|head)\..*"  # of SigLIP, behind the features
)
"""Published keys that nothing needs, beside the last block of SigLIP."""

_TOWER = "semantic_encoder.tower.model"


def _unbatched(ours: str, theirs: str, axes: int = 1) -> KeyRule:
    """A tensor that has ``axes`` leading axes of size 1 here and none there."""
    return KeyRule(ours, (theirs,), lambda x: x[(None,) * axes], lambda x: x[(0,) * axes])


def _without_key_bias(bias: Tensor) -> Tensor:
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])


def _with_key_bias(bias: Tensor) -> Tensor:
    """Zeros for the keys: a bias that all keys share changes no attention."""
    query, value = bias.chunk(2)
    return torch.cat([query, torch.zeros_like(query), value])


CLIP_RULES = [
    _unbatched(f"{_TOWER}.cls_token", "encoder_vqkd.class_embedding", 2),
    _unbatched(f"{_TOWER}.pos_embed", "encoder_vqkd.positional_embedding"),
    KeyRule(f"{_TOWER}.patch_embed.proj.weight", ("encoder_vqkd.conv1.weight",)),
    *layer_rules(_TOWER, "encoder_vqkd", {"norm_pre": "ln_pre", "norm": "ln_post"}),
    *(
        KeyRule(
            f"{_TOWER}.blocks.{{i}}.attn.qkv.{part}", (f"encoder_vqkd.transformer.resblocks.{{i}}.attn.in_proj_{part}",)
        )
        for part in ("weight", "bias")
    ),
    *layer_rules(
        f"{_TOWER}.blocks.{{i}}",
        "encoder_vqkd.transformer.resblocks.{i}",
        {
            "norm1": "ln_1",
            "attn.proj": "attn.out_proj",
            "norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        },
    ),
]
"""OpenAI's CLIP -> timm."""

SIGLIP_RULES = [
    *layer_rules(f"{_TOWER}.patch_embed.proj", "encoder_vqkd.embeddings.patch_embedding"),
    _unbatched(f"{_TOWER}.pos_embed", "encoder_vqkd.embeddings.position_embedding.weight"),
    *(
        KeyRule(
            f"{_TOWER}.blocks.{{i}}.attn.qkv.{part}",
            tuple(f"encoder_vqkd.encoder.layers.{{i}}.self_attn.{name}_proj.{part}" for name in "qkv"),
        )
        for part in ("weight", "bias")
    ),
    *layer_rules(
        f"{_TOWER}.blocks.{{i}}",
        "encoder_vqkd.encoder.layers.{i}",
        {
            "norm1": "layer_norm1",
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
]
"""Hugging Face's SigLIP, without the prefix ``vision_model.`` that older versions have -> timm."""

VITAMIN_RULES = [
    rule
    for part, layers in {
        "patch_embed.backbone.stem": ("conv1", "norm1", "conv2"),
        "patch_embed.backbone.stages.0.{i}": ("pre_norm", "conv1_1x1", "conv2_kxk", "conv3_1x1", "shortcut.expand"),
        "patch_embed.backbone.stages.1.{i}": ("pre_norm", "conv1_1x1", "conv2_kxk", "conv3_1x1", "shortcut.expand"),
        "patch_embed.backbone.pool": ("proj", "norm"),
        "blocks.{i}": ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.norm", "mlp.w0", "mlp.w1", "mlp.w2"),
    }.items()
    for rule in layer_rules(f"{_TOWER}.{part}", f"encoder_vqkd.{part}", {name: name for name in layers})
]
"""timm's own names."""

TOWER_RULES = {"b": CLIP_RULES, "l": VITAMIN_RULES, "xl": SIGLIP_RULES}

SEMANTIC_RULES = [
    *layer_rules("semantic_encoder.head.{i}", "encode_task_layer.{i}"),
    KeyRule("semantic_decoder.class_token", ("decoder_vqkd.cls_token",)),
    KeyRule("semantic_decoder.positions", ("decoder_vqkd.pos_embed",)),
    KeyRule(
        "semantic_decoder.embedding.weight",
        ("decoder_vqkd.patch_embed.proj.weight",),
        lambda x: x[:, :, 0, 0],
        lambda x: x[:, :, None, None],
    ),
    KeyRule("semantic_decoder.embedding.bias", ("decoder_vqkd.patch_embed.proj.bias",)),
    KeyRule("semantic_decoder.blocks.{i}.attention.qkv.weight", ("decoder_vqkd.blocks.{i}.attn.qkv.weight",)),
    KeyRule(
        "semantic_decoder.blocks.{i}.attention.qkv.bias",
        ("decoder_vqkd.blocks.{i}.attn.q_bias", "decoder_vqkd.blocks.{i}.attn.v_bias"),
        _with_key_bias,
        _without_key_bias,
    ),
    *layer_rules(
        "semantic_decoder.blocks.{i}",
        "decoder_vqkd.blocks.{i}",
        {ours: theirs for ours, theirs in TIMM_BLOCK.items() if ours != "attention.qkv"},
    ),
    *layer_rules("semantic_decoder.norm", "decoder_vqkd.fc_norm"),
    *layer_rules("semantic_decoder.head.{i}", "decode_task_layer.{i}"),
]

POSITIONS = (f"{_TOWER}.pos_embed", "semantic_decoder.positions")


def published_keys(size: str, levels: int = 5) -> KeyMap:
    """The layout of one size (a key of :data:`NAMES`), with CNNs of so many levels."""
    pixel_rules = [
        *LLAMAGEN.encoder_rules("pixel_encoder", "encoder", levels),
        *LLAMAGEN.decoder_rules("pixel_decoder", "decoder", levels),
        *layer_rules("pixel_in", "quant_conv"),
        *layer_rules("pixel_out", "post_quant_conv"),
        KeyRule("quantizer.codebook.tables.0", ("quantize.embedding_vqkd.weight",)),
        KeyRule("quantizer.codebook.tables.1", ("quantize.embedding_vqgan.weight",)),
    ]
    return KeyMap(f"published {NAMES[size]}", [*TOWER_RULES[size], *SEMANTIC_RULES, *pixel_rules])


def load_published(path_or_hub_id: str, image_size: int | None = None) -> TokenFlow:
    """See :meth:`TokenFlow.from_published`."""
    state = read_state(published_file(path_or_hub_id, "TokenFlow"))
    size = size_of(state, path_or_hub_id)
    sizes = IMAGE_SIZES[size]
    if image_size not in (None, *sizes):
        raise UserError(
            f"{path_or_hub_id} is {NAMES[size]}, which was released for images of "
            f"{' or '.join(map(str, sizes))} px, not {image_size}"
        )
    name = sizes[image_size] if image_size else next(iter(sizes.values()))
    changes = ENHANCED if "decoder.conv_blocks.0.res.4.conv1.weight" in state else {}
    return from_state(state, preset(name, **changes), path_or_hub_id)


def from_state(published: dict[str, Tensor], config: Config, source: str) -> TokenFlow:
    """A TokenFlow of a published state dict, in eval mode.

    Raises:
        UserError: naming the keys that are not those of ``config``.
    """
    state, size = without_prefix(published), size_of(published, source)
    model = TokenFlow(config)
    unused = f"encoder_vqkd.encoder.layers.{len(model.semantic_encoder.tower.model.blocks)}."
    used = {key: value for key, value in state.items() if not (UNUSED.fullmatch(key) or key.startswith(unused))}
    ours = published_keys(size, len(config.multipliers)).to_ours({key: value.float() for key, value in used.items()})
    grid = model.quantizer.sizes[-1][0]
    for key in POSITIONS:
        if key in ours:
            ours[key] = interpolated(ours[key], grid)
    load_strictly(model, ours, f"{source}, a {NAMES[size]},")
    return model.eval()


def interpolated(positions: Float[Tensor, "1 N D"], grid: int) -> Float[Tensor, "1 M D"]:
    """Positions for another grid, as released: bicubic by the factor ``(grid + 0.1) / native``, not to a size.

    That is not what resizing to ``grid`` gives. A class token's position stays.
    """
    native = int(positions.shape[1] ** 0.5)
    first = positions.shape[1] - native**2
    if native == grid:
        return positions
    table = positions[:, first:].mT.unflatten(2, (native, native))
    factor = (grid + 0.1) / native
    table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([positions[:, :first], table.flatten(2).mT], dim=1)


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published keys without the ``vision_model.`` of older versions of transformers."""
    return {key.replace("encoder_vqkd.vision_model.", "encoder_vqkd."): value for key, value in state.items()}


def size_of(published: dict[str, Tensor], source: str) -> str:
    """Which of the released sizes a state dict is: a key of :data:`NAMES`.

    Raises:
        UserError: if it is none of them.
    """
    keys = without_prefix(published).keys()
    for size, mark in MARKS.items():
        if mark in keys:
            return size
    raise UserError(f"{source} holds no TokenFlow tokenizer: it has none of {', '.join(MARKS.values())}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the authors' code.

    Raises:
        UserError: if it is no torch file, holds objects that a file of weights should not, or has no weights.
    """
    content = load_torch_file(path)
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            return content[name]
    raise UserError(f"{path} is no checkpoint of TokenFlow: it has no weights called {', '.join(CONTAINERS)}")
