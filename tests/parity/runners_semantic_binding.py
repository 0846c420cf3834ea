"""Semantic binding on tensors and on a tiny SDXL, and Follow the Flow; imported by ``runners.py``."""

from dataclasses import replace

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from harness import input_kind, runner, wave_images
from transformers import T5Config, T5EncoderModel

from vistok.key_maps import load_strictly
from vistok.merging.sdxl import OBJECTS, OFF, Controls, SemanticBinding, Texts
from vistok.merging.semantic_binding import (
    Group,
    centroids,
    entropy_loss,
    layout_loss,
    merge_groups,
    noun_distributions,
    patch,
)


def groups_of(pairs):
    return [Group(tuple(nouns), tuple(attributes)) for nouns, attributes in pairs]


@runner("Semantic binding: composite tokens")
def composite(case):
    weights = case.config["noun_weight"], case.config["attribute_weight"]
    variants = enumerate(case.config["variants"])
    return {f"e{i}": merge_groups(case.inputs["embedding"], groups_of(pairs), *weights) for i, pairs in variants}


@input_kind("maps")
def attention_maps(description):
    """Softmax of smooth images over the text rows, ``(layers, heads, pixels, rows)``."""
    layers, heads, rows, side = (description[name] for name in ("layers", "heads", "rows", "res"))
    count = layers * heads * rows
    waves = wave_images(-(-count // 3), side, description["seed"]).reshape(-1, side * side)[:count]
    return (waves.reshape(layers, heads, rows, -1) * description["gain"]).softmax(2).mT.contiguous()


@runner("Semantic binding: entropy loss, pose loss, centroids")
def entropy(case):
    side = case.config["resolution"]
    outputs = {}
    for index, variant in enumerate(case.config["variants"]):
        maps = case.inputs["maps"].clone().requires_grad_()
        average = maps.mean((0, 1))
        p = noun_distributions(average, variant["nouns"], variant["tokens"], case.config["temperature"])
        spread, centres = entropy_loss(p), centroids(p, (side, side))
        loss = spread
        if variant.get("pose"):
            loss = loss + layout_loss(centres, torch.tensor([[10.0, 16.0], [25.0, 16.0]]))
        loss.backward()
        outputs |= {"aggregate": average.unflatten(0, (side, side)), f"p{index}": p.T.unflatten(0, (side, side))}
        outputs |= {f"loss{index}": loss[None], f"entropy{index}": spread[None], f"grad{index}": maps.grad}
        outputs[f"centroid{index}"] = centres
    return outputs


@input_kind("ids")
def draws(description):
    """The random state itself: what to draw from it is said in words only."""
    return np.random.RandomState(description["seed"])


@runner("Follow the Flow: subset patching of T5 states (FLUX)")
@torch.no_grad()
def flow_patch(case):
    sizes = case.config["t5"]
    config = T5Config(
        vocab_size=sizes["vocabulary"],
        d_model=sizes["width"],
        d_kv=sizes["head_width"],
        d_ff=sizes["mlp_width"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        relative_attention_num_buckets=sizes["relative_buckets"],
        relative_attention_max_distance=sizes["relative_distance"],
        layer_norm_epsilon=sizes["norm_eps"],
        feed_forward_proj=sizes["feed_forward"].replace(" ", "-"),
    )
    model = T5EncoderModel(config).eval()
    weights = case.weights()
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    own = model.state_dict().keys()
    load_strictly(model, {key: value for key, value in weights.items() if key in own}, case.name)
    length = sizes["max_length"]
    ids = torch.zeros(2, length, dtype=torch.long)
    words = case.inputs["ids"].randint(2, sizes["vocabulary"], case.config["prompt_tokens"] - 1)
    ids[0, : len(words)] = torch.from_numpy(words)
    ids[0, len(words)] = ids[1, 0] = 1  # the end of a text
    layers = model(ids, output_hidden_states=True).hidden_states
    states, empty = layers[-1][:, None]
    outputs = {}
    for index, skipped in enumerate(case.config["skipped_layers"]):
        # Skipping no layer is not the same as not skipping: the published code then normalises the prompt twice.
        prompt = states if skipped is None else model.encoder.final_layer_norm(layers[-1 - skipped][:1])
        outputs[f"all.l{index}"] = prompt
        for kept, positions in enumerate(case.config["kept_positions"]):
            outputs[f"keep{kept}.l{index}"] = patch(prompt, empty, positions)
    return outputs


class Traced(SemanticBinding):
    """Keeps the composite tokens and the latents of the phrases of every step."""

    def __init__(self, pipe, controls):
        super().__init__(pipe, controls)
        self.trace = {}

    def bind(self, t):
        step = len(self.log.binding)
        super().bind(t)
        self.trace[f"composite{step}"] = self.context[0, self._heads]
        self.trace[f"anchor_latents{step}"] = self.phrase_latents


@runner(
    "Semantic binding: controlled sampling on a tiny random SDXL, published behaviour (its sign and scaling errors"
    " included)"
)
def controlled(case):
    sizes, noise = case.config["unet"], case.config["scheduler"]
    unet = UNet2DConditionModel(
        sample_size=sizes["latent"],
        in_channels=sizes["latent_channels"],
        out_channels=sizes["latent_channels"],
        block_out_channels=sizes["channels"],
        down_block_types=sizes["down"],
        up_block_types=sizes["up"],
        layers_per_block=sizes["layers_per_block"],
        transformer_layers_per_block=sizes["transformer_layers"],
        attention_head_dim=sizes["heads"],
        cross_attention_dim=sizes["context"],
        norm_num_groups=sizes["norm_groups"],
        use_linear_projection=sizes["linear_projection"],
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes["time_ids_width"],
        projection_class_embeddings_input_dim=sizes["pooled"] + 6 * sizes["time_ids_width"],
    ).eval()
    load_strictly(unet, case.weights(), case.name)
    scheduler = getattr(diffusers, noise["name"])(
        beta_start=noise["beta_start"],
        beta_end=noise["beta_end"],
        beta_schedule=noise["beta_schedule"],
        steps_offset=noise["steps_offset"],
        timestep_spacing=noise["timestep_spacing"],
        prediction_type=noise["prediction"],
    )
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
    )
    pipe.set_progress_bar_config(disable=True)
    settings, given = case.config, case.inputs
    binding_steps, entropy_steps = settings["control_steps"]
    controls = Controls(
        composite=settings["binding_iterations"] > 0,
        end_token_step=settings["end_token_step"],
        binding_steps=binding_steps,
        binding_iterations=settings["binding_iterations"],
        token_step_size=settings["token_step_size"],
        entropy_steps=entropy_steps,
        entropy_iterations=tuple(settings["entropy_iterations"]),
        thresholds=tuple(settings["thresholds"]),
        scale_factor=settings["scale_factor"],
        scale_range=tuple(settings["scale_range"]),
        layout=OBJECTS.layout if settings.get("pose") else (),
        map_layers=tuple(settings["map_layers"]),
        compat=True,
    )
    texts = Texts(
        prompt=given["prompt"],
        pooled=given["pooled_prompt"],
        groups=[groups_of(settings["groups"])],
        tokens=[settings["prompt_tokens"]],
        negative=given["negative"],
        negative_pooled=given["pooled_negative"],
        phrases=torch.cat([given[f"anchor{index}"] for index in range(len(settings["groups"]))]),
        clean=given["clean"],
        end=[settings["prompt_length"]],
    )
    reads, latents = [], []

    def read(module, args, kwargs, output):
        null, conditional = output[0]
        guided = null + settings["guidance"] * (conditional - null)
        reads.append((kwargs["encoder_hidden_states"], args[0][:1], guided[None]))

    def keep(pipe, step, t, tensors):
        latents.append(tensors["latents"])
        return tensors

    unet.register_forward_hook(read, with_kwargs=True)
    options = {
        "num_inference_steps": settings["steps"],
        "guidance_scale": settings["guidance"],
        "output_type": "latent",
    }
    options |= {"latents": given["latents"], "callback_on_step_end": keep}
    binding = Traced(pipe, controls)
    binding.sample(texts, **options)
    outputs = dict(binding.trace)
    for step, ((context, sample, predicted), after) in enumerate(zip(reads, latents)):
        outputs |= {f"context{step}": context, f"input{step}": sample, f"noise{step}": predicted}
        outputs[f"latents{step}"] = after
    losses = [log[0] for log in binding.log.entropy]
    counts = [len(step) for step in losses] + [0] * (settings["steps"] - len(losses))
    outputs["entropy_counts"] = torch.tensor(counts)
    outputs["entropy_losses"] = torch.tensor([loss for step in losses for loss in step])
    if steps := [torch.stack(step).T.flatten() for step in binding.log.binding if step]:
        outputs["binding_losses"] = torch.cat(steps)
    plain = SemanticBinding(pipe, replace(OFF, map_layers=controls.map_layers))
    outputs["plain_latents"] = plain.sample(texts, **options).images
    return outputs
