"""The generators of LlamaGen; imported by ``runners.py``."""

import torch
from harness import RUNNERS, runner

from vistok.generators import gpt, gpt_published
from vistok.generators.sampling import filter_logits
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions, TextCondition
from vistok.key_maps import load_strictly
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, TokenSpec


def published_gpt(case, **condition):
    """The generator of a case."""
    sizes = case.config
    spec = TokenSpec(Grid2D(sizes["grid"], sizes["grid"]), (sizes["vocabulary"],), 8, 16 * sizes["grid"])
    config = gpt.Config(
        width=sizes["width"],
        depth=sizes["layers"],
        heads=sizes["heads"],
        mlp_multiple=sizes["multiple_of"],
        rope_base=sizes["rope_base"],
        zero_prefix_rotation=True,
        **condition,
    )
    model = gpt.build(config, spec).eval()
    load_strictly(model, gpt_published.PUBLISHED_KEYS.to_ours(case.weights()), case.name)
    for norm in model.modules():
        if isinstance(norm, torch.nn.RMSNorm):
            norm.eps = sizes["norm_eps"]
    return model


def class_conditional_gpt(case):
    model = published_gpt(case, num_classes=case.config["classes"])
    ids, labels = case.inputs["ids"][:, :, None], case.inputs["labels"]
    forced = labels.clone()
    forced[-1] = NULL_CLASS
    with torch.no_grad():
        logits = model.logits(ids, ClassCondition(forced))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, :, 0])
    outputs = {"logits": logits, "logsumexp": logits.logsumexp(-1), "best": logits.argmax(-1), "loss": losses[None]}
    return outputs | greedy(case, model, ClassCondition(labels))


def greedy(case, model, condition):
    """What each greedy generation of a case makes of ``condition``."""
    outputs = {}
    for name, settings in case.config["greedy"].items():
        interval = settings.get("cfg_interval", -1)
        # Step 0 of the published loop makes token 1, and token 0 is always guided.
        guided = 1.0 if interval < 0 else min(1.0, (interval + 2) / model.spec.num_positions)
        options = SampleOptions(max(settings["cfg"], 1.0), guidance_interval=(0, guided), temperature=0)
        length = case.json["outputs"][f"greedy_{name}"]["shape"][1]
        rng = SampleRng.from_seed(0, len(condition))
        outputs[f"greedy_{name}"] = generate_prefix(model, condition, options, rng, length)
    return outputs


def generate_prefix(model, condition, options, rng, length):
    """The first ``length`` ids: grids have no prefixes, so generation is stopped from outside."""

    class Enough(Exception):
        pass

    if length == model.spec.num_positions:
        return model.generate(condition, options, rng).ids[:, :, 0]
    drawn = []
    sample = model.adapter.sample

    def recording(*args):
        drawn.append(sample(*args))
        if len(drawn) == length:
            raise Enough
        return drawn[-1]

    model.adapter.sample = recording
    try:
        model.generate(condition, options, rng)
    except Enough:
        pass
    finally:
        del model.adapter.sample
    return torch.cat(drawn, dim=1)[:, :, 0]


@runner("text-conditional GPT, small")
@torch.no_grad()
def text_conditional_gpt(case):
    sizes, inputs = case.config, case.inputs
    model = published_gpt(
        case,
        condition="text_prefix",
        text_width=sizes["caption_dim"],
        text_positions=sizes["condition_tokens"],
        own_null=True,
    )
    if sizes["padding_side"] == "right":
        # The published model takes a text where it is given, ours puts it on the right.
        model.condition.align = lambda states, mask: (states, mask)
    # Ours refuses an empty text, for which the published model has an answer.
    model.check_condition = lambda condition: None
    ids, mask = inputs["ids"][:, :, None], inputs["mask"].bool()
    # Nothing of an empty text is looked at: this null is the model's own.
    condition = TextCondition(inputs["features"] * mask[..., None], mask, torch.zeros(1, 1, 1), torch.zeros(1, 1) > 0)
    logits = model.logits(ids, condition)
    valid = torch.arange(len(ids)) < len(ids) - 1
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, :, 0], reduction="none")
    outputs = {"logits": logits, "logsumexp": logits.logsumexp(-1), "loss_valid": losses[valid].mean()[None]}
    return outputs | greedy(case, model, condition)


RUNNERS["class-conditional GPT, small"] = class_conditional_gpt
RUNNERS["class-conditional GPT, published size"] = class_conditional_gpt


@runner("temperature, top-k and top-p filter")
def sampler_filter(case):
    outputs = {}
    for index, setting in enumerate(case.config["settings"]):
        logits = case.inputs["logits"] / max(setting["temperature"], 1e-5)
        kept = filter_logits(logits, setting["top_k"], setting["top_p"])
        outputs[f"probs_{index}"] = kept.softmax(-1)
        outputs[f"kept_{index}"] = kept.isfinite().sum(-1)
        outputs[f"greedy_{index}"] = kept.argmax(-1)
    return outputs
