"""A generator conditioned on text, from captions to ``--prompt``, as a researcher types it."""

import json
import runpy
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny_models.args import TINY_ARGS, VARIANTS
from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.runs import ROOT, read_state, tiny_yaml
from tiny_models.text import save_t5
from vistok.checkpoint import load_generator, load_text_encoder

GPT = {**TINY_ARGS["generators"]["gpt"], **VARIANTS["gpt"]["text"]}


def text_yaml(folder):
    """A config file: two updates of the tiny generator on captioned shapes, output in ``folder/generator``."""
    path = folder / "text.yaml"
    config = yaml.safe_load(tiny_yaml(folder).read_text())
    config |= {
        "output": str(folder / "generator"),
        "tokenizer": str(folder / "tokenizer"),
        "text_encoder": {"name": "t5", "args": {"path": str(folder / "t5")}},
        "generator": {"name": "gpt", "args": GPT},
        "data": {"name": "shapes", "batch_size": 4},
        "log": {"every_updates": 1, "pictures_every_updates": 2},
    }
    config["trainer"] |= {"max_updates": 2, "val_every_updates": 100}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, text encoders, a generator of classes, and a config."""
    root = tmp_path_factory.mktemp("world")
    export_generator(root / "classes", export_tokenizer(root / "tokenizer", image_size=24), ["ant", "bee"])
    save_t5(root / "t5")
    save_t5(root / "wide", width=24)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / "images" / split / "uncaptioned.png")
    text_yaml(root)
    return root


@pytest.fixture
def trained(world, run_script, monkeypatch):
    """The folder of the generator, trained once; its run was started beside the folders that it names."""
    monkeypatch.chdir(world)
    if not (world / "generator").exists():
        words = ("tokenizer=tokenizer", "text_encoder.args.path=t5", "output=generator")
        code, _, err = run_script("train.py", "--config", world / "text.yaml", *words)
        assert code == 0, err
    return world / "generator"


def samples(run_script, out, *words):
    code, said, err = run_script("sample.py", "--count", 2, "--out", out, *words)
    assert code == 0, err
    assert said.startswith("2 samples")
    return np.load(out / "samples.npz")["arr_0"]


def test_a_run_on_captions_trains_draws_and_says_what_reads_them(trained):
    state = read_state(trained)
    assert state["updates"] == 2
    frozen = [key for key in state["state_dict"] if "model" in key or "null" in key or "shared" in key]
    assert not frozen and any("cross_attention" in key for key in state["state_dict"])
    assert (trained / "pictures" / "update_00000002.png").is_file()
    recorded = json.loads((trained / "spec.json").read_text())["text_encoder"]
    assert recorded == {"name": "t5", "args": {"path": "./../t5", "max_length": 128}}
    assert load_generator(trained).text_width == 16


def test_a_prompt_is_sampled_from_anywhere(trained, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--checkpoint", trained, "--cfg-scale", 3, "--prompt")
    first = samples(run_script, tmp_path / "a", *words, "a small red circle")
    assert first.shape == (2, 24, 24, 3)
    assert np.array_equal(first, samples(run_script, tmp_path / "again", *words, "a small red circle"))
    samples(run_script, tmp_path / "empty", *words, "")
    samples(run_script, tmp_path / "away", *words, "a small red circle", "--negative-prompt", "a blue square")


def test_a_negative_prompt_takes_the_place_of_the_empty_text(trained):
    words = [
        "sample.py",
        "--checkpoint",
        str(trained),
        "--count",
        "2",
        "--prompt",
        "red",
        "--negative-prompt",
        "a blue",
    ]
    script = runpy.run_path(str(ROOT / "sample.py"))
    with patch("sys.argv", words):
        condition, _ = script["texts"](script["parse"](), load_generator(trained))
    assert torch.equal(condition.null().states[1], load_text_encoder(trained).encode(["a blue"]).states[0])


def test_a_text_encoder_that_has_moved(trained, run_script, tmp_path):
    alone = shutil.copytree(trained, tmp_path / "deep" / "generator")
    shutil.copytree(trained.parent / "tokenizer", tmp_path / "deep" / "tokenizer")
    words = ("--checkpoint", alone, "--prompt", "a red circle")
    code, _, err = run_script("sample.py", *words, "--out", tmp_path / "out")
    assert code == 2 and "its text encoder is not at" in err and "give it with --text-encoder" in err
    here = samples(run_script, tmp_path / "here", *words, "--text-encoder", trained.parent / "t5")
    there = samples(run_script, tmp_path / "there", "--checkpoint", trained, *words[2:])
    assert np.array_equal(here, there)


TRAIN = "train.py --config {root}/text.yaml output={root}/fresh"
SAMPLE = "sample.py --out {root}/out --checkpoint {root}"

CASES = [
    (TRAIN + " text_encoder=null", ["conditioned on text", "text_encoder.name=NAME"]),
    (TRAIN + " generator.args.condition=class_start", ["text_encoder is for a generator conditioned on text"]),
    (TRAIN + " text_encoder.name=t6", ["no text_encoder named 't6'", "did you mean 't5'?"]),
    (TRAIN + " text_encoder.args.pth=x", ["text_encoders.t5", "unknown key", "did you mean 'path'?"]),
    (TRAIN + " text_encoder.args.path=/nowhere", ["no such folder: /nowhere", "config.json"]),
    (TRAIN + " text_encoder.args.path={root}/wide", ["24 channels but the generator reads 16", "text_width=24"]),
    (TRAIN + " data.name=folders data.args.path={root}/images", ["folders has no captions"]),
    (SAMPLE + "/generator", ["generator is conditioned on text", "--prompt TEXT"]),
    (SAMPLE + "/generator --class 3", ["generator is conditioned on text", "no --class"]),
    (SAMPLE + "/generator --prompt red --text-encoder {root}/wide", ["16 channels, got 24"]),
    (SAMPLE + "/classes --prompt red", ["--prompt", "classes is not: give --class"]),
    (SAMPLE + "/classes --negative-prompt red", ["--negative-prompt", "classes is not: give --class"]),
    (SAMPLE + "/tokenizer --prompt red", ["--prompt is for a generator", "tokenizer holds a tokenizer"]),
]


@pytest.mark.parametrize(("line", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_one_line(trained, run_script, line, parts):
    code, _, err = run_script(*line.format(root=trained.parent).split())
    said = err.split("\r")[-1]  # what stands before is a progress line, wiped
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, err
    assert all(part in said for part in parts), said
    assert not (trained.parent / "fresh").exists() and not (trained.parent / "out").exists()
