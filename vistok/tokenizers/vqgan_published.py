"""Released VQGANs: the VQ-16 and VQ-8 of LlamaGen, and the multi-scale tokenizer of VAR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.errors import UserError
from vistok.key_maps import KeyMap, KeyRule, layer_rules, load_strictly, load_torch_file, published_file
from vistok.quantizers.vq import CodebookOptions
from vistok.tokenizers.cnn_published import LLAMAGEN, VAR, Layout
from vistok.tokenizers.vqgan import VQGAN, Config

USAGE = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")
"""Counters of the training, which nothing reads."""

VAR_SCALES = {
    16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    64: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Sides of the scales that were released, by the side of the grid; no file tells them."""


def published_keys(layout: Layout, levels: int) -> KeyMap:
    """The layout of one of the two, for networks of ``levels`` levels."""
    rules = [
        *layout.encoder_rules("encoder", "encoder", levels),
        *layout.decoder_rules("decoder", "decoder", levels),
        *layer_rules("quant_conv", "quant_conv"),
        *layer_rules("post_quant_conv", "post_quant_conv"),
        KeyRule("quantizer.codebook.tables.0", ("quantize.embedding.weight",)),
        *layer_rules("quantizer.phi.{i}", "quantize.quant_resi.qresi_ls.{i}"),
    ]
    return KeyMap("published VQGAN", rules)


def load_published(path_or_hub_id: str, image_size: int | None = None) -> VQGAN:
    """See :meth:`VQGAN.from_published`."""
    path = published_file(path_or_hub_id, "VQGAN")
    config, ours = read_state(state_dict_of(load_torch_file(path), path), path, image_size or 256)
    model = VQGAN(config)
    load_strictly(model, {key: value.float() for key, value in ours.items()}, path)
    return model.eval()


def state_dict_of(content: Any, source: str | Path) -> dict[str, Tensor]:
    """The state dict of a release: averaged weights if it has some, in a dict of several parts or bare.

    Raises:
        UserError: if there is none.
    """
    parts = content if isinstance(content, dict) else {}
    state = parts.get("ema") or parts.get("model") or parts
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source} is no published VQGAN: it holds no state dict, bare or called 'ema' or 'model'")
    return state


def read_state(state: Mapping[str, Tensor], source: str | Path, image_size: int) -> tuple[Config, dict[str, Tensor]]:
    """Sizes and weights of a published state dict of either layout, for images of ``image_size`` px.

    Raises:
        UserError: naming the key or the size that is missing or not known.
    """
    is_var = "encoder.down.0.block.0.conv1.weight" in state
    layout = VAR if is_var else LLAMAGEN
    found = (re.match(rf"encoder\.{layout.down}\.(\d+)\.", key) for key in state)
    levels = 1 + max((int(match.group(1)) for match in found if match), default=-1)
    if not levels:
        raise UserError(f"{source} is no VQGAN of LlamaGen or VAR: encoder.conv_blocks.0.res.0.conv1.weight is missing")
    keys = published_keys(layout, levels)
    ours = keys.to_ours({partly_shared(key): value for key, value in state.items() if key not in USAGE})
    config = _sizes(ours, source, image_size, levels)
    if not is_var:
        return config, ours
    side = image_size // 2 ** (levels - 1)
    if side not in VAR_SCALES:
        sizes = ", ".join(str(known * 2 ** (levels - 1)) for known in VAR_SCALES)
        raise UserError(f"{source}: no scales were released for images of {image_size} px, only for {sizes} px")
    options = CodebookOptions(normalized=False)
    return replace(config, codebook=options, scales=VAR_SCALES[side], mode="residual"), ours


def partly_shared(key: str) -> str:
    """VAR's scales share one φ, have one each, or share some: the names of the last case, which was released."""
    return re.sub(r"quant_resi\.(\d)", r"quant_resi.qresi_ls.\1", key.replace("quant_resi.qresi.", "quant_resi.0."))


def _sizes(ours: dict[str, Tensor], source: str | Path, image_size: int, levels: int) -> Config:
    """What tensors tell of a config.

    Raises:
        UserError: if one that tells a size is missing.
    """
    try:
        width = len(ours["encoder.conv_in.bias"])
        channels = [len(ours[f"encoder.levels.{level}.res.0.conv2.bias"]) for level in range(levels)]
        vocab_size, code_dim = ours["quantizer.codebook.tables.0"].shape
        z_channels, kernel = len(ours["encoder.conv_out.bias"]), ours["quant_conv.weight"].shape[-1]
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]} is missing in our layout") from None
    return Config(
        image_size=image_size,
        width=width,
        multipliers=tuple(count // width for count in channels),
        blocks=_count(r"encoder\.levels\.0\.res\.\d+\.conv1\.bias", ours),
        z_channels=z_channels,
        quant_kernel=kernel,
        vocab_size=vocab_size,
        code_dim=code_dim,
        phi=_count(r"quantizer\.phi\.\d+\.bias", ours),
    )


def _count(pattern: str, ours: dict[str, Tensor]) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in ours)
