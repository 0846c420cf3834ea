"""Token merging against ToMe and PiToMe, functions and whole models; imported by ``runners.py``."""

import re
from functools import partial

import numpy as np
import timm
import torch
from harness import input_kind, runner
from timm.models.vision_transformer import VisionTransformer

from vistok.key_maps import load_strictly
from vistok.merging.matching import directions, positions
from vistok.merging.pitome import PiToMe, energy
from vistok.merging.schedules import Schedule
from vistok.merging.tome import ToMe
from vistok.merging.vit import merge_tokens

PARTITIONS = {(True, True): "bsm", (True, False): "bsm_first", (False, True): "bsm_last", (False, False): "ordered"}
"""By whether the first and the last block match by energy-BSM."""

MODELS = {}
"""Published models by their arguments: their weights follow from their keys, and drawing those takes seconds."""


@input_kind("clustered")
def clustered(description):
    """Keys around a few centres, some near to one and some far off."""
    random = np.random.RandomState(description["seed"])
    batch, tokens, width = (description[key] for key in "BND")
    centres = random.standard_normal((description["centres"], width))
    nearest = random.randint(0, len(centres), (batch, tokens))
    spread = random.uniform(description["low"], description["high"], (batch, tokens, 1))
    values = centres[nearest] + spread * random.standard_normal((batch, tokens, width))
    return torch.from_numpy(values.astype(np.float32))


def prefix_of(config):
    """Tokens that never merge."""
    return config["class_token"] + config.get("distill_token", False)


def token_sizes(case):
    """The sizes that a case gives its tokens: those of its prefix are 1."""
    size = case.inputs["size"][..., 0].float()
    size[:, : case.json["inputs"]["size"]["ones_prefix"]] = 1
    return size


def groups(slots):
    """The smallest position of each position's group."""
    first = torch.full_like(slots, slots.shape[1])
    first.scatter_reduce_(1, slots, torch.arange(slots.shape[1]).expand_as(slots), "amin")
    return first.gather(1, slots)


def pairs(case, name, matching):
    """Merged positions and where they went, in the order of the stored ones: they are a set."""
    sources, order = matching.sources.sort(1)
    destinations = matching.keep.gather(1, matching.targets).gather(1, order)
    ranks = case.stored[case.json["outputs"][f"{name}.src"]["stored"]].long().argsort(1).argsort(1)
    return {f"{name}.src": sources.gather(1, ranks), f"{name}.dst": destinations.gather(1, ranks)}


@runner("ToMe bipartite soft matching, weighted merge, unmerge")
def tome_matching(case):
    sizes, inputs, prefix = case.config, case.inputs, prefix_of(case.config)
    x, size = inputs["x"].clone().requires_grad_(), token_sizes(case).requires_grad_()
    outputs = {}
    for asked in sizes["requested_r"]:
        r = Schedule([asked]).merges(1, sizes["tokens"] - prefix)[0]
        matching = ToMe(in_order=False).match(inputs["metric"], r, prefix, layer=0, depth=1)
        merged, new_size = matching.merge(x, size)
        name, keep = f"r{asked}", matching.keep
        outputs |= pairs(case, name, matching) | {
            f"{name}.unm": keep[keep % 2 == 0].view(len(keep), -1),
            f"{name}.slot": matching.slots,
            f"{name}.merged": merged,
            f"{name}.new_size": new_size,
            f"{name}.merged_ones": matching.merge(x, torch.ones_like(size))[0],
            f"{name}.mean": matching.merge(x)[0],
            f"{name}.unmerged": matching.unmerge(merged),
        }
        if "grad_weight" in inputs and merged.shape == inputs["grad_weight"].shape:
            gradients = torch.autograd.grad((merged * inputs["grad_weight"]).sum(), (x, size))
            outputs |= dict(zip(("grad_x", "grad_size"), gradients))
    return outputs


@runner("ToMe: several merges in a row, sizes and sources carried along, unmerge through all of them")
def tome_chain(case):
    x, prefix = case.inputs["x"], prefix_of(case.config)
    size, slots, lengths = torch.ones(x.shape[:2]), positions(len(x), 0, x.shape[1]), []
    asked = case.config["r"]
    for layer, r in enumerate(Schedule(asked).merges(len(asked), x.shape[1] - prefix)):
        if r:
            matching = ToMe(in_order=False).match(case.inputs[f"metric_{layer}"], r, prefix, layer, len(asked))
            x, size = matching.merge(x, size)
            slots = matching.slots.gather(1, slots)
        x = x + case.inputs[f"layer_x_{layer}"]
        lengths.append(x.shape[1])
    return {
        "tokens_after_layer": torch.tensor(lengths),
        "x_final": x,
        "size_final": size,
        "slot": slots,
        "label": groups(slots),
        "unmerged": x.gather(1, slots[..., None].expand(-1, -1, x.shape[2])),
    }


def schedule_of(r, inflection=0.0):
    """Arguments of :class:`Schedule`; a whole number and a fraction are a linear one, as published."""
    linear = isinstance(r, list) and [type(value) for value in r] == [int, float]
    return dict(zip(("r", "inflection"), r if linear else (r, inflection)))


@runner("ToMe schedules of r over depth, and the tokens that remain")
def tome_schedules(case):
    outputs = {}
    for index, entry in enumerate(case.config["entries"]):
        schedule = Schedule(**schedule_of(entry["r"], entry.get("inflection", 0.0)))
        patches = entry["tokens"] - entry["protected"]
        merges = torch.tensor(schedule.merges(entry["layers"], patches))
        outputs[f"r{index}"] = torch.tensor(schedule.asked(entry["layers"]))
        outputs[f"left{index}"] = entry["tokens"] - merges.cumsum(0)
    return outputs


@runner("PiToMe energy score and order")
def pitome_energy(case):
    prefix, outputs = prefix_of(case.config), {}
    unit = directions(case.inputs["metric"][:, prefix:])
    for kind, form, margins in (("", "elu", "margins"), ("text_", "gauss", "text_margins")):
        for index, margin in enumerate(case.config[margins]):
            values = energy(unit, margin, form, case.config["alpha"])
            outputs[f"{kind}energy_m{index}"] = values
            outputs[f"{kind}order_m{index}"] = prefix + values.argsort(1, descending=True)
    return outputs


@runner("PiToMe matching: ordered-energy and energy-BSM, merge")
def pitome_matching(case):
    sizes, inputs, size = case.config, case.inputs, token_sizes(case)
    prefix = prefix_of(sizes)
    patches, outputs = sizes["tokens"] - prefix, {}
    asked = {name.rpartition(".")[0] for name in case.json["outputs"]}
    for name, matcher, q, m in (re.fullmatch(r"((\w+)\.q(\d+)\.m(\d+))", name).groups() for name in asked):
        r = Schedule(ratio=sizes["ratios"][int(q)]).merges(1, patches)[0]
        if matcher == "text":
            method = PiToMe((sizes["text"] or sizes["margins"])[int(m)], "gauss", "halves")
        else:
            method = PiToMe(sizes["margins"][int(m)], "elu", matcher, sizes["alpha"])
        matching = method.match(inputs["metric"], r, prefix, layer=0, depth=1)
        candidates = matching.keep.shape[1] - (patches // 2 if matcher == "bsm" else r)
        outputs |= pairs(case, name, matching) | {
            f"{name}.kept": matching.keep[:, prefix:candidates],
            f"{name}.candidates": matching.keep[:, candidates:],
            f"{name}.slot": matching.slots,
            f"{name}.label": groups(matching.slots),
        }
        outputs[f"{name}.merged"], outputs[f"{name}.new_size"] = matching.merge(inputs["x"], size)
    return outputs


def published_model(case):
    arguments = dict(case.config["arguments"])
    key = str(arguments)
    if key not in MODELS:
        name = arguments.pop("timm", None)
        model = timm.create_model(name, **arguments) if name else VisionTransformer(**arguments)
        load_strictly(model, case.weights(), case.name)
        MODELS[key] = model.eval()
    return MODELS[key]


def merged(model, image, name, method, weighted=False, **settings):
    """Everything that the cases of whole models say about one setting; most patches leave an average unweighted."""
    with merge_tokens(model, method, **settings) as merging:
        tokens = model.forward_features(image)
        features = model.forward_head(tokens, pre_logits=True)
    if not weighted:
        features = model.forward_head(tokens, pre_logits=True)
    slots = positions(len(tokens), 0, tokens.shape[1]) if merging.slots is None else merging.slots
    return {
        f"{name}.tokens": tokens,
        f"{name}.features": features,
        f"{name}.logits": model.head(features),
        f"{name}.counts": torch.tensor(merging.lengths),
        f"{name}.size": torch.ones(tokens.shape[:2]) if merging.size is None else merging.size,
        f"{name}.slot": slots,
        f"{name}.label": groups(slots),
    }


@torch.no_grad()
def tome_model(case, weighted=False):
    model, image = published_model(case), case.inputs["image"]
    tokens = model.forward_features(image)
    outputs = {"unmerged.logits": model.forward_head(tokens), "unmerged.tokens": tokens}
    for name, r in case.config["r"].items():
        settings = schedule_of(r) | {"proportional": case.config["prop_attn"], "weighted": weighted}
        outputs |= merged(model, image, name, ToMe(in_order=False), **settings)
    return outputs


runner("ToMe inside a timm ViT, end to end")(tome_model)
runner("ToMe with class token and size-weighted average pooling (the published MAE patch)")(
    partial(tome_model, weighted=True)
)


@runner("PiToMe inside a timm ViT, end to end")
@torch.no_grad()
def pitome_model(case):
    model, image, outputs = published_model(case), case.inputs["image"], {}
    bsm = case.config["energy_bsm"]
    method = PiToMe(case.config["margins"][0], "elu", PARTITIONS[bsm[0], bsm[-1]])
    for index, ratio in enumerate(case.config["ratios"]):
        settings = {"ratio": ratio, "proportional": case.config["prop_attn"]}
        outputs |= merged(model, image, f"q{index}", method, **settings)
    return outputs
