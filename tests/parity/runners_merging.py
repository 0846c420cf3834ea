"""Token merging against ToMe and PiToMe, functions and whole models; imported by ``runners.py``."""

import numpy as np
import timm
import torch
from harness import input_kind, runner
from timm.models.vision_transformer import VisionTransformer

from vistok.checkpoint import load_strictly
from vistok.merging.matching import directions
from vistok.merging.pitome import PiToMe, energy
from vistok.merging.schedules import Schedule
from vistok.merging.tome import ToMe
from vistok.merging.vit import merge_tokens

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
    sizes, inputs = case.config, case.inputs
    prefix = sizes["class_token"] + sizes["distill_token"]
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
        if asked == 13 and "grad_weight" in inputs:
            (merged * inputs["grad_weight"]).sum().backward()
            outputs |= {"grad_x": x.grad, "grad_size": size.grad}
    return outputs


@runner("ToMe: several merges in a row, sizes and sources carried along, unmerge through all of them")
def tome_chain(case):
    x, size, slots, lengths = case.inputs["x"], None, None, []
    for layer, r in enumerate(case.config["r"]):
        if r:
            matching = ToMe().match(case.inputs[f"metric_{layer}"], r, 1, layer, len(case.config["r"]))
            x, size = matching.merge(x, size)
            slots = matching.slots if slots is None else matching.slots.gather(1, slots)
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


@runner("ToMe schedules of r over depth, and the tokens that remain")
def tome_schedules(case):
    outputs = {}
    for index, entry in enumerate(case.config["entries"]):
        schedule = Schedule(entry["r"], inflection=entry.get("inflection", 0.0))
        patches = entry["tokens"] - entry["protected"]
        merges = torch.tensor(schedule.merges(entry["layers"], patches))
        outputs[f"r{index}"] = torch.tensor(schedule.asked(entry["layers"]))
        outputs[f"left{index}"] = entry["tokens"] - merges.cumsum(0)
    return outputs


@runner("PiToMe energy score and order")
def pitome_energy(case):
    unit = directions(case.inputs["metric"][:, 1:])
    outputs = {}
    for prefix, form, margins in (("", "elu", "margins"), ("text_", "gauss", "text_margins")):
        for index, margin in enumerate(case.config[margins]):
            values = energy(unit, margin, form)
            outputs[f"{prefix}energy_m{index}"] = values
            outputs[f"{prefix}order_m{index}"] = 1 + values.argsort(1, descending=True)
    return outputs


@runner("PiToMe matching: ordered-energy and energy-BSM, merge")
def pitome_matching(case):
    sizes, inputs = case.config, case.inputs
    size, outputs = token_sizes(case), {}
    for q, ratio in enumerate(sizes["ratios"]):
        r = Schedule(ratio=ratio).merges(1, sizes["tokens"] - 1)[0]
        for m, margin in enumerate(sizes["margins"]):
            for partition in sizes["matchers"]:
                method = PiToMe(margin, "elu", partition)
                matching = method.match(inputs["metric"], r, 1, layer=0, depth=1)
                name, candidates = f"{partition}.q{q}.m{m}", r if partition == "ordered" else (sizes["tokens"] - 1) // 2
                outputs |= pairs(case, name, matching) | {
                    f"{name}.kept": matching.keep[:, 1:-candidates],
                    f"{name}.candidates": matching.keep[:, -candidates:],
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


def merged(model, image, name, method, **settings):
    """Everything that the cases of whole models say about one setting."""
    with merge_tokens(model, method, **settings) as merging:
        tokens = model.forward_features(image)
        features = model.forward_head(tokens, pre_logits=True)
        return {
            f"{name}.tokens": tokens,
            f"{name}.features": features,
            f"{name}.logits": model.head(features),
            f"{name}.counts": torch.tensor(merging.lengths),
            f"{name}.size": merging.size,
            f"{name}.slot": merging.slots,
            f"{name}.label": groups(merging.slots),
        }


@torch.no_grad()
def tome_model(case):
    model, image = published_model(case), case.inputs["image"]
    tokens = model.forward_features(image)
    outputs = {"unmerged.logits": model.forward_head(tokens), "unmerged.tokens": tokens}
    for name, r in case.config["r"].items():
        linear = name == "linear"
        settings = {"r": r[0], "inflection": r[1]} if linear else {"r": r}
        outputs |= merged(model, image, name, "tome", proportional=case.config["prop_attn"], **settings)
    return outputs


runner("ToMe inside a timm ViT, end to end")(tome_model)
runner("ToMe with class token and size-weighted average pooling (the published MAE patch)")(tome_model)


@runner("PiToMe inside a timm ViT, end to end")
@torch.no_grad()
def pitome_model(case):
    model, image, outputs = published_model(case), case.inputs["image"], {}
    for index, ratio in enumerate(case.config["ratios"]):
        settings = {"ratio": ratio, "proportional": case.config["prop_attn"]}
        outputs |= merged(model, image, f"q{index}", "pitome_deit", **settings)
    return outputs
