"""The text-to-image generator of TokenFlow; imported by ``runners.py``."""

import re
from functools import partial

import torch
import torch.nn.functional as F
from harness import filled, runner
from runners_tokenflow import small_config

from vistok.generators import tokenflow_t2i
from vistok.generators.sampling import Picker, filter_logits
from vistok.interfaces import SampleOptions, TextCondition
from vistok.nn.rope import rotation
from vistok.nn.transformer import Block
from vistok.rng import SampleRng
from vistok.tokenizers import tokenflow_published
from vistok.tokens import MultiScale, Tokens, TokenSpec


@runner("one decoder layer of the text-to-image model (norms after the sub-layers, QK-norm)")
@torch.no_grad()
def layer(case):
    sizes, x = case.config, case.inputs["x"]
    norm, qk_norm = (partial(torch.nn.RMSNorm, eps=sizes[name]) for name in ("rms_norm_eps", "qk_norm_eps"))
    block = Block(sizes["width"], sizes["heads"], sizes["mlp"], norm, qk_norm=qk_norm, norm_after=True)
    ours = tokenflow_t2i.published_keys(sizes["head_dim"]).to_ours(case.weights())
    block.load_state_dict({key.removeprefix("blocks.0."): value for key, value in ours.items()})
    allowed = case.inputs["allowed"].bool()
    valid = allowed.any(dim=2)
    mask = (allowed | torch.eye(x.shape[1], dtype=torch.bool))[:, None]
    positions = sizes["first_position"] + torch.arange(x.shape[1])[:, None]
    rope = rotation(positions, sizes["head_dim"], sizes["rope_base"])
    outputs = {"y": block.eval()(x, mask, rope=rope), "attention": block.attention(x, mask, rope=rope)}
    return {"valid": valid} | {name: value * valid[..., None] for name, value in outputs.items()}


@runner("guidance and top-k / top-p filter of the text-to-image sampler")
def sampler_filter(case):
    sizes, first, outputs = case.config, case.config["first_image_id"], {}
    logits = case.inputs["logits"][..., first:]
    rows = len(logits) // 2 * logits.shape[1]
    for index, setting in enumerate(sizes["settings"]):
        scale = 1 + setting["cfg"] * setting["scale"] / (sizes["number_of_scales"] - 1)
        guided = Picker(SampleOptions(), scale).guide(logits.flatten(0, 1), rows)
        kept = filter_logits(guided, setting["top_k"], setting["top_p"] or 1.0)
        if setting["top_p"] == 1:  # drops what has no probability in float32, which changes none
            kept = kept.masked_fill(kept.softmax(dim=-1) == 0, -torch.inf)
        probability = kept.softmax(dim=-1).view(-1, *logits.shape[1:])
        outputs[f"probs_{index}"] = F.pad(probability, (first, 0))
        outputs[f"kept_{index}"] = kept.isfinite().sum(dim=-1).view(probability.shape[:2])
    return outputs


SMALL_CLIP = {
    "variant": "CLIP tower",
    "semantic_encoder_patch": 16,
    "semantic_dim": 32,
    "pixel_dim": 8,
    "pixel_width_multipliers": [1, 1, 2, 2, 4],
    "decoder_res_blocks": 2,
}
"""What the generator's cases do not say of their tokenizer: as in its own cases."""


def tokenizer_of(case):
    """The tokenizer whose codes the generator of a case models."""
    given, scales = case.config["tokenizer"], case.config["scales"]
    sizes = {**SMALL_CLIP, "pixel_decoder_width": given["pixel_width"], **given}
    sizes |= {"scales": scales, "codebook_size": case.config["codebook_size"]}
    config = small_config({"run_at_image": sizes["semantic_encoder_patch"] * scales[-1], **sizes})
    state = {key: filled(key, tuple(shape)) for key, shape in case.json["tokenizer_keys"].items()}
    for pattern, factor in case.json["tokenizer_fill"].items():
        state |= {key: value * factor for key, value in state.items() if re.search(pattern, key)}
    return tokenflow_published.from_state(state, config, case.name)


@runner("text-to-image model, small: inputs, mask, logits, loss and greedy generation")
@torch.no_grad()
def small(case):
    sizes, inputs = case.config, case.inputs
    tokenizer, weights = tokenizer_of(case), case.weights()
    closing, text = inputs["closing_ids"], sizes["text_positions"]
    config = tokenflow_t2i.Config(
        width=sizes["width"],
        depth=sizes["layers"],
        heads=sizes["heads"],
        mlp_hidden=sizes["mlp"],
        norm_eps=sizes["rms_norm_eps"],
        rope_base=sizes["rope_base"],
        text_positions=text,
        opening=sizes["start_tag_tokens"],
        closing=closing.tolist(),
        text_vocabulary=sizes["first_image_id"],
    )
    layout = MultiScale(tuple((side, side) for side in sizes["scales"]))
    spec = TokenSpec(layout, (sizes["codebook_size"],), tokenizer.spec.latent_dim, tokenizer.spec.image_size_px)
    prompt, ids = inputs["prompt"], inputs["image_ids"]
    model = tokenflow_t2i.from_state(weights, config, spec, prompt[0, text:].tolist(), case.name)
    model.adopt(tokenizer)
    words = weights["model.embed_tokens.weight"]
    states, mask = words[prompt[:, :text]], prompt[:, :text] != sizes["pad_id"]
    condition = TextCondition(states, mask, states[:1], mask[:1])
    start, there, _ = model.condition.prefix(condition, model.blocks)
    # The published sequence has the last closing word too, which predicts nothing.
    last = (words[closing[-1:]] + model.levels.weight[:1]).expand(len(ids), -1, -1)
    embeds = torch.cat([model.text_sequence(start, ids), last], dim=1)
    valid = F.pad(there, (0, embeds.shape[1] - there.shape[1]), value=True)
    allowed = model.visible(slice(0, embeds.shape[1] - 1), there)[:, 0]
    allowed = F.pad(F.pad(allowed, (0, 1)), (0, 0, 0, 1), value=True) & valid[:, None] & valid[:, :, None]
    outputs = {
        "embeds": embeds,
        "allowed": allowed,
        "logits": model.logits(ids[..., None], condition),
        "loss": model.loss(Tokens(ids[..., None], spec), condition, torch.Generator()).total[None],
    }
    for name, greedy in sizes["greedy"].items():
        rounds = [[1, 0.0]] * greedy["rounds"]
        options = SampleOptions(1 + greedy["cfg"], extra={"rounds": rounds})
        batch = len(ids) // 2
        rows = [TextCondition(states[[b]], mask[[b]], states[[batch + b]], mask[[batch + b]]) for b in range(batch)]
        codes = torch.cat([model.generate(row, options, SampleRng([0])).ids for row in rows])
        outputs |= {f"greedy_{name}": codes[:, :, 0], f"image_{name}": tokenizer.decode(Tokens(codes, spec))}
    return outputs
