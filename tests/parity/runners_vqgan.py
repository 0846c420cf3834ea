"""The convolutional autoencoder and the tokenizers of LlamaGen and VAR; imported by ``runners.py``."""

import torch
from harness import runner
from torch import nn
from torch.nn.functional import normalize

from vistok.key_maps import KeyMap, layer_rules, load_strictly
from vistok.nn.cnn import CNNDecoder, CNNEncoder
from vistok.quantizers.vq import CodebookOptions
from vistok.tokenizers import vqgan
from vistok.tokenizers.cnn_published import LLAMAGEN, VAR
from vistok.tokenizers.vqgan_published import USAGE, partly_shared, published_keys
from vistok.tokens import Tokens


@runner("pixel encoder and decoder (convolutional), with 1x1 projections")
@torch.no_grad()
def pixel_networks(case):
    sizes = case.config
    multipliers, z, dim = sizes["width_multipliers"], sizes["z_channels"], sizes["pixel_dim"]
    groups = {"groups": sizes["group_norm_groups"]}
    encoder_sizes = sizes["encoder_width"], multipliers, sizes["encoder_res_blocks"]
    decoder_sizes = sizes["decoder_width"], multipliers, sizes["decoder_res_blocks_per_level"]
    model = nn.ModuleDict(
        {
            "encoder": CNNEncoder(3, z, *encoder_sizes, **groups),
            "quant_conv": nn.Conv2d(z, dim, 1),
            "post_quant_conv": nn.Conv2d(dim, z, 1),
            "decoder": CNNDecoder(z, 3, *decoder_sizes, **groups),
        }
    )
    rules = [
        *LLAMAGEN.encoder_rules("encoder", "encoder", len(multipliers)),
        *LLAMAGEN.decoder_rules("decoder", "decoder", len(multipliers)),
        *layer_rules("quant_conv", "quant_conv"),
        *layer_rules("post_quant_conv", "post_quant_conv"),
    ]
    load_strictly(model, KeyMap(case.name, rules).to_ours(case.weights()), case.name)
    features = model.encoder(case.inputs["x"])
    latent = model.quant_conv(features)
    image = model.decoder(model.post_quant_conv(normalize(latent, dim=1)))
    return {"features": features, "latent": latent, "image": image}


def tokenizer(case, layout, **settings):
    """The published tokenizer of a case, at the size of its images."""
    sizes = case.config
    config = vqgan.Config(
        image_size=case.inputs["x"].shape[-1],
        width=sizes["width"],
        multipliers=tuple(sizes["width_multipliers"]),
        z_channels=sizes["z_channels"],
        vocab_size=sizes["codebook_size"],
        **settings,
    )
    model = vqgan.VQGAN(config).eval()
    state = {partly_shared(key): value for key, value in case.weights().items() if key not in USAGE}
    keys = published_keys(layout, len(config.multipliers))
    load_strictly(model, keys.to_ours(state), case.name)
    assert keys.to_published(model.state_dict()).keys() == state.keys()
    return model


def grid_tokenizer(case):
    sizes = case.config
    model = tokenizer(
        case,
        LLAMAGEN,
        blocks=sizes["encoder_res_blocks"],
        groups=sizes["group_norm_groups"],
        code_dim=sizes["code_dim"],
        codebook=CodebookOptions(normalized=sizes["l2_normalise"]),
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes["parameters"]
    tokens = model.tokenize(case.inputs["x"])
    latent = model.encode_map(case.inputs["x"])
    # The given ids have a grid of their own.
    grid = case.json["inputs"]["given_ids"]["grid"]
    given = model.quantizer.embed(case.inputs["given_ids"]).mT.unflatten(2, grid)
    return {
        "latent": latent,
        "ids": tokens.ids.view(len(latent), *latent.shape[2:]),
        "quantised": model.embed(tokens).mT.reshape_as(latent),
        "image": model.decode(tokens),
        "decoded": model.decode_map(given),
    }


for _size in ("small", "published size"):
    runner(f"VQ tokenizer end to end, {_size}")(torch.no_grad()(grid_tokenizer))


@runner("multi-scale VQVAE end to end, small")
@torch.no_grad()
def scale_tokenizer(case):
    sizes = case.config
    model = tokenizer(
        case,
        VAR,
        code_dim=sizes["z_channels"],
        quant_kernel=sizes["quant_conv_kernel"],
        codebook=CodebookOptions(normalized=sizes["normalise"], raw_codes=True),
        scales=tuple(sizes["scales"]),
        mode="residual",
        phi=sum("quant_resi" in key and key.endswith("weight") for key in case.json["keys"]),
        phi_ratio=abs(sizes["phi_ratio"]),
    )
    tokens = model.tokenize(case.inputs["x"])
    f_hat = model.quantizer.decode(tokens.ids[:, :, 0])
    image = model.decode(tokens)
    half = sum(side**2 for side in sizes["scales"][: len(sizes["scales"]) // 2])
    return {
        "f": model.encode_map(case.inputs["x"]),
        "ids": tokens.ids[:, :, 0],
        "f_hat": f_hat,
        "image": image.clamp(-1, 1),
        "image_raw": image,
        "image_prefix": model.decode(Tokens(tokens.ids[:, :half], model.spec)).clamp(-1, 1),
    }
