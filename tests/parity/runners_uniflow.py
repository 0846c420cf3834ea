"""UniFlow; imported by ``runners.py``."""

import re

import torch
from einops import rearrange
from harness import runner

from vistok.nn.vision_teacher import make_tower
from vistok.tokenizers.uniflow_published import PUBLISHED_KEYS, from_state, resample_encoder, sizes_of


def encoder_args(case):
    args = sizes_of(PUBLISHED_KEYS.to_ours(case.weights()))["encoder_args"]
    return {**args, "num_heads": case.config["encoder_heads"]}


def model_of(case):
    """The whole model: the keys of a case are those of all parts, whichever it looks at."""
    heads = case.config["global_block_heads"]
    return from_state(case.weights(), case.name, encoder_args=encoder_args(case), global_heads=heads)


def by_pixel(rows):
    """The values of patches, channel by channel, in our order."""
    return rearrange(rows, "n (c v) -> n (v c)", c=3)


def by_channel(rows):
    return rearrange(rows, "n (v c) -> n (c v)", c=3)


def noise_images(rows, model):
    (h, w), p = model.encoder.grid, model.encoder.patch_size
    return rearrange(rows, "(b h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


@runner("encoder (InternViT): patch embedding, CLS, positions, pre-norm blocks with layer scale, no final norm")
@torch.no_grad()
def encoder(case):
    model, pixels = model_of(case), case.inputs["pixel_values"]
    vit = model.encoder.model
    first = vit._pos_embed(vit.patch_embed(pixels))
    prefix_and_layers = vit.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)[1]
    states = [first, *(torch.cat([prefix, layer], dim=1) for layer, prefix in prefix_and_layers)]
    return {"hidden_states": torch.stack(states), "features": model.features(model.encoder.images(pixels))}


@runner("encoder at other image sizes than the configured one (position table resized)")
@torch.no_grad()
def encoder_resized(case):
    state = PUBLISHED_KEYS.to_ours(case.weights())
    state = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    outputs = {}
    for name, pixels in case.inputs.items():
        tower = make_tower("vit_intern300m_patch14_448", img_size=tuple(pixels.shape[-2:]), **encoder_args(case)).eval()
        positions = resample_encoder(state["model.pos_embed"], tower.grid)
        tower.load_state_dict({**state, "model.pos_embed": positions})
        label = name.removeprefix("pixel_values_")
        outputs[f"embeddings_{label}"] = tower.model._pos_embed(tower.model.patch_embed(pixels))
        outputs[f"features_{label}"] = tower(tower.images(pixels)).flatten(1, 2)
    return outputs


@runner("latent projection (chal_proj down, chal_unproj up)")
def projection(case):
    model = model_of(case)
    latents = model.project(case.inputs["features"])
    return {"latents": latents, "up": model.tower.up(latents)}


@runner("condition tower: chal_unproj, first position table, global blocks, second position table")
def tower(case):
    model, seen = model_of(case), []
    for block in model.tower.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    condition = model.tower(case.inputs["latents"])
    return {"before_blocks": seen[0], "after_block_0": seen[1], "after_blocks": seen[-1], "condition": condition}


@runner("patch-wise flow head: velocity")
def velocity(case):
    model, condition = model_of(case), case.inputs["condition"]
    x = by_pixel(case.inputs["x_t"])
    outputs = {}
    for name in case.json["outputs"]:
        label = name.removeprefix("velocity_")
        time = torch.arange(len(x)) / len(x) if label == "mixed" else torch.full((len(x),), float(label.strip("t")))
        outputs[name] = by_channel(model.flow(x[None], time[None], condition[None])[0])
    return outputs


@runner("flow sampler on a given condition")
@torch.no_grad()
def sampler(case):
    model, condition = model_of(case), case.inputs["condition"]
    noise = noise_images(case.inputs["noise"], model)
    outputs = {}
    for name, output in case.json["outputs"].items():
        # Only words tell: "steps 4, schedule pow_0.25, guidance 1.0."
        steps, schedule, guidance = re.search(
            r"steps (\d+), schedule (\w[\w.]*), guidance ([\d.]*\d)", output["say"]
        ).groups()
        power = 1.0 if schedule == "linear" else float(schedule.removeprefix("pow_"))
        outputs[name] = model.sample_pixels(noise, condition, int(steps), power, float(guidance))
    return outputs


@runner("whole tokenizer: image -> features -> latents -> condition -> flow sampler -> image")
@torch.no_grad()
def end_to_end(case):
    model = model_of(case)
    images = model.encoder.images(case.inputs["pixel_values"])
    latents = model.encode(images)
    condition = model.tower(latents)
    noise = noise_images(case.inputs["noise"], model)
    outputs = {"features": model.features(images), "latents": latents, "condition": condition}
    for name in case.json["outputs"]:
        if name.startswith("reconstruction_"):
            outputs[name] = model.sample_pixels(noise, condition, int(name.split("_")[1]))
    return outputs
