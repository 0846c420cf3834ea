"""TokenBridge as a user types it: latents to draw from, a masked generator on them, its samples, and bad input."""

import argparse
import importlib
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

from tiny_models.args import TINY_ARGS
from tiny_models.models import exported_tokenizer, make_tokenizer
from tiny_models.runs import read_state, refused
from vistok.checkpoint import export, export_hash, load_generator
from vistok.cli import main
from vistok.config import Component, build, to_plain
from vistok.eval.protocol import load_result
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.masked import Config
from vistok.generators.masked import build as build_masked
from vistok.generators.masked_published import PUBLISHED_KEYS
from vistok.quantizers.dimensionwise import gaussian_cells
from vistok.tokenizers.klvae_published import latent_diffusion_keys
from vistok.tokens import Grid2D, TokenSpec


@pytest.fixture
def command(run_script, monkeypatch, capsys):
    """Runs a script or ``vistok.<module>``; gives exit code, stdout and stderr."""

    def run(name, *words):
        if name not in ("vistok.discretize", "vistok.published"):
            return run_script(name, *words)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = 0
        try:
            main(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def succeeded(result):
    code, out, err = result
    assert code == 0, err
    return out


def export_klvae(folder, change=lambda model: None, **args):
    """A tiny KL-VAE, changed."""
    model = make_tokenizer("klvae")
    if args:
        model = build("tokenizers", Component("klvae", {**to_plain(model.config), **args}))
    change(model)
    export(folder, "tokenizer", Component("klvae", to_plain(model.config)), model.spec, model.state_dict())


def dead_channel(bias):
    def change(model):
        torch.nn.init.zeros_(model.vae.quant_conv.weight.data[1])
        torch.nn.init.constant_(model.vae.quant_conv.bias.data[1], bias)

    return change


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Exports and released files, those that fit and those that do not."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(exported_tokenizer("tokenbridge").name, root / "bridge")
    shutil.copytree(exported_tokenizer("klvae").name, root / "klvae")
    export_klvae(root / "constant", dead_channel(0.0))
    export_klvae(root / "nan", dead_channel(torch.nan))
    export_klvae(root / "wide", latent_channels=5)
    fitted = {"tokenizer": str(root / "constant"), "tokenizer_hash": export_hash(root / "klvae")}
    for name, args in (("fitted", fitted), ("wider", {"tokenizer": str(root / "wide")})):
        shutil.copytree(root / "bridge", root / name)
        config = yaml.safe_load((root / name / "config.yaml").read_text())
        (root / name / "config.yaml").write_text(yaml.safe_dump({**config, "args": {**config["args"], **args}}))
    save_releases(root)
    return root


def save_releases(root):
    """``tokenbridge.pth``, ``mar.pth`` and ``kl16.ckpt`` as their authors would save tiny ones."""
    config = Config(768, 1, 12, buffer=2, num_classes=2, head=HeadConfig(16, 1, 2))
    bridge = PUBLISHED_KEYS.to_published(build_masked(config, TokenSpec(Grid2D(1, 1), (8,) * 16, 16, 16)).state_dict())
    edges, levels = gaussian_cells(8)
    constants = {"reconstruction_values": levels.float(), "boundaries": edges.float(), "channel_mask": torch.zeros(1)}
    torch.save({"model": bridge | constants, "model_ema": bridge}, root / "tokenbridge.pth")
    head = ("channel", "condition_proj", "timesteps", "token_embeddings")
    mar = {key: value for key, value in bridge.items() if not key.startswith(head)}
    mar["diffusion_pos_embed_learned"] = mar.pop("output_pos_embed")
    mar["diffloss.net.input_proj.weight"] = torch.zeros(2, 16)
    torch.save({"model": mar, "model_ema": mar, "args": argparse.Namespace(model="mar_base")}, root / "mar.pth")
    vae = make_tokenizer("klvae")
    torch.save({"model": latent_diffusion_keys(2).to_published(vae.state_dict())}, root / "kl16.ckpt")


FIT = "vistok.discretize --data digits --count 16 --levels 8 --device cpu --out {root}/out --tokenizer {root}"
TOKENS = "vistok.data tokens --data digits --device cpu --out {root}/out --tokenizer {root}"
LATENTS = "vistok.data latents --data digits --device cpu --out {root}/out"
PUBLISHED = "vistok.published"

CASES = [
    # latents that no table fits
    (FIT + "/constant", ["channel 1 is constant"]),
    (FIT + "/constant --mode published --order natural", ["channel 1 is constant"]),
    (FIT + "/nan", ["channel 1 holds values that are not finite"]),
    (FIT + "/nan --mode published --order natural", ["channel 1 holds values that are not finite"]),
    (FIT + "/klvae --levels 1", ["number of levels must lie in 2..740, got 1"]),
    (FIT + "/klvae --levels -2", ["number of levels must lie in 2..740, got -2"]),
    (FIT + "/klvae --levels 741", ["number of levels must lie in 2..740, got 741"]),
    (FIT + "/bridge", ["bridge holds a tokenizer that is discrete already"]),
    # tables of another tokenizer
    (TOKENS + "/wider", ["wider/model.safetensors does not fit", "quantizer.levels is (3, 8), expected (5, 8)"]),
    (TOKENS + "/fitted", ["is not the tokenizer that the quantizer was fitted for", "fit it again"]),
    (TOKENS + "/klvae", ["klvae holds a continuous tokenizer", "vistok.discretize"]),
    (
        "sample.py --checkpoint {root}/bridge --images digits --out {root}/out --decode steps=3",
        ["--decode: unknown option 'steps' (this model has none)"],
    ),
    # released weights of another model
    (PUBLISHED + " masked {root}/mar.pth --tokenizer {root}/bridge --out {root}/out", ["mar.pth holds a MAR model"]),
    (
        PUBLISHED + " masked {root}/kl16.ckpt --tokenizer {root}/bridge --out {root}/out",
        ["is no TokenBridge"],
    ),
    (
        PUBLISHED + " masked {root}/tokenbridge.pth --tokenizer {root}/bridge --out {root}/out",
        ["bridge makes tokens of", "the generator models"],
    ),
    (PUBLISHED + " klvae {root}/mar.pth --out {root}/out", ["mar.pth holds a generator", "kl16.ckpt"]),
    (PUBLISHED + " klvae {root}/tokenbridge.pth --out {root}/out", ["tokenbridge.pth holds a generator"]),
    # latents
    (LATENTS, ["--config --tokenizer"]),
    (LATENTS + " --tokenizer {root}/klvae --moments", ["klvae holds a continuous tokenizer"]),
    (LATENTS + " --tokenizer {root}/bridge --tokenizer-args levels=3", ["--tokenizer-args", "--config"]),
]


@pytest.mark.parametrize(("line", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_line_and_nothing_written(world, command, line, parts):
    refused(command(*line.format(root=world).split()), *parts)
    assert not (world / "out").exists()


def test_latents_are_drawn_for_a_generator_that_samples_in_fewer_steps(world, command, tmp_path):
    """From images to moments, to a masked generator trained on codes of drawn latents and resumed, to samples."""
    latents, run = tmp_path / "latents", tmp_path / "run"
    words = ("vistok.data", "latents", "--tokenizer", world / "bridge", "--moments", "--data", "digits")
    said = succeeded(command(*words, "--out", latents, "--device", "cpu", "--batch-size", 256))
    assert said == f"wrote the latents of 1797 images to {latents}\n"
    config = {
        "output": str(run),
        "tokenizer": str(world / "bridge"),
        "generator": {"name": "masked", "args": TINY_ARGS["generators"]["masked"]},
        "data": {"name": "latent_cache", "args": {"path": str(latents)}, "batch_size": 4},
        "optim": {"schedule": "constant", "lr": 0.1},
        "trainer": {"max_updates": 2, "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    train = ("train.py", "--config", tmp_path / "run.yaml")
    refused(command(*train, f"tokenizer={world / 'fitted'}"), "is not the tokenizer that the quantizer was fitted for")
    refused(
        command(*train, f"tokenizer={other_vae(world, tmp_path)}"), "latents were made by VAE", "vistok.data latents"
    )
    straight = succeeded(command(*train, f"output={tmp_path / 'straight'}", "trainer.max_updates=3"))
    assert "latent_cache, 1500 images of 16 px, 297 for validation" in straight
    succeeded(command(*train))
    succeeded(command(*train, "resume=auto", "trainer.max_updates=3"))
    state = read_state(run)
    assert (state["updates"], state["images"]) == (3, 12)
    weights, expected = (load_generator(folder).state_dict() for folder in (run, tmp_path / "straight"))
    assert all(torch.equal(value, expected[key]) for key, value in weights.items()), "resumed draws are the same"

    sample = ("sample.py", "--checkpoint", run, "--count", 4, "--device", "cpu", "--cfg-scale", 3)
    images = {}
    for sampling in ("steps=3 guidance_schedule=linear", "guidance_schedule=constant", "steps=1", ""):
        succeeded(command(*sample, "--out", tmp_path / "out", *(("--sampling", *sampling.split()) if sampling else ())))
        images[sampling] = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert np.array_equal(images["steps=3 guidance_schedule=linear"], images[""]), "the config's own values"
    assert not any(np.array_equal(images[other], images[""]) for other in ("steps=1", "guidance_schedule=constant"))
    for wrong, parts in {
        "stepz=3": ["--sampling: unknown option 'stepz'", "did you mean 'steps'?"],
        "steps=few": ["--sampling: steps must be of type int", "'few'"],
        "steps=0": ["steps must be at least 1, got 0"],
        "guidance_schedule=cosine": ["one of constant, linear", "got 'cosine'"],
    }.items():
        refused(command(*sample, "--out", tmp_path / "bad", "--sampling", wrong), *parts)
    measure = ("vistok.eval", "generation", "--checkpoint", run, "--data", "digits", "--count", 8, "--device", "cpu")
    prints = []
    for steps in (3, 1):
        succeeded(command(*measure, "--no-copies", "--out", tmp_path / str(steps), "--sampling", f"steps={steps}"))
        protocol, *_ = load_result(tmp_path / str(steps) / "generation.json")
        assert protocol.settings["sampling"]["steps"] == steps
        assert protocol.settings["sampling"]["guidance_schedule"] == "linear"
        prints.append(protocol.fingerprint)
    assert prints[0] != prints[1]


def other_vae(world, folder):
    """A TokenBridge of the same shape over another KL-VAE."""
    export_klvae(folder / "vae", lambda model: torch.nn.init.ones_(model.vae.quant_conv.bias))
    component = Component("tokenbridge", {"tokenizer": str(folder / "vae"), "levels": 8})
    model = build("tokenizers", component)
    helpers = model.frozen_helpers
    export(folder / "other", "tokenizer", component, model.spec, model.state_dict(), helpers=helpers)
    return folder / "other"
