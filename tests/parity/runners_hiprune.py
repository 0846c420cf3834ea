"""HiPrune's selection, and what it makes of the towers of LLaVA and Qwen2.5-VL; imported by ``runners.py``."""

import math

import numpy as np
import torch
from harness import input_kind, runner, wave_images
from transformers import LlavaConfig, LlavaModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vistok.key_maps import load_strictly
from vistok.merging.hiprune import HiPrune, QwenTower, num_anchors, received_attention, select, with_neighbours


def smooth_scores(waves, seed, boosts):
    """Scores ``(B, N)`` that sum to 1: smooth, with noise, and with peaks at ``boosts[b]``."""
    values = np.exp(
        2 * waves.numpy().astype(np.float64) + 0.5 * np.random.RandomState(seed).standard_normal(waves.shape)
    )
    for row, positions in zip(values, boosts):
        row[positions] = (3 + np.arange(len(positions)) / 8) * row.max()
    return torch.from_numpy((values / values.sum(1, keepdims=True)).astype(np.float32))


@input_kind("smooth_scores")
def scores_of_tiles(description):
    batch, width, seed = (description[name] for name in ("B", "W", "seed"))
    waves = wave_images(batch, width, seed)[:, 0, : description["N"] // width].flatten(1)
    return smooth_scores(waves, seed, [description["boosts"].get(str(index), []) for index in range(batch)])


@input_kind("smooth_scores_rect")
def scores_of_a_grid(description):
    height, width, seed = (description[name] for name in ("H", "W", "seed"))
    waves = wave_images(1, max(height, width), seed)[:, 0, :height, :width].flatten(1)
    return smooth_scores(waves, seed, [description["boosts"]])


def selection(objects, deep, grid, budget, alpha, index):
    anchors = objects.topk(num_anchors(budget, alpha)).indices
    return {
        f"mask{index}": select(objects, deep, grid, budget, alpha, compat=True).long(),
        f"anchors{index}": anchors,
        f"chosen{index}": with_neighbours(anchors, grid, compat=True).sum(1),
    }


@runner("HiPrune selection for LLaVA (24 x 24 grid)")
def llava_masks(case):
    scores = case.inputs["object_scores"], case.inputs["deep_scores"]
    outputs = {}
    for index, job in enumerate(case.config["jobs"]):
        outputs |= selection(*scores, tuple(case.config["grid"]), job["budget"], job["alpha"], index)
    return outputs


@runner("HiPrune selection for Qwen2.5-VL (merged grid)")
def qwen_masks(case):
    outputs = {}
    for index, job in enumerate(case.config["jobs"]):
        scores = case.inputs[f"object_scores{index}"], case.inputs[f"deep_scores{index}"]
        grid = tuple(side // case.config["spatial_merge"] for side in job["grid"])
        budget = round(scores[0].shape[1] * job["ratio"])
        chosen = selection(*scores, grid, budget, job["alpha"], index)
        before, after = (torch.ones(job[name], dtype=torch.long) for name in ("before", "after"))
        chosen[f"positions{index}"] = torch.cat([before, chosen[f"mask{index}"][0], after]).nonzero()[:, 0]
        outputs |= {name: value[0] if name.startswith(("mask", "anchors")) else value for name, value in chosen.items()}
    return outputs


@runner("HiPrune: from attention maps to masks")
def attention_masks(case):
    layers = case.config["object_layer_1_based"] - 1, case.config["layers"] + case.config["select_layer"]
    scores = []
    for layer in layers:
        q, k = case.inputs[f"q{layer}"], case.inputs[f"k{layer}"]
        scores.append(received_attention(q, k, q.shape[-1] ** -0.5)[:, 1:] / q.shape[2])
    outputs = dict(zip(("object_scores", "deep_scores"), scores))
    side = math.isqrt(case.config["tokens"] - 1)
    for index, job in enumerate(case.config["jobs"]):
        outputs |= selection(*scores, (side, side), job["budget"], job["alpha"], index)
    return outputs


@runner("HiPrune end to end on a CLIP tower (LLaVA-1.5 path)")
@torch.no_grad()
def clip_tower(case):
    sizes = case.config["clip"]
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["mlp_width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "hidden_act": sizes["activation"],
        "layer_norm_eps": sizes["layer_norm_eps"],
    }
    text = {"model_type": "llama", "vocab_size": 8, "hidden_size": sizes["width"], "intermediate_size": 8}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=7, vision_feature_layer=case.config["select_layer"]
    )
    model = LlavaModel(config).eval()
    weights = case.weights("vision_model.")
    load_strictly(model.vision_tower, weights, case.name)
    model.multi_modal_projector = torch.nn.Identity()
    image = case.inputs["image"]
    side = sizes["image_size"] // sizes["patch_size"]
    ids = torch.full((len(image), side**2), 7)
    read = []
    model.language_model.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(ids, image)
    outputs = {"features": read[0]}
    for index, job in enumerate(case.config["jobs"]):
        layer = case.config["object_layer_1_based"]
        with HiPrune(model, job["budget"], job["alpha"], object_layer=layer, compat=True) as pruning:
            model(ids, image)
        # Ours are sums over the queries, patches and class token.
        objects, deep = (scores / (side**2 + 1) for scores in pruning.scores)
        anchors = objects.topk(num_anchors(job["budget"], job["alpha"])).indices
        outputs |= {"object_scores": objects, "deep_scores": deep, f"anchors{index}": anchors}
        outputs |= {f"mask{index}": torch.stack(pruning.masks).long(), f"kept{index}": read[-1]}
    return outputs


@runner("HiPrune end to end on Qwen2.5-VL (vision tower, selection, pruned prefill)")
@torch.no_grad()
def qwen(case):
    sizes = case.config
    vision = {
        "depth": sizes["depth"],
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["mlp_width"],
        "num_heads": sizes["heads"],
        "patch_size": sizes["patch_size"],
        "spatial_merge_size": sizes["spatial_merge"],
        "temporal_patch_size": sizes["temporal_patch"],
        "window_size": sizes["window"],
        "fullatt_block_indexes": sizes["full_attention"],
        "out_hidden_size": sizes["lm_width"],
    }
    text = {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["lm_width"],
        "intermediate_size": sizes["lm_mlp"],
        "num_hidden_layers": sizes["lm_depth"],
        "num_attention_heads": sizes["lm_heads"],
        "num_key_value_heads": sizes["lm_kv_heads"],
        "rms_norm_eps": sizes["norm_eps"],
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes["rope_theta"],
            "mrope_section": sizes["mrope_section"],
        },
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=sizes["image_id"],
        tie_word_embeddings=sizes["tie_embeddings"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    renamed = {}
    for key, value in case.weights().items():
        if key.startswith("visual."):
            key = f"model.{key}"
        elif key.startswith("model."):
            key = key.replace("model.", "model.language_model.", 1)
        renamed[key] = value
    if sizes["tie_embeddings"]:
        renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]
    load_strictly(model, renamed, case.name)
    grid = torch.tensor([sizes["grid"]])
    ids = case.inputs["input_ids"].long()
    inputs = {
        "input_ids": ids,
        "pixel_values": case.inputs["pixel_values"],
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == sizes["image_id"]).int(),
    }
    positions = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda m, args: positions.append(args[1]))
    tower = QwenTower(model.model)
    handles = [handle for layer in range(sizes["depth"]) for handle in tower.listen(layer + 1)]
    outputs = {"full.logits": model(**inputs).logits, "full.positions": positions[-1][:, 0]}
    outputs["layer_scores"] = torch.cat([tower.received(layer + 1, inputs) for layer in range(sizes["depth"])])
    for handle in handles:
        handle.remove()
    outputs["image_features"] = model.model.get_image_features(inputs["pixel_values"], grid).pooler_output[0]
    for index, job in enumerate(sizes["jobs"]):
        with HiPrune(model, job["ratio"], job["alpha"], object_layer=job["object_layer"], compat=True) as pruning:
            logits = model(**inputs).logits
        outputs |= {f"logits{index}": logits, f"positions{index}": positions[-1][:, 0]}
        outputs[f"mask{index}"] = pruning.masks[0].long()
        kept = torch.ones_like(ids[0]).masked_scatter(ids[0] == sizes["image_id"], outputs[f"mask{index}"])
        outputs[f"kept{index}"] = kept.nonzero()[:, 0]
    return outputs
