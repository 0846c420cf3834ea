"""Released KL-VAEs: MAR's ``kl16.ckpt`` in the layout of latent diffusion, and diffusers' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from vistok.errors import UserError, first_line
from vistok.key_maps import KeyMap, KeyRule, is_repository, layer_rules, load_strictly, load_torch_file
from vistok.tokenizers.cnn_published import residual_rules
from vistok.tokenizers.klvae import KLVAE, Config, config_of


def _attention(ours: str, theirs: str) -> list[KeyRule]:
    """1 x 1 convolutions there, linear layers here."""
    rules = layer_rules(f"{ours}.group_norm", f"{theirs}.norm")
    for own, name in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        weight, bias = layer_rules(f"{ours}.{own}", f"{theirs}.{name}")
        rules += [KeyRule(weight.ours, weight.theirs, lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None]), bias]
    return rules


def latent_diffusion_keys(levels: int) -> KeyMap:
    """The layout of latent diffusion's autoencoder, which counts the decoder's levels from the image."""
    rules = [rule for name in ("quant_conv", "post_quant_conv") for rule in layer_rules(f"vae.{name}", name)]
    for part, theirs, sample, sampler in (
        ("encoder.down_blocks", "encoder.down", "downsample", "downsamplers"),
        ("decoder.up_blocks", "decoder.up", "upsample", "upsamplers"),
    ):
        for level in range(levels):
            own = f"vae.{part}.{level if part.startswith('encoder') else levels - 1 - level}"
            rules += residual_rules(f"{own}.resnets.{{i}}", f"{theirs}.{level}.block.{{i}}", "conv_shortcut")
            rules += _attention(f"{own}.attentions.{{i}}", f"{theirs}.{level}.attn.{{i}}")
            rules += layer_rules(f"{own}.{sampler}.0.conv", f"{theirs}.{level}.{sample}.conv")
    for half in ("encoder", "decoder"):
        ends = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
        rules += layer_rules(f"vae.{half}", half, ends)
        for index, block in enumerate(("block_1", "block_2")):
            rules += residual_rules(f"vae.{half}.mid_block.resnets.{index}", f"{half}.mid.{block}", "conv_shortcut")
        rules += _attention(f"vae.{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
    return KeyMap("autoencoder of latent diffusion", rules)


KL16_KEYS = latent_diffusion_keys(levels=5)


def load_published(path_or_hub_id: str, image_size: int | None = None) -> KLVAE:
    """See :meth:`KLVAE.from_published`."""
    if Path(path_or_hub_id).is_file():
        config = Config() if image_size is None else Config(image_size=image_size)
        return _loaded(config, KL16_KEYS.to_ours(_read_kl16(path_or_hub_id)), path_or_hub_id)
    vae = _read_diffusers(path_or_hub_id)
    state = {f"vae.{key}": value for key, value in vae.state_dict().items()}
    return _loaded(config_of(dict(vae.config), image_size), state, path_or_hub_id)


def _loaded(config: Config, state: dict[str, Tensor], source: str) -> KLVAE:
    model = KLVAE(config)
    load_strictly(model, {key: value.float() for key, value in state.items()}, source)
    return model.eval()


def _read_kl16(path: str) -> dict[str, Tensor]:
    content = load_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of MAR's KL-16: it holds no state dict called 'model'")
    if "encoder_pos_embed_learned" in content["model"]:
        raise UserError(f"{path} holds a generator of MAR or TokenBridge, not their autoencoder (supply kl16.ckpt)")
    return content["model"]


def _read_diffusers(path_or_hub_id: str) -> Any:
    """A diffusers ``AutoencoderKL``; of a pipeline, the one in ``vae/``.

    Raises:
        UserError: if there is none, or its weights are not exactly those of its config.
    """
    path = Path(path_or_hub_id)
    if not path.is_dir() and not is_repository(path):
        raise UserError(f"published KL-VAE not found: {path}")
    errors = []
    for subfolder in (None, "vae"):
        try:
            vae, info = AutoencoderKL.from_pretrained(path_or_hub_id, subfolder=subfolder, output_loading_info=True)
            break
        except Exception as error:  # diffusers and the hub's client raise whatever they meet
            errors.append(first_line(error))
    else:
        raise UserError(
            f"{path_or_hub_id} is no diffusers AutoencoderKL (config.json and diffusion_pytorch_model.safetensors, "
            f"there or in vae/): {errors[0]}"
        )
    if problems := [f"{name}: {keys[0]}" for name, keys in info.items() if keys]:
        raise UserError(f"{path_or_hub_id}: its weights do not fit its config: {', '.join(problems)}")
    return vae
