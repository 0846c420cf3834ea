"""TokenBridge: autoencoder, quantizer, head and masked generator; imported by ``runners.py``."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from harness import RUNNERS, filled, runner

from vistok.generators import masked, masked_published
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.losses import cross_entropy
from vistok.generators.sampling import Picker
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.key_maps import KeyMap, load_strictly
from vistok.quantizers import dimensionwise
from vistok.quantizers.dimensionwise import DimensionwiseQuantizer
from vistok.tokenizers import klvae, klvae_published
from vistok.tokens import Grid2D, Tokens, TokenSpec


@runner("diagonal Gaussian posterior of the VAE")
def posterior(case):
    distribution = DiagonalGaussianDistribution(case.inputs["moments"])
    sample = distribution.mean + distribution.std * case.inputs["noise"]
    return {
        "std": distribution.std,
        "logvar": distribution.logvar,
        "sample": sample,
        "kl": distribution.kl(),
        "nll_of_sample": distribution.nll(sample),
    }


@runner("post-training quantizer")
def published_quantizer(case):
    sizes, x = case.config, case.inputs["x"]
    edges, levels = dimensionwise.gaussian_cells(sizes["levels"], sizes["std_range"])
    quantizer = quantizer_of(sizes, x.shape[1])
    indices = quantizer.quantize(x.movedim(1, -1))
    values = quantizer.decode(indices).movedim(-1, 1)
    return {
        "indices": indices.movedim(-1, 1),
        "values": values,
        "levels": levels,
        "edges": edges,
        "level_values": quantizer.levels[0],
        "mse": (values - x.clamp(sizes["quant_min"], sizes["quant_max"])).square().mean()[None],
    }


def quantizer_of(sizes, channels):
    """The post-training quantizer of ``sizes``: one table for all channels."""
    quantizer = DimensionwiseQuantizer(channels, sizes["levels"])
    table = dimensionwise.published_levels(*(sizes[name] for name in ("levels", "quant_min", "quant_max", "std_range")))
    quantizer.set_levels(table.expand(channels, -1))
    return quantizer


def kl16(case):
    """The published autoencoder, at the size of the case's images."""
    model = klvae.KLVAE(klvae.Config(image_size=case.inputs["image"].shape[-1]))
    load_strictly(model, klvae_published.KL16_KEYS.to_ours(case.weights()), case.name)
    return model.eval()


def raster(latents):
    return latents.flatten(2).mT


@runner("KL-16 VAE")
@torch.no_grad()
def kl16_autoencoder(case):
    model = kl16(case)
    distribution = model.posterior(case.inputs["image"])
    return {
        "moments": distribution.parameters,
        "posterior_sample": distribution.mean + distribution.std * case.inputs["noise"],
        "kl": distribution.kl(),
        # ``decode`` is for the grid of the images.
        "decoded": model.vae.decode(case.inputs["z"]).sample,
    }


@runner("VAE + post-training quantizer, end to end")
@torch.no_grad()
def kl16_quantized(case):
    model, sizes = kl16(case), case.config["quantizer"]
    distribution = model.posterior(case.inputs["image"])
    sample = distribution.mean + distribution.std * case.inputs["noise"]
    scaled = sample * model.config.scaling_factor
    quantizer = quantizer_of(sizes, scaled.shape[1])
    indices = quantizer.quantize(raster(scaled)).mT.unflatten(2, scaled.shape[2:])
    indices = torch.where(case.inputs["ambiguous"].bool(), case.stored["out.indices"], indices)
    values = quantizer.decode(raster(indices))
    return {
        "scaled_latent": scaled,
        "indices": indices,
        "quantized": values.mT.unflatten(2, scaled.shape[2:]),
        "decoded": model.decode(values),
    }


class _Forced:
    """A :class:`Picker` that keeps the logits it is shown and takes given codes."""

    def __init__(self, codes):
        self.codes, self.options, self.seen = codes, SampleOptions(), []

    def guide(self, predictions, rows):
        return predictions

    def __call__(self, logits, uniform):
        self.seen.append(logits)
        return self.codes[:, len(self.seen) - 1]


@runner("dimension-wise autoregressive head")
def dimensionwise_head(case):
    sizes, inputs = case.config, case.inputs
    spec = TokenSpec(Grid2D(1, 1), (sizes["levels"],) * sizes["dimensions"], sizes["dimensions"], 16)
    config = head_config(sizes)
    head = DimensionwiseHead(spec, sizes["feature_width"], config).eval()
    ours = KeyMap("head", masked_published.HEAD_RULES).to_ours(case.weights())
    backbone_side = {key: value for key, value in head.state_dict().items() if key.startswith("embedding.")}
    load_strictly(head, {key.removeprefix("adapter."): value for key, value in ours.items()} | backbone_side, case.name)

    z, tokens = inputs["z"].requires_grad_(), inputs["tokens"].long()
    logits = head.logits(z[:, None], tokens[:, None])[:, 0]
    loss = cross_entropy(head.logits(z[:, None], tokens[:, None]), tokens[:, None]).mean()
    (gradient,) = torch.autograd.grad(loss, z)
    outputs = {"train_logits": logits, "loss": loss[None], "loss_grad_z": gradient}
    features = {"": (z, 1.0)}
    if "z_uncond" in inputs:
        features["_cfg"] = torch.cat([z, inputs["z_uncond"]]), inputs["cfg_scale"]
    uniform = torch.zeros(len(z), 1, sizes["dimensions"])
    with torch.no_grad():
        for name in ("published", "consistent"):
            config.step_in_first_input = name == "published"
            for suffix, (rows, scale) in features.items():
                pick = Picker(SampleOptions(temperature=0), scale)
                outputs[f"greedy_{name}{suffix}"] = head.sample(rows, uniform, pick)[:, 0]
        config.step_in_first_input = True
        head.sample(z, uniform, forced := _Forced(tokens))
    outputs["sample_logits"] = torch.stack(forced.seen, dim=1)
    outputs["sample_probs"] = (outputs["sample_logits"] / 0.9).softmax(-1)
    return outputs


def head_config(sizes):
    names = {"width": "head_width", "depth": "head_depth", "heads": "head_heads"}
    return HeadConfig(**{ours: sizes.get(theirs, 1) for ours, theirs in names.items()}, dropout=sizes["dropout"])


def masked_generator(case, **options):
    """The published model of a case; where the case has only its backbone, with a head of its own."""
    sizes, channels = case.config, case.config["latent_channels"]
    config = masked.Config(
        width=sizes["encoder_width"],
        depth=sizes["encoder_depth"],
        heads=sizes["encoder_heads"],
        buffer=sizes["buffer_size"],
        num_classes=sizes["num_classes"],
        head=head_config(sizes),
        dropout=sizes["dropout"],
        **options,
    )
    side = round(sizes["sequence_length"] ** 0.5)
    spec = TokenSpec(Grid2D(side, side), (sizes.get("levels", 2),) * channels, channels, sizes["image_size"])
    model = masked.build(config, spec).eval()
    weights = case.weights()
    if "diffusion_pos_embed_learned" in weights:  # MAR's name
        weights["output_pos_embed"] = weights.pop("diffusion_pos_embed_learned")
    if "levels" in sizes:
        model.adapter.levels = quantizer_of(sizes, channels).levels
    own = {} if "levels" in sizes else {key: value for key, value in model.state_dict().items() if "adapter" in key}
    rules = masked_published.BACKBONE_RULES + (masked_published.HEAD_RULES if "levels" in sizes else [])
    load_strictly(model, own | KeyMap("case", rules).to_ours(weights), case.name)
    return model


def masked_backbone(case):
    model = masked_generator(case)
    mask, tokens = case.inputs["mask"].bool(), case.inputs["tokens"][..., dimensionwise.KL16_ORDER]
    visible = torch.stack([row.nonzero()[:, 0] for row in ~mask])
    inputs = model.adapter.embedding(tokens[~mask].view(*visible.shape, -1))
    condition = ClassCondition(case.inputs["labels"])
    with torch.no_grad():
        given, null = model.prefix(condition), model.prefix(condition.null())
        encoded, unconditional = (model.encode(inputs, visible, prefix) for prefix in (given, null))
        return {
            "encoder_out": encoded,
            "z": model.decode(encoded, visible, given),
            "z_uncond": model.decode(unconditional, visible, null),
        }


RUNNERS["TokenBridge backbone"] = masked_backbone
RUNNERS["MAR backbone"] = masked_backbone


@runner("TokenBridge training loss, end to end")
def masked_training(case):
    model, inputs = masked_generator(case), case.inputs
    quantizer = quantizer_of(case.config, case.config["latent_channels"])
    indices = quantizer.quantize(inputs["x"].flatten(2).transpose(1, 2))
    tokens, condition = Tokens(indices[..., dimensionwise.KL16_ORDER], model.spec), ClassCondition(inputs["labels"])
    hidden, visible = (part.sort(dim=1).values for part in inputs["orders"].tensor_split([inputs["num_masked"]], dim=1))
    report = model.loss_in_order(tokens, condition, inputs["orders"], inputs["num_masked"])
    with torch.no_grad():
        z = model.features(tokens.ids, visible, model.prefix(condition))
        rows = torch.arange(len(z))[:, None]
        targets = tokens.ids[rows, hidden]
        logits = model.adapter.logits(z[rows, hidden], targets)
    outputs = {
        "loss": report.total[None],
        "indices": indices,
        "targets": targets.flatten(0, 1),
        "z": z,
        "logits": logits.flatten(0, 1),
    }
    if "grad_names" in case.json:
        report.total.backward()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        published = masked_published.PUBLISHED_KEYS.to_published(gradients)
        outputs["grad_norms"] = torch.stack([published[name].norm() for name in case.json["grad_names"]])
    return outputs


def masked_sampling(case):
    inputs, sizes = case.inputs, case.config
    schedule = "linear" if inputs["cfg_schedule"] == "linear" else "constant"
    model = masked_generator(case, steps=inputs["num_iter"], guidance_schedule=schedule)
    options = SampleOptions(cfg_scale=float(inputs["cfg_scale"]), temperature=inputs["temperature"])
    uniform = torch.zeros(*inputs["orders"].shape, sizes["latent_channels"])
    hidden = [sizes["sequence_length"], *masked.hidden_after(sizes["sequence_length"], inputs["num_iter"])]
    outputs = {"num_predicted": torch.tensor(hidden[:-1]) - torch.tensor(hidden[1:])}
    natural = [dimensionwise.KL16_ORDER.index(channel) for channel in range(sizes["latent_channels"])]
    norms = []
    model.adapter.condition.register_forward_pre_hook(lambda module, args: norms.append(args[0].norm()))
    for name in ("published", "consistent"):
        model.adapter.config.step_in_first_input = name == "published"
        norms.clear()
        condition = ClassCondition(inputs["labels"])
        outputs[f"indices_{name}"] = model.fill(condition, options, inputs["orders"], uniform).ids[..., natural]
        steps = torch.zeros(inputs["num_iter"])
        steps[outputs["num_predicted"] > 0] = torch.stack(norms)
        outputs[f"feature_norms_{name}"] = steps
    latent = quantizer_of(sizes, sizes["latent_channels"]).decode(outputs["indices_published"])
    side = model.spec.layout.height
    outputs["latent_published"] = latent.transpose(1, 2).unflatten(2, (side, side))
    return outputs


RUNNERS["TokenBridge sampling, end to end"] = torch.no_grad()(masked_sampling)


@runner("TokenBridge sampling, end to end with VAE decoding")
@torch.no_grad()
def masked_sampling_to_image(case):
    outputs = masked_sampling(case)
    vae = klvae.KLVAE(klvae.Config(image_size=case.config["image_size"])).eval()
    weights = {key: filled(key, tuple(shape)) for key, shape in case.json["vae_keys"].items()}
    load_strictly(vae, klvae_published.KL16_KEYS.to_ours(weights), case.name)
    return outputs | {"image_published": vae.decode(outputs["latent_published"].flatten(2).mT)}
