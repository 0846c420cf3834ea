"""What we compute for each component of the parity cases: ``RUNNERS[component](case) -> {output name: tensor}``."""

import runners_hiprune  # noqa: F401
import runners_merging  # noqa: F401
import runners_quantizers  # noqa: F401
import runners_semantic_binding  # noqa: F401
import runners_tokenflow  # noqa: F401
import runners_tokenflow_t2i  # noqa: F401
import runners_uniflow  # noqa: F401
import runners_vqgan  # noqa: F401
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from harness import RUNNERS, filled, runner

from vistok.checkpoint import KeyMap, load_strictly
from vistok.flow.guidance import guide, guide_projected
from vistok.flow.path import interpolate, target_velocity
from vistok.flow.time import logit_normal_time, mode_time
from vistok.generators import gpt, gpt_published, masked, masked_published
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.losses import cross_entropy
from vistok.generators.sampling import Picker, filter_logits
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions, TextCondition
from vistok.nn.patch import sincos_2d
from vistok.quantizers import dimensionwise
from vistok.quantizers.dimensionwise import DimensionwiseQuantizer
from vistok.quantizers.fsq import FSQ
from vistok.rng import SampleRng
from vistok.tokenizers import flextok, flextok_published, klvae, klvae_published
from vistok.tokens import Grid2D, Tokens, TokenSpec

# ---------------------------------------------------------------------- FlexTok


@runner("FSQ alone")
def fsq(case):
    quantizer = FSQ(case.config["fsq_levels"])
    values = case.inputs["values"].clone().requires_grad_()
    codes, ids = quantizer(values)
    (codes * case.inputs["weight"]).sum().backward()
    extremes = torch.tensor([0.0, 10.0, -10.0])[:, None].expand(3, quantizer.dim)
    extreme_codes, extreme_ids = quantizer(extremes)
    return {
        "bounded": quantizer.bound(values),
        "codes": codes,
        "ids": ids,
        "extreme_codes": extreme_codes,
        "extreme_ids": extreme_ids,
        "decoded": quantizer.decode(case.inputs["given_ids"]),
        "gradient": values.grad,
    }


@runner("rectified-flow noising: noise levels from given draws, noised latents, target")
def noising(case):
    latents, noise = case.inputs["latents"], case.inputs["noise"]
    outputs = {"target": target_velocity(latents, noise)}
    times = {f"mode_{scale}": mode_time(case.inputs["uniform_draws"], scale) for scale in case.config["mode_scales"]}
    times["logit_normal"] = logit_normal_time(case.inputs["normal_draws"])
    for name, time in times.items():
        outputs[f"sigma_{name}"] = time
        outputs[f"noised_{name}"] = interpolate(latents, noise, time)
    return outputs


@runner("nested dropout and null condition on the decoder's register stream")
def nested_dropout(case):
    registers = case.config["registers"]
    width = case.config["width"]
    config = flextok.Config(num_registers=registers, decoder_width=width, head_dim=width, decoder_depth=0)
    decoder = flextok.Decoder(3, 1, config)
    weights = case.weights()
    decoder.mask_token.data = weights["decoder.module_dict.dec_nested_dropout.dropout_mask_token"]
    decoder.null_token.data = weights["decoder.module_dict.dec_latent_dropout.nullcond"]
    stream, keep, null = (case.inputs[name] for name in ("stream", "keep", "null"))
    after_nested = decoder.drop(stream, keep, torch.zeros_like(null))
    choices = case.json["outputs"]["choices_pow2"]["shape"][0]
    rounded = {
        name: flextok.round_up_to_pow2(torch.arange(1, output["shape"][0] + 1))
        for name, output in case.json["outputs"].items()
        if name.startswith("keep_uniform_pow2_")
    }
    return rounded | {
        "kept_mask": (after_nested == stream).all(-1),
        "after_nested_dropout": after_nested,
        "after_null": decoder.drop(stream, keep, null),
        "choices_pow2": flextok.kept_tokens((torch.arange(choices) + 0.5) / choices, registers, "pow2"),
    }


@runner("guidance rules alone: CFG and APG with momentum")
def guidance(case):
    distances = case.inputs["scales"][:, None, None, None]
    calls = [(c, c + distances * d) for c, d in zip(case.inputs["c"], case.inputs["d"])]
    outputs = {}
    for name in case.json["outputs"]:
        rule, *settings = name.split("_")
        values = [float(setting.strip("abcdefghijklmnopqrstuvwxyz")) for setting in settings]
        guided, running = [], None
        for conditional, null in calls:
            if rule == "cfg":
                guided.append(guide(conditional, null, values[0]))
                continue
            scale, eta, threshold, momentum = values
            result, running = guide_projected(conditional, null, scale, running, momentum, eta, threshold)
            guided.append(result)
        outputs[name] = torch.stack(guided)
    return outputs


def autoencoder(sizes, case):
    """The published VAE of a case."""
    vae = AutoencoderKL(
        block_out_channels=sizes["widths"],
        down_block_types=["DownEncoderBlock2D"] * len(sizes["widths"]),
        up_block_types=["UpDecoderBlock2D"] * len(sizes["widths"]),
        layers_per_block=sizes["layers_per_block"],
        latent_channels=sizes["latent_channels"],
        norm_num_groups=sizes["groups"],
        scaling_factor=sizes["scale_factor"],
    ).eval()
    load_strictly(vae, case.weights("vae.vae."), case.name)
    return vae


class _Latents(flextok.FlexTok):
    """A FlexTok with the published weights of a case; without the case's VAE it is fed latents."""

    def __init__(self, case):
        sizes = case.config
        if "autoencoder" in sizes:
            vae = autoencoder(sizes["autoencoder"], case)
            image_size = sizes["latent_size"] * flextok.vae_downsampling(vae)
        else:
            vae = AutoencoderKL(block_out_channels=(32,), latent_channels=sizes["latent_channels"])
            image_size = sizes["latent_size"]
        config = flextok.Config(
            image_size=image_size,
            patch_size=sizes["patch"],
            num_registers=sizes["registers"],
            encoder_width=sizes["encoder"]["width"],
            encoder_depth=sizes["encoder"]["depth"],
            decoder_width=sizes["decoder"]["width"],
            decoder_depth=sizes["decoder"]["depth"],
            head_dim=sizes["encoder"]["head_dim"],
            fsq_levels=tuple(sizes["fsq_levels"]),
            max_timestep=sizes["time"]["max_timestep"],
        )
        super().__init__(config, vae)
        weights = {key: value for key, value in case.weights().items() if not key.startswith("vae.")}
        own = flextok_published.PUBLISHED_KEYS.to_published(self.state_dict())
        weights |= {key: own[key] for key in case.constants}
        load_strictly(self, flextok_published.PUBLISHED_KEYS.to_ours(weights), case.name)
        self.eval()


@runner("encoder and FSQ: latents -> register outputs -> codes and ids")
def flextok_encoder(case):
    model = _Latents(case)
    with torch.no_grad():
        out = model.encoder(case.inputs["latents"])
    codes, ids = model.quantizer(out)
    return {"registers_out": out, "bounded": model.quantizer.bound(out), "codes": codes, "ids": ids}


@runner(
    "decoder: velocity for given codes, noised latents, times, kept lengths and null flags (mixed in one batch)",
)
def flextok_velocity(case):
    model = _Latents(case)
    decoder = model.decoder
    noised, time = case.inputs["noised_latents"], case.inputs["t"].float()
    codes = model.quantizer.decode(case.inputs["ids"])
    keep, null = case.inputs["keep"], case.inputs["null"]
    features = []
    decoder.blocks[1].register_forward_hook(lambda module, args, output: features.append(output))
    everything = torch.full_like(keep, codes.shape[1])
    with torch.no_grad():
        velocity = decoder(noised, time, decoder.condition(codes, keep, null))
        all_kept = decoder(noised, time, decoder.condition(codes, everything, torch.zeros_like(null)))
        embedding = decoder.time(time)
    rows, columns = noised.shape[-2] // model.config.patch_size, noised.shape[-1] // model.config.patch_size
    return {
        "velocity": velocity,
        "velocity_all_kept": all_kept,
        "time_embedding": embedding,
        "intermediate": features[0][:, : rows * columns].unflatten(1, (rows, columns)),
    }


@runner("training step: loss and gradients with given noise level, noise, kept lengths and null flags")
def flextok_training(case):
    model = _Latents(case)
    names = ("latents", "noise", "sigma", "keep", "null")
    latents, noise, sigma, keep, null = (case.inputs[name] for name in names)
    report = model.velocity_loss(latents, noise, sigma.float(), keep, null)
    report.total.backward()
    # A weight that cannot reach the loss has no gradient of ours; the case counts it as zero.
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    published = flextok_published.PUBLISHED_KEYS.to_published(gradients)
    with torch.no_grad():
        codes, ids = model.encode(latents)
        noised = interpolate(latents, noise, sigma.float())
        velocity = model.decoder(noised, sigma.float(), model.decoder.condition(codes, keep, null))
    outputs = {
        "ids": ids,
        "velocity": velocity,
        "loss": report.total[None],
        "loss_per_sample": (velocity - target_velocity(latents, noise)).square().mean((1, 2, 3)),
        "gradient_norms": torch.stack([published[key].norm() for key in case.json["grad_keys"]]),
    }
    shown = case.json["shown_keys"]
    return outputs | {f"gradient_{index}": published[key] for index, key in enumerate(shown)}


@runner("latents -> ids -> prefixes of mixed length -> guided sampling -> latents")
def flextok_sampler(case):
    model = _Latents(case)
    noise, lengths = case.inputs["noise"], case.inputs["lengths"]
    with torch.no_grad():
        codes, ids = model.encode(case.inputs["latents"])
        outputs = {"ids": ids}
        for name in case.json["outputs"]:
            if name == "ids":
                continue
            _, steps, _, rule, *scale = name.split("_")
            weight = float(scale[-1]) if scale else 1.0
            # "ramp" is a guidance scale that falls with the time.
            strength = (lambda time, weight=weight: 1 + weight * time) if "ramp" in scale else weight
            outputs[name] = model.sample_latent(noise, codes, lengths, int(steps), strength, apg=rule == "apg")
    return outputs


@runner("image -> autoencoder -> ids -> prefixes -> guided sampling -> autoencoder -> image")
def flextok_image_to_image(case):
    model = _Latents(case)
    with torch.no_grad():
        latents = model.encode_latent(case.inputs["image"])
        out = model.encoder(latents)
        codes, ids = model.quantizer(out)
        sampled = model.sample_latent(case.inputs["noise"], codes, case.inputs["lengths"], 4, 7.5, apg=True)
        image = model.decode_latent(sampled)
    return {"latents": latents, "registers_out": out, "ids": ids, "sampled_latents": sampled, "image": image}


@runner("d12-d12 at published size: latents of 256 px images -> ids; velocity")
def flextok_published_size(case):
    model = _Latents(case)
    with torch.no_grad():
        out = model.encoder(case.inputs["latents"])
        codes, ids = model.quantizer(out)
        condition = model.decoder.condition(codes, case.inputs["keep"], case.inputs["null"])
        velocity = model.decoder(case.inputs["noised_latents"], case.inputs["t"].float(), condition)
    fresh = sincos_2d(*[case.config["patch_grid"]] * 2, case.config["encoder"]["width"])
    return {"registers_out": out, "ids": ids, "velocity": velocity, "sincos_table": fresh.permute(2, 0, 1)[None]}


@runner("KL autoencoder")
def kl_autoencoder(case):
    sizes = case.config
    vae = autoencoder(sizes, case)
    tokenizer = flextok.FlexTok(flextok.Config(image_size=64, encoder_depth=0, decoder_depth=0, num_registers=1), vae)
    scale = sizes["scale_factor"]
    with torch.no_grad():
        posterior = vae.encode(case.inputs["image"]).latent_dist
        return {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "kl": posterior.kl(),
            "latents": tokenizer.encode_latent(case.inputs["image"]),
            "sampled": scale * (posterior.mean + posterior.std * case.inputs["noise"]),
            "decoded": tokenizer.decode_latent(case.inputs["decode_latents"]),
        }


# ---------------------------------------------------------------------- LlamaGen


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
    return model


def class_conditional_gpt(case):
    sizes, model = case.config, published_gpt(case, num_classes=case.config["classes"])
    ids, labels = case.inputs["ids"][:, :, None], case.inputs["labels"]
    forced = labels.clone()
    forced[-1] = NULL_CLASS
    with torch.no_grad():
        logits = model.logits(ids, ClassCondition(forced))
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, :, 0])
    outputs = {"logits": logits, "logsumexp": logits.logsumexp(-1), "best": logits.argmax(-1), "loss": losses[None]}
    for name, greedy in sizes["greedy"].items():
        interval = greedy.get("cfg_interval", -1)
        # Step 0 of the published loop makes token 1, and token 0 is always guided.
        guided = 1.0 if interval < 0 else (interval + 2) / model.spec.num_positions
        options = SampleOptions(max(greedy["cfg"], 1.0), guidance_interval=(0, guided), temperature=0)
        length = case.json["outputs"][f"greedy_{name}"]["shape"][1]
        rng = SampleRng.from_seed(0, len(labels))
        outputs[f"greedy_{name}"] = generate_prefix(model, ClassCondition(labels), options, rng, length)
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
    ids, mask = inputs["ids"][:, :, None], inputs["mask"].bool()
    # Nothing of an empty text is looked at: this null is the model's own.
    condition = TextCondition(inputs["features"] * mask[..., None], mask, torch.zeros(1, 1, 1), torch.zeros(1, 1) > 0)
    logits = model.logits(ids, condition)
    valid = torch.arange(len(ids)) < len(ids) - 1
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, :, 0], reduction="none")
    outputs = {"logits": logits, "logsumexp": logits.logsumexp(-1), "loss_valid": losses[valid].mean()[None]}
    for name, greedy in sizes["greedy"].items():
        options = SampleOptions(greedy["cfg"], temperature=0)
        outputs[f"greedy_{name}"] = model.generate(condition, options, SampleRng.from_seed(0, len(ids))).ids[:, :, 0]
    return outputs


RUNNERS["class-conditional GPT, small"] = class_conditional_gpt
RUNNERS["class-conditional GPT, published size"] = class_conditional_gpt


@runner("temperature, top-k and top-p filter")
def sampler_filter(case):
    outputs = {}
    for index, setting in enumerate(case.config["settings"]):
        logits = case.inputs["logits"] / setting["temperature"]
        kept = filter_logits(logits, setting["top_k"], setting["top_p"])
        outputs[f"probs_{index}"] = kept.softmax(-1)
        outputs[f"kept_{index}"] = kept.isfinite().sum(-1)
        outputs[f"greedy_{index}"] = kept.argmax(-1)
    return outputs


# ---------------------------------------------------------------------- TokenBridge: autoencoder and quantizer


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
    low, high, limit = sizes["quant_min"], sizes["quant_max"], sizes["std_range"]
    edges, levels = dimensionwise.gaussian_cells(sizes["levels"], limit)
    quantizer = DimensionwiseQuantizer(x.shape[1], sizes["levels"])
    table = dimensionwise.published_levels(sizes["levels"], low, high, limit)
    quantizer.set_levels(table.expand(x.shape[1], -1))
    indices = quantizer.quantize(x.movedim(1, -1))
    values = quantizer.decode(indices).movedim(-1, 1)
    return {
        "indices": indices.movedim(-1, 1),
        "values": values,
        "levels": levels,
        "edges": edges,
        "level_values": quantizer.levels[0],
        "mse": (values - x.clamp(low, high)).square().mean()[None],
    }


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
        "decoded": model.decode(raster(case.inputs["z"]) * model.config.scaling_factor),
    }


@runner("VAE + post-training quantizer, end to end")
@torch.no_grad()
def kl16_quantized(case):
    model, sizes = kl16(case), case.config["quantizer"]
    distribution = model.posterior(case.inputs["image"])
    sample = distribution.mean + distribution.std * case.inputs["noise"]
    scaled = sample * model.config.scaling_factor
    quantizer = DimensionwiseQuantizer(scaled.shape[1], sizes["levels"])
    indices = quantizer.quantize(raster(scaled)).mT.unflatten(2, scaled.shape[2:])
    indices = torch.where(case.inputs["ambiguous"].bool(), case.stored["out.indices"], indices)
    values = quantizer.decode(raster(indices))
    return {
        "scaled_latent": scaled,
        "indices": indices,
        "quantized": values.mT.unflatten(2, scaled.shape[2:]),
        "decoded": model.decode(values),
    }


# ---------------------------------------------------------------------- TokenBridge: head and masked generator


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
        encoded = model.encode(inputs, visible, condition)
        unconditional = model.encode(inputs, visible, condition.null())
        return {
            "encoder_out": encoded,
            "z": model.decode(encoded, visible),
            "z_uncond": model.decode(unconditional, visible),
        }


RUNNERS["TokenBridge backbone"] = masked_backbone
RUNNERS["MAR backbone"] = masked_backbone


@runner("TokenBridge training loss, end to end")
def masked_training(case):
    model, inputs, levels = masked_generator(case), case.inputs, case.config["levels"]
    quantizer = DimensionwiseQuantizer(case.config["latent_channels"], levels)
    indices = quantizer.quantize(inputs["x"].flatten(2).transpose(1, 2))
    tokens, condition = Tokens(indices[..., dimensionwise.KL16_ORDER], model.spec), ClassCondition(inputs["labels"])
    hidden, visible = (part.sort(dim=1).values for part in inputs["orders"].tensor_split([inputs["num_masked"]], dim=1))
    report = model.loss_in_order(tokens, condition, inputs["orders"], inputs["num_masked"])
    with torch.no_grad():
        z = model.features(tokens.ids, visible, condition)
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
    quantizer = DimensionwiseQuantizer(sizes["latent_channels"], sizes["levels"])
    latent = quantizer.decode(outputs["indices_published"])
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
