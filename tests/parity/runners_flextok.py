"""FlexTok and its autoencoder; imported by ``runners.py``."""

import re

import torch
from diffusers import AutoencoderKL
from harness import runner

from vistok.flow.guidance import guide, guide_projected
from vistok.flow.path import interpolate, target_velocity
from vistok.flow.time import logit_normal_time, mode_time
from vistok.key_maps import load_strictly
from vistok.nn.patch import sincos_2d
from vistok.quantizers.fsq import FSQ
from vistok.tokenizers import flextok, flextok_published


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
    drawn = {}
    for name, output in case.json["outputs"].items():
        count = output["shape"][0]
        if name.startswith("keep_uniform_pow2_"):
            drawn[name] = flextok.round_up_to_pow2(torch.arange(1, count + 1))
        elif name == "choices_pow2":
            drawn[name] = flextok.kept_tokens((torch.arange(count) + 0.5) / count, registers, "pow2")
    return drawn | {
        "kept_mask": (after_nested == stream).all(-1),
        "after_nested_dropout": after_nested,
        "after_null": decoder.drop(stream, keep, null),
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
    # Only words tell: "after block number 2 of the trunk (index 1 counted from 0)".
    layer = int(re.search(r"index (\d+) counted from 0", case.json["how"])[1])
    decoder.blocks[layer].register_forward_hook(lambda module, args, output: features.append(output))
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
    # Only words tell: "4 steps, w = 7.5, apg."
    steps, scale, rule = re.search(r"(\d+) steps, w = ([\d.]*\d), (\w+)", case.json["how"]).groups()
    sampling = {"steps": int(steps), "guidance": float(scale), "apg": rule == "apg"}
    with torch.no_grad():
        latents = model.encode_latent(case.inputs["image"])
        out = model.encoder(latents)
        codes, ids = model.quantizer(out)
        sampled = model.sample_latent(case.inputs["noise"], codes, case.inputs["lengths"], **sampling)
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
    image = case.inputs["image"]
    config = flextok.Config(image_size=image.shape[-1], encoder_depth=0, decoder_depth=0, num_registers=1)
    tokenizer = flextok.FlexTok(config, vae)
    with torch.no_grad():
        posterior = vae.encode(image).latent_dist
        return {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "kl": posterior.kl(),
            # ``encode_latent`` is for square images.
            "latents": posterior.mode() * tokenizer.vae_scale,
            "sampled": (posterior.mean + posterior.std * case.inputs["noise"]) * tokenizer.vae_scale,
            "decoded": tokenizer.decode_latent(case.inputs["decode_latents"]),
        }
