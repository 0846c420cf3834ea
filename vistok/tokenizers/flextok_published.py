"""The released FlexTok files: their key layout, and what only their config says.

``EPFL-VILAB/flextok_{d12_d12,d18_d18,d18_d28}_in1k`` and ``flextok_d18_d28_dfn``: one ``model.safetensors`` with
encoder, decoder and VAE, and a config, either as ``config.json`` or in the header of the file, where each part is the
``repr`` of a Python dictionary. The config is read as literals only; nothing in it is ever imported or called. Sizes
are read from the tensors, and the config only for what tensors cannot tell.
"""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vistok.errors import UserError, first_line
from vistok.files import load_weights
from vistok.key_maps import KeyMap, KeyRule, layer_rules, load_strictly, published_file
from vistok.tokenizers.flextok import Config, FlexTok, vae_downsampling

WEIGHTS, CONFIG, VAE = "model.safetensors", "config.json", "vae.vae."
PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module")


def _block_rules(ours: str, theirs: str) -> list[KeyRule]:
    return [
        KeyRule(f"{ours}.attention.qkv.weight", tuple(f"{theirs}.attn.w{part}.weight" for part in "qkv")),
        KeyRule(f"{ours}.attention.out.weight", (f"{theirs}.attn.proj.weight",)),
        KeyRule(f"{ours}.mlp.gate_up.weight", (f"{theirs}.mlp.fc1.weight", f"{theirs}.mlp.fc3.weight")),
        KeyRule(f"{ours}.mlp.down.weight", (f"{theirs}.mlp.fc2.weight",)),
    ]


def _grid_rule(ours: str, theirs: str) -> KeyRule:
    """``[1, width, rows, columns]`` <-> ``(rows, columns, width)``."""
    return KeyRule(ours, (theirs,), lambda x: x[0].permute(1, 2, 0), lambda x: x.permute(2, 0, 1)[None])


_ENC, _DEC = "encoder.module_dict", "decoder.module_dict"

PUBLISHED_KEYS = KeyMap(
    "published FlexTok",
    [
        *layer_rules("encoder.patch_in", f"{_ENC}.enc_patch_emb.patch_proj"),
        _grid_rule("encoder.positions", f"{_ENC}.enc_posemb_module.posembs"),
        KeyRule("encoder.registers", (f"{_ENC}.enc_register_module.registers",)),
        *_block_rules("encoder.blocks.{i}", f"{_ENC}.enc_transformer.blocks.{{i}}"),
        *layer_rules("encoder.head", f"{_ENC}.enc_to_latents.proj"),
        *layer_rules("decoder.codes_in", f"{_DEC}.dec_from_latents.proj"),
        KeyRule(
            "decoder.register_positions",
            (f"{_DEC}.dec_registers_posemb_module.posembs",),
            lambda x: x[0, 0].T,
            lambda x: x.T[None, None],
        ),
        KeyRule("decoder.mask_token", (f"{_DEC}.dec_nested_dropout.dropout_mask_token",)),
        KeyRule("decoder.null_token", (f"{_DEC}.dec_latent_dropout.nullcond",)),
        *layer_rules("decoder.patch_in", f"{_DEC}.dec_noise_patch_emb.patch_proj"),
        _grid_rule("decoder.positions", f"{_DEC}.dec_patches_posemb_module.posembs"),
        *layer_rules("decoder.time.mlp.{i}", f"{_DEC}.dec_time_embedder.mlp.{{i}}"),
        *_block_rules("decoder.blocks.{i}", f"{_DEC}.dec_transformer.blocks.{{i}}"),
        *layer_rules("decoder.blocks.{i}.modulation.linear", f"{_DEC}.dec_transformer.blocks.{{i}}.adaLN_modulation.1"),
        *layer_rules("decoder.head_modulation.linear", f"{_DEC}.dec_to_patches.adaLN_modulation.1"),
        *layer_rules("decoder.head", f"{_DEC}.dec_to_patches.proj"),
    ],
)
"""Encoder and decoder of the released files; their VAE keeps diffusers' names behind ``vae.vae.``."""


def load_published(path_or_hub_id: str) -> FlexTok:
    """See :meth:`FlexTok.from_published`."""
    path = published_file(path_or_hub_id, "FlexTok", CONFIG, WEIGHTS)
    state = {key: value.float() for key, value in load_weights(path).items()}
    if extra := [key for key in state if ".dec_repa" in key]:
        warnings.warn(f"{path}: {len(extra)} tensors of the alignment loss are not loaded ({extra[0]})", stacklevel=2)
    state = {key: value for key, value in state.items() if key not in extra}
    return from_state(state, read_config(path), str(path))


def from_state(state: dict[str, Tensor], published: dict[str, Any], source: str) -> FlexTok:
    """A FlexTok of a published state dict and config, both already read."""
    vae_state = {key.removeprefix(VAE): value for key, value in state.items() if key.startswith(VAE)}
    ours = PUBLISHED_KEYS.to_ours({key: value for key, value in state.items() if not key.startswith(VAE)})
    vae = make_vae(vae_state, source)
    model = FlexTok(make_config(ours, published, vae, source), vae)
    load_strictly(model, ours, source)
    return model.eval()


def read_config(weights: Path) -> dict[str, Any]:
    """The published config beside the weights, or in their header.

    Raises:
        UserError: if there is none, a part is no literal, or a part is missing.
    """
    beside = weights.with_name(CONFIG)
    try:
        if beside.is_file():
            config = json.loads(beside.read_text())
        else:
            with safe_open(weights, "pt") as file:
                config = file.metadata() or {}
        config = {key: _literal(value) for key, value in config.items() if key in PARTS}
    except (ValueError, SyntaxError, OSError, SafetensorError, AttributeError) as error:
        raise UserError(f"{weights}: its config is not readable: {first_line(error)}") from None
    if missing := [part for part in PARTS if not isinstance(config.get(part), dict)]:
        raise UserError(f"{weights}: the config of this file lacks {', '.join(missing)}: not a version that is known")
    return config


def make_config(ours: dict[str, Tensor], published: dict[str, Any], vae: Any, source: str) -> Config:
    """Sizes from the weights, the rest from the published config.

    Raises:
        UserError: naming the value that the config lacks or that is not known.
    """

    def value(part: str, *path: str) -> Any:
        found = published[part]
        for name in path:
            found = _search(found, name)
        if found is None:
            raise UserError(f"{source}: its config does not state {part}: {'.'.join(path)}")
        return found

    registers, encoder_width = ours["encoder.registers"].shape
    grid, _, decoder_width = ours["decoder.positions"].shape
    channels = vae.config.latent_channels
    patch_size = round((ours["encoder.patch_in.weight"].shape[1] / channels) ** 0.5)
    keep = value("decoder", "dec_nested_dropout", "size_sampling_mode")
    if keep not in ("uniform", "pow2", "uniform_pow2"):
        raise UserError(f"{source}: unknown size_sampling_mode {keep!r} of dec_nested_dropout")
    logit_normal = value("flow_matching_noise_module", "ln")
    return Config(
        image_size=grid * patch_size * vae_downsampling(vae),
        vae_scale=float(value("vae", "scaling_factor")),
        patch_size=patch_size,
        num_registers=registers,
        encoder_width=encoder_width,
        encoder_depth=_depth(ours, "encoder"),
        decoder_width=decoder_width,
        decoder_depth=_depth(ours, "decoder"),
        head_dim=int(_search(published["decoder"], "head_dim") or 64),  # of all released sizes
        fsq_levels=tuple(value("regularizer", "levels")),
        keep=keep,
        null_probability=float(value("decoder", "dec_latent_dropout", "dropout_prob")),
        time_density="logit_normal" if logit_normal else "mode",
        mode_scale=0.0 if logit_normal else float(value("flow_matching_noise_module", "mode_scale")),
        max_timestep=float(value("decoder", "dec_time_embedder", "max_timestep")),
        steps=25,
        guidance=7.5,
        apg=True,
    )


def make_vae(state: dict[str, Tensor], source: str) -> Any:
    """The released diffusers ``AutoencoderKL`` (4, 8 or 16 channels), in eval mode.

    Raises:
        UserError: if ``state`` does not fit it.
    """
    try:
        latent_channels = state["post_quant_conv.weight"].shape[0]
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down_blocks."))
        widths = [state[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in range(levels)]
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: it holds no VAE behind {VAE!r} ({first_line(error)})") from None
    vae: Any = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        latent_channels=latent_channels,
    )
    load_strictly(vae, state, source)
    return vae.eval()


def _depth(ours: dict[str, Tensor], part: str) -> int:
    return 1 + max(int(key.split(".")[2]) for key in ours if key.startswith(f"{part}.blocks."))


def _literal(value: Any) -> Any:
    return ast.literal_eval(value) if isinstance(value, str) else value


def _search(tree: Any, name: str) -> Any:
    """The value of the key ``name``, wherever it is in nested dictionaries; None if there is none."""
    if not isinstance(tree, dict):
        return None
    if name in tree:
        return tree[name]
    return next((found for branch in tree.values() if (found := _search(branch, name)) is not None), None)
