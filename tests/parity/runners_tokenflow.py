"""The tokenizer of TokenFlow; imported by ``runners.py``."""

import torch
from harness import runner

from vistok.tokenizers import tokenflow, tokenflow_published


def tower_args(sizes, prefix=""):
    """Arguments of timm for the semantic encoder of a case."""
    names = {"patch": "patch_size", "width": "embed_dim", "layers": "depth", "heads": "num_heads"}
    args = {name: sizes[f"{prefix}{theirs}"] for theirs, name in names.items()}
    if mlp := sizes.get(f"{prefix}mlp"):
        args["mlp_ratio"] = (mlp + 0.5) / args["embed_dim"]  # timm rounds down
    return args


def part(module, case, ours, grid):
    """``module`` (called ``ours`` in a TokenFlow) with the published weights of a case, its positions at ``grid``."""
    state = tokenflow_published.published_keys("b").to_ours(case.weights())
    for key in set(tokenflow_published.POSITIONS) & state.keys():
        state[key] = tokenflow_published.interpolated(state[key], grid)
    module.load_state_dict({key.removeprefix(f"{ours}."): value for key, value in state.items()})
    return module.eval()


@runner("semantic encoder of the B variant (CLIP vision tower) and its projection to the code dimension")
@torch.no_grad()
def semantic_encoder(case):
    sizes, outputs = case.config, {}
    for side in sizes["run_at_images"]:
        args = tower_args(sizes)
        config = tokenflow.Config(image_size=side, encoder_args=args, semantic_dim=sizes["code_dim"])
        grid = side // sizes["patch"]
        encoder = part(tokenflow.SemanticEncoder(config), case, "semantic_encoder", grid)
        features = encoder.tower(case.inputs[f"x_{side}"]).flatten(1, 2)
        outputs |= {f"features_{side}": features, f"code_{side}": encoder.head(features)}
    return outputs


@runner("semantic decoder (transformer over the semantic code map) and its output projection")
@torch.no_grad()
def semantic_decoder(case):
    sizes, outputs = case.config, {}
    config = tokenflow.Config(
        semantic_dim=sizes["input_dim"],
        semantic_decoder_width=sizes["width"],
        semantic_decoder_depth=sizes["depth"],
        semantic_decoder_heads=sizes["heads"],
    )
    for grid in sizes["run_at_grids"]:
        decoder = tokenflow.SemanticDecoder(config, grid, sizes["output_dim"])
        part(decoder, case, "semantic_decoder", grid)
        tokens = decoder.tokens(case.inputs[f"z_{grid}"].flatten(2).mT)
        outputs |= {f"tokens_{grid}": tokens, f"semantic_{grid}": decoder.head(tokens)}
    return outputs


def outputs_of(model, case):
    """What a whole tokenizer makes of the input of a case."""
    x, grid = case.inputs["x"], model.quantizer.sizes[-1]
    tokens = model.tokenize(x)
    codes = model.add_up(tokens)
    outputs = {
        "h": model.encode(x),
        "ids": tokens.ids[:, :, 0],
        "q_hat": codes.mT.unflatten(2, grid),
        "semantic": model.semantic(tokens),
        "image": model.decode(tokens),
    }
    if "prefix_image" in case.json["outputs"]:
        say = case.json["outputs"]["prefix_image"]["say"]
        scales = int("".join(filter(str.isdigit, say.split("first")[1].split("Stored")[0])))
        outputs["prefix_image"] = model.decode(tokens.prefix(model.spec.layout.prefixes[scales - 1]))
    return outputs


@torch.no_grad()
def published(case):
    sizes, weights = case.config, case.weights()
    config = tokenflow.preset(
        tokenflow_published.size_of(weights, case.name),
        **(tokenflow.ENHANCED if sizes["enhanced_decoder"] else {}),
        image_size=sizes["image"],
        scales=tuple(sizes["scales"]),
        vocab_size=sizes["codebook_size"],
        target_width=sizes["semantic_output_dim"],
    )
    return outputs_of(tokenflow_published.from_state(weights, config, case.name), case)


for _size in ("B", "L", "XL"):
    runner(f"tokenizer end to end, published size ({_size} variant)")(published)


def small_config(sizes):
    """The config of a small tokenizer."""
    siglip = sizes["variant"] == "SigLIP tower"
    levels, grid = len(sizes["pixel_width_multipliers"]), sizes["scales"][-1]
    return tokenflow.preset(
        "xl" if siglip else "b",
        image_size=sizes["run_at_image"],
        scales=tuple(sizes["scales"]),
        vocab_size=sizes["codebook_size"],
        semantic_dim=sizes["semantic_dim"],
        pixel_dim=sizes["pixel_dim"],
        encoder_args=tower_args(sizes, "semantic_encoder_") | ({"act_layer": "gelu_tanh"} if siglip else {}),
        target_width=sizes["semantic_output_dim"],
        semantic_decoder_width=sizes["semantic_decoder_width"],
        semantic_decoder_depth=sizes["semantic_decoder_depth"],
        semantic_decoder_heads=sizes["semantic_decoder_heads"],
        pixel_size=grid * 2 ** (levels - 1),
        multipliers=tuple(sizes["pixel_width_multipliers"]),
        pixel_encoder_width=sizes["pixel_width"],
        pixel_decoder_width=sizes["pixel_decoder_width"],
        pixel_decoder_blocks=sizes["decoder_res_blocks"] + 1,
        z_channels=sizes["z_channels"],
    )


@runner("tokenizer end to end, small")
@torch.no_grad()
def small(case):
    config = small_config(case.config)
    model = tokenflow_published.from_state(case.weights(), config, case.name)
    # The published XL gives back images of one size, whatever the size of those it was given.
    model.config.image_size = case.config.get("output_image", config.image_size)
    return outputs_of(model, case)
