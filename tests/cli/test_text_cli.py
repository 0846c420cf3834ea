"""A generator conditioned on text, from captions to ``--prompt``, as a researcher types it."""

import json
import runpy
import shutil
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tiny_models.args import TINY_ARGS, VARIANTS
from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.runs import ROOT, read_state, rows, tiny_yaml
from tiny_models.text import save_t5
from vistok.checkpoint import load_generator, load_text_encoder
from vistok.cli import main

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
    export_tokenizer(root / "another", image_size=24, num_registers=4)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / "images" / split / "uncaptioned.png")
    (root / "blank.txt").write_text("\n \n")
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
    assert recorded == {"name": "t5", "args": {"path": "./../t5", "max_length": 128, "on_long": "cut", "lower": False}}
    assert load_generator(trained).text_width == 16


def test_a_prompt_is_sampled_from_anywhere(trained, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--checkpoint", trained, "--cfg-scale", 3, "--prompt")
    first = samples(run_script, tmp_path / "a", *words, "a small red circle")
    assert first.shape == (2, 24, 24, 3)
    assert np.array_equal(first, samples(run_script, tmp_path / "again", *words, "a small red circle"))
    samples(run_script, tmp_path / "empty", *words, "")
    samples(run_script, tmp_path / "away", *words, "a small red circle", "--negative-prompt", "a blue square")


def test_an_empty_prompt_is_anything_at_every_scale(trained, run_script, tmp_path):
    words = ("--checkpoint", trained, "--prompt", "", "--cfg-scale")
    plain, guided = (samples(run_script, tmp_path / scale, *words, scale) for scale in ("1", "5"))
    assert np.array_equal(plain, guided)


def test_several_prompts_take_a_row_each(trained, run_script, tmp_path):
    (tmp_path / "prompts.txt").write_text("a small red circle\n\n a large blue square \n")
    words = ("--checkpoint", trained, "--cfg-scale", 2)
    code, said, err = run_script(
        "sample.py", *words, "--prompt", "red", "--prompts", tmp_path / "prompts.txt", "--count", 3, "--out", tmp_path
    )
    assert code == 0 and said.startswith("9 samples"), err
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert images.shape == (9, 24, 24, 3)
    # The first prompt alone has the first samples.
    assert np.array_equal(images[:2], samples(run_script, tmp_path / "alone", *words, "--prompt", "red"))
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    side, gap = 72, 2
    left = grid.shape[1] - 3 * (side + gap)
    assert grid.shape[0] == 3 * (side + gap) and left > 100, "three rows, and their prompts on the left"
    for row, column in ((0, 0), (1, 2), (2, 1)):
        y, x = row * (side + gap), left + column * (side + gap)
        assert np.array_equal(grid[y : y + side : 3, x : x + side : 3], images[3 * row + column])
        assert (grid[y : y + side, :left] < 128).any(), "a prompt stands there"


def test_a_long_prompt_is_cut_with_one_line(trained, run_script, tmp_path):
    words = ("--checkpoint", trained, "--count", 1, "--out", tmp_path / "out", "--prompt")
    long = " ".join(["red"] * 200)
    with pytest.warns(UserWarning, match="t5") as caught:
        code, _, err = run_script("sample.py", *words, long, "--prompt", "red", "--negative-prompt", long)
    assert code == 0 and len(caught) == 1, err
    assert str(caught[0].message).startswith("t5: cut 2 of 3 texts after max_length=128 tokens, such as 'red red")


def test_a_long_prompt_is_refused_if_asked(trained, run_script, tmp_path):
    words = ("sample.py", "--checkpoint", trained, "--out", tmp_path / "out", "--long-prompts", "refuse", "--prompt")
    code, _, err = run_script(*words, " ".join(["red"] * 200))
    assert code == 2 and "t5: 1 of 1 texts longer than max_length=128 tokens" in err
    assert "--long-prompts" in err and not (tmp_path / "out").exists()
    code, _, err = run_script(*words, "red", "--count", 1)
    assert code == 0, err


def test_a_warning_is_one_line():
    said = []
    main(lambda: said.append(warnings.formatwarning(UserWarning("mind this"), UserWarning, "some/file.py", 3, "code")))
    assert said == ["warning: mind this\n"]


def test_guidance_without_condition_dropout_is_warned_of(trained, run_script, tmp_path):
    sure = shutil.copytree(trained, tmp_path / "sure")
    (sure / "config.yaml").write_text(
        (sure / "config.yaml").read_text().replace("condition_dropout: 0.1", "condition_dropout: 0.0")
    )
    here = ("--tokenizer", trained.parent / "tokenizer", "--text-encoder", trained.parent / "t5", "--count", 1)

    def warned(checkpoint, *words):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            words = ("--checkpoint", checkpoint, *here, "--prompt", "red", "--out", tmp_path / "out", *words)
            code, _, err = run_script("sample.py", *words)
        assert code == 0, err
        return [str(each.message) for each in caught if "dropout" in str(each.message)]

    (line,) = warned(sure, "--cfg-scale", 3)
    assert line.startswith(f"{sure} was trained without condition dropout")
    assert not warned(sure)
    assert not warned(sure, "--cfg-scale", 3, "--negative-prompt", "blue"), "a text is no unknown condition"
    assert not warned(trained, "--cfg-scale", 3)


# ---------------------------------------------------------------------- text states in a code cache


T5 = ("name=t5", "path=t5")


def extract(run_script, out, *words):
    line = ("tokens", "--tokenizer", "tokenizer", "--data", "shapes", "--data-args", "train_count=24", "val_count=8")
    code, said, err = run_script("vistok.data", *line, "--out", out, "--device", "cpu", *words)
    assert code == 0, err
    return said


def train_from(run_script, cache, out, *words):
    words = ("output=" + out, "data.name=code_cache", f"data.args.path={cache}", "trainer.val_every_updates=1", *words)
    return run_script("train.py", "--config", "text.yaml", *words)


@pytest.mark.parametrize("bits", [16, 32])
def test_cached_states_train_as_captions_read_anew(trained, run_script, monkeypatch, bits):
    monkeypatch.chdir(trained.parent)
    said = extract(run_script, f"cache_{bits}", "--text-encoder", *T5, "--text-bits", bits)
    assert said == f"wrote the tokens of 32 images, and the states of their captions, to cache_{bits}\n"
    read = (f"data.args.text_states={word}" for word in ("false", "true"))
    code, _, err = train_from(run_script, f"cache_{bits}", f"anew_{bits}", next(read))
    assert code == 0, err
    with monkeypatch.context() as patch_:
        # Not even to see whether its weights made these states.
        patch_.setattr("vistok.text_encoders.t5.build", lambda *_: pytest.fail("the text encoder was built"))
        code, _, err = train_from(run_script, f"cache_{bits}", f"cached_{bits}", next(read))
    assert code == 0, err
    recorded = [json.loads((trained.parent / f"{how}_{bits}" / "spec.json").read_text()) for how in ("anew", "cached")]
    assert recorded[0]["text_encoder"] == recorded[1]["text_encoder"]
    anew, cached = (rows(trained.parent / f"{how}_{bits}") for how in ("anew", "cached"))
    assert sum(bool(row["train/loss"]) for row in cached) == sum(bool(row["val/loss"]) for row in cached) == 2
    for one, other in zip(anew, cached, strict=True):
        for name in ("train/loss", "val/loss"):
            assert bool(one[name]) == bool(other[name])
            if one[name]:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-6 if bits == 32 else 1e-4)
    pictures = [trained.parent / f"{how}_{bits}" / "pictures" / "update_00000002.png" for how in ("anew", "cached")]
    assert bits == 16 or pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_cache_that_does_not_fit_is_one_line(trained, run_script, monkeypatch):
    monkeypatch.chdir(trained.parent)
    extract(run_script, "cache", "--text-encoder", *T5)
    code, _, err = train_from(run_script, "cache", "other", "text_encoder.args.max_length=20")
    assert code == 2 and err.startswith("error: these text states were made by text encoder ") and err.count("\n") == 1
    assert "data.args.text_states=false" in err and not (trained.parent / "other").exists()
    code, _, err = train_from(run_script, "cache", "other", "tokenizer=another")
    assert code == 2 and "these codes were made by tokenizer" in err and err.count("\n") == 1
    for words, complaint in (
        (("path=t5",), "--text-encoder: missing value for name"),
        (("name=t6",), "no text_encoder named 't6'; did you mean 't5'?"),
        (("name=t5", "pth=t5"), "--text-encoder: text_encoders.t5: unknown key 'pth'; did you mean 'path'?"),
        (("t5",), "expected key=value, got 't5'"),
    ):
        line = ("tokens", "--tokenizer", "tokenizer", "--data", "shapes", "--out", "none", "--text-encoder", *words)
        code, _, err = run_script("vistok.data", *line)
        assert code == 2 and complaint in err and err.count("\n") == 1, err


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
    torch.testing.assert_close(condition.null().states[1], load_text_encoder(trained).encode(["a blue"]).states[0])


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
    (TRAIN + " generator.args.condition=text_prefix", ["128 tokens", "room for 120", "max_length=120"]),
    (TRAIN + " data.name=folders data.args.path={root}/images", ["folders has no captions"]),
    (SAMPLE + "/generator", ["generator is conditioned on text", "--prompt TEXT"]),
    (SAMPLE + "/generator --class 3", ["generator is conditioned on text", "no --class"]),
    (SAMPLE + "/generator --prompts {root}/nowhere.txt", ["--prompts: cannot read", "nowhere.txt"]),
    (SAMPLE + "/generator --prompts {root}/blank.txt", ["--prompts:", "blank.txt has no prompt"]),
    (SAMPLE + "/classes --prompts {root}/blank.txt", ["--prompts", "classes is not: give --class"]),
    (SAMPLE + "/generator --prompt red --tokenizer {root}/another", ["another is not the tokenizer that"]),
    (SAMPLE + "/generator --prompt red --text-encoder {root}/wide", ["16 channels, got 24"]),
    (SAMPLE + "/classes --prompt red", ["--prompt", "classes is not: give --class"]),
    (SAMPLE + "/classes --negative-prompt red", ["--negative-prompt", "classes is not: give --class"]),
    (SAMPLE + "/classes --long-prompts cut", ["--long-prompts", "classes is not: give --class"]),
    (SAMPLE + "/generator --prompt red --long-prompts drop", ["--long-prompts", "drop", "refuse"]),
    (SAMPLE + "/tokenizer --prompt red", ["--prompt is for a generator", "tokenizer holds a tokenizer"]),
]


@pytest.mark.parametrize(("line", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_one_line(trained, run_script, line, parts):
    code, _, err = run_script(*line.format(root=trained.parent).split())
    said = err.split("\r")[-1]  # what stands before is a progress line, wiped
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, err
    assert all(part in said for part in parts), said
    assert not (trained.parent / "fresh").exists() and not (trained.parent / "out").exists()
