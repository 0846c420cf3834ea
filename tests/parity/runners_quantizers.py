"""Quantizers of LlamaGen, TokenFlow and VAR; imported by ``runners.py``."""

import re

import torch
from harness import runner

from vistok.quantizers.residual_multiscale import ResidualMultiscale, scale_sizes
from vistok.quantizers.shared_dual_vq import SharedDualCodebook
from vistok.quantizers.vq import Codebook, CodebookOptions


def options(sizes):
    normalized = sizes.get("l2_normalise", sizes.get("normalise_codebooks", sizes.get("normalise", True)))
    return CodebookOptions(
        normalized=normalized,
        raw_codes="normalise" in sizes,  # VAR's
        beta=sizes.get("commitment_beta", 0.25),
        entropy=sizes.get("entropy_ratio", 0.0),
    )


def dual(case):
    sizes = case.config
    weight = sizes.get("pixel_distance_weight", 1.0)
    codebook = SharedDualCodebook(
        sizes["codebook_size"], sizes["semantic_dim"], sizes["pixel_dim"], weight, options(sizes)
    )
    weights = case.weights("quantize.")
    names = ("embedding_vqkd.weight", "embedding_vqgan.weight")
    codebook.load_state_dict({f"tables.{i}": weights[name] for i, name in enumerate(names)})
    return codebook


def as_map(rows, like):
    return rows.transpose(1, 2).reshape_as(like)


@runner("vector quantizer with losses and gradients")
def vector_quantizer(case):
    sizes = case.config
    codebook = Codebook(sizes["codebook_size"], sizes["code_dim"], options(sizes))
    codebook.load_state_dict({"tables.0": case.weights("quantize.")["embedding.weight"]})
    z, g = case.inputs["z"].clone().requires_grad_(), case.inputs["g"]
    quantized = codebook(z.flatten(2).transpose(1, 2))
    codes = as_map(quantized.codes, z)
    ((codes * g).sum() + sum(quantized.terms.values())).backward()
    return {
        "ids": quantized.ids.view(len(z), *z.shape[2:]),
        "quantised": codes,
        "vq_loss": quantized.terms["codebook"][None],
        "commit_loss": quantized.terms["commitment"][None],
        "entropy_loss": quantized.terms.get("entropy", torch.zeros(()))[None],
        "grad_z": z.grad,
        "grad_codebook": codebook.tables[0].grad,
    }


def prefix_length(case):
    """Number of ids of the scales of ``q_hat_prefix``; only its description says how many."""
    scales = int(re.search(r"first (\d+) scales", case.json["outputs"]["q_hat_prefix"]["say"])[1])
    return sum(side**2 for side in case.config["scales"][:scales])


@runner("multi-scale joint two-codebook quantizer")
def joint_multiscale(case):
    sizes = case.config
    quantizer = ResidualMultiscale(dual(case), scale_sizes(sizes["scales"], sizes["grid"]))
    h, g = case.inputs["h"].clone().requires_grad_(), case.inputs["g"]
    quantized = quantizer(h)
    ((as_map(quantized.codes, h) * g).sum() + sum(quantized.terms.values())).backward()
    ids = quantizer.encode(h)
    outputs = {
        "ids": ids,
        "q_hat": as_map(quantized.codes, h),
        "vq_loss": quantized.terms["codebook"][None],
        "commit_loss": quantized.terms["commitment"][None],
        "entropy_loss": quantized.terms.get("entropy", torch.zeros(()))[None],
        "grad_h": h.grad,
        "grad_semantic_codebook": quantizer.codebook.tables[0].grad,
        "grad_pixel_codebook": quantizer.codebook.tables[1].grad,
    }
    if "q_hat_prefix" in case.json["outputs"]:
        outputs["q_hat_prefix"] = quantizer.decode(ids[:, : prefix_length(case)])
    if (dropped := sizes.get("dropped_scale_position")) is not None:
        with torch.no_grad():
            without, _ = quantizer.quantize(h, dropped)
        parts = list(without.ids.split([side**2 for side in sizes["scales"]], dim=1))
        outputs["drop_ids"] = torch.cat(parts[:dropped] + parts[dropped + 1 :], dim=1)
        outputs["drop_q_hat"] = as_map(without.codes, h)
        outputs["drop_vq_loss"] = without.terms["codebook"][None]
    return outputs


@runner("generator inputs from ids (cascade) against the tokenizer's direct sum")
def cascade_inputs(case):
    scales = case.config["scales"]
    codes = ResidualMultiscale(dual(case), scale_sizes(scales, scales[-1])).scale_codes()
    ids = case.inputs["ids"]
    inputs = codes.inputs(ids)
    # The scale to refine is named only in words.
    scale = int(re.search(r"scale number (\d+)", case.json["outputs"]["lm_inputs_refine"]["say"])[1])
    ends = [sum(side**2 for side in scales[:count]) for count in (scale, scale + 1)]
    refined = inputs.clone()
    refined[:, ends[0] - scales[0] ** 2 : ends[1] - scales[0] ** 2] = codes.refined_inputs(ids[:, : ends[1]])
    return {"lm_inputs": inputs, "lm_inputs_refine": refined, "direct_sum": codes.decode(ids)}


@runner("multi-scale residual quantizer")
def residual_multiscale(case):
    sizes = case.config
    scales = sizes["scales"]
    codebook = Codebook(sizes["codebook_size"], sizes["code_dim"], options(sizes))
    names = {"codebook.tables.0": "quantize.embedding.weight"}
    for key in case.json["keys"]:
        if "quant_resi" in key:
            number = (re.findall(r"\.(\d+)\.", key) or ["0"])[0]
            names[f"phi.{number}.{key.rsplit('.', 1)[1]}"] = key
    count = sum(name.endswith("weight") for name in names)
    quantizer = ResidualMultiscale(
        codebook, scale_sizes(scales, sizes["grid"]), count, "residual", abs(sizes["phi_ratio"])
    )
    weights = case.weights()
    quantizer.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()})
    f, g = case.inputs["f"].clone().requires_grad_(), case.inputs["g"]
    quantized = quantizer(f)
    ((as_map(quantized.codes, f) * g).sum() + sum(quantized.terms.values())).backward()
    frozen, ids = quantizer.scale_codes(), quantizer.encode(f)
    ends = [sum(side**2 for side in scales[: number + 1]) for number in range(len(scales))]
    parameters = dict(quantizer.named_parameters())
    return {
        "ids": ids,
        **{f"f_hat_{number}": frozen.decode(ids[:, :end]) for number, end in enumerate(ends)},
        "f_hat_from_ids": quantizer.decode(ids),
        "next_inputs": frozen.inputs(ids),
        "vq_loss": (quantized.terms["codebook"] + quantized.terms["commitment"])[None],
        "grad_f": f.grad,
        **{f"grad.{theirs}": parameters[ours].grad for ours, theirs in names.items()},
    }
