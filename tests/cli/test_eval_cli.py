"""``python -m vistok.eval`` from exports to tables, on tiny models with random weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models.exports import export_tokenizer
from vistok.checkpoint import export, export_hash
from vistok.cli import main
from vistok.config import Component, build
from vistok.eval.__main__ import run

TOKENIZER = Component(
    "flextok",
    {
        "image_size": 16,
        "patch_size": 4,
        "num_registers": 4,
        "encoder_width": 16,
        "encoder_depth": 1,
        "decoder_width": 16,
        "decoder_depth": 1,
        "head_dim": 8,
        "fsq_levels": [4, 4],
        "steps": 2,
    },
)
GENERATOR = Component("gpt", {"width": 16, "depth": 1, "heads": 2, "num_classes": 10, "mlp_multiple": 8})


def randomise(model, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = build("tokenizers", TOKENIZER)
    randomise(tokenizer, 0)
    export(folder / "tokenizer", "tokenizer", TOKENIZER, tokenizer.spec, tokenizer.state_dict(), {"weights": "ema"})
    generator = build("generators", GENERATOR, tokenizer.spec)
    randomise(generator, 1)
    extra = {"weights": "ema", "tokenizer": "../tokenizer", "tokenizer_hash": export_hash(folder / "tokenizer")}
    export(folder / "generator", "generator", GENERATOR, generator.spec, generator.state_dict(), extra)
    return folder


def call(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of ``python -m vistok.eval words``, in this process to save time."""
    monkeypatch.setattr(sys, "argv", ["vistok.eval", *map(str, words)])
    code = 0
    try:
        main(run)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def evaluate(monkeypatch, capsys):
    return lambda *words: call(monkeypatch, capsys, *words)


def refused(result, *parts):
    code, _, err = result
    line = err.split("\r")[-1]  # what stands before is a progress bar, wiped
    assert code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    for part in parts:
        assert part in line


def test_reconstruction_generation_compare_and_report(runs, evaluate):
    words = ("reconstruction", "--checkpoint", runs / "tokenizer", "--data", "digits", "--count", 40)
    code, out, err = evaluate(*words, "--decode", "steps=1", "guidance=1")
    assert code == 0, err
    result = json.loads((runs / "tokenizer" / "eval" / "reconstruction.json").read_text())
    assert result["fingerprint"] in out
    assert list(result["metrics"]["tokens"]) == ["1", "2", "4"]
    assert set(result["metrics"]["tokens"]["4"]) == {
        "psnr_db",
        "ssim",
        "rFID (digits-cnn features)",
        "class_accuracy",
    }
    assert set(result["metrics"]["codebook"]) == {"usage", "entropy_bits", "perplexity"}
    assert result["protocol"]["settings"] == {"tokens": [1, 2, 4], "decode": {"steps": 1, "guidance": 1, "apg": False}}
    assert (result["protocol"]["count"], result["metrics"]["counts"]) == (40, {"images": 40})
    assert result["protocol"]["weights"] == {"tokenizer": "ema"}
    assert result["protocol"]["models"] == {"tokenizer": export_hash(runs / "tokenizer")}
    assert "--data digits --count 40" in result["run"]["command"]
    Image.open(runs / "tokenizer" / "eval" / "reconstruction.png").verify()

    words = ("generation", "--checkpoint", runs / "generator", "--data", "digits", "--count", 20, "--seed", 1)
    code, out, err = evaluate(*words, "--cfg-scale", 1.5, "--top-k", 8, "--tokens", "2,1", "--batch-size", 8)
    assert code == 0, err
    generation = json.loads((runs / "generator" / "eval" / "generation.json").read_text())
    assert list(generation["metrics"]["tokens"]) == ["1", "2"]
    assert set(generation["metrics"]["tokens"]["1"]) == {
        "gFID (digits-cnn features)",
        "precision (digits-cnn features)",
        "recall (digits-cnn features)",
        "class_accuracy",
        "copies_share",
    }
    assert generation["metrics"]["counts"] == {"samples": 20, "held_out": 297, "reference": 1500}
    assert "N=20" in out
    assert generation["protocol"]["settings"]["tokens"] == [1, 2]
    wanted = {"cfg_scale": 1.5, "temperature": 1.0, "top_k": 8, "top_p": 1.0, "guided_tokens": None}
    wanted["guidance_schedule"] = "constant"
    assert generation["protocol"]["settings"]["sampling"] == wanted
    samples = np.load(runs / "generator" / "eval" / "samples.npz")["arr_0"]
    assert (samples.shape, samples.dtype) == ((20, 16, 16, 3), np.uint8)
    Image.open(runs / "generator" / "eval" / "generation_by_tokens.png").verify()

    same = (runs / "tokenizer" / "eval" / "reconstruction.json", runs / "generator" / "eval" / "generation.json")
    refused(evaluate("compare", *same), "different protocols", "--force", "task:")
    code, out, _ = evaluate("compare", *same, "--force")
    assert code == 0
    assert "DIFFERENT PROTOCOLS" in out

    code, out, err = evaluate("report", "--run", runs)
    assert code == 0, err
    report = (runs / "report.md").read_text()
    for part in (
        result["fingerprint"],
        "## Generation of 20 images",
        "tokenizer/eval/reconstruction.png",
        "tokenizer/eval/reconstruction_by_tokens.png",
        "generator/eval/generation_by_tokens.png",
        "--cfg-scale 1.5",
    ):
        assert part in report


def test_generation_from_each_number_of_tokens(runs, evaluate, tmp_path):
    """One command gives, for each count, the row and the samples that a command for this count alone gives."""
    words = ("generation", "--checkpoint", runs / "generator", "--data", "digits", "--count", 12, "--no-copies")
    results = {}
    for tokens in ("1,3,4", "3"):
        code, out, err = evaluate(*words, "--tokens", tokens, "--out", tmp_path / tokens)
        assert code == 0, err
        results[tokens] = json.loads((tmp_path / tokens / "generation.json").read_text())["metrics"]
        assert "real held-out" in out
    assert list(results["1,3,4"]["tokens"]) == ["1", "3", "4"]
    assert results["1,3,4"]["tokens"]["3"] == pytest.approx(results["3"]["tokens"]["3"], rel=1e-6)
    assert results["1,3,4"]["tokens"]["1"] != results["1,3,4"]["tokens"]["4"]
    assert not (tmp_path / "3" / "generation_by_tokens.png").exists()
    code, _, err = evaluate(*words, "--out", tmp_path / "all")
    assert code == 0, err
    assert list(json.loads((tmp_path / "all/generation.json").read_text())["metrics"]["tokens"]) == ["4"]
    whole, longest = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("all", "1,3,4"))
    assert np.array_equal(whole, longest)


def test_shapes_check_their_reconstructions(evaluate, tmp_path):
    export_tokenizer(tmp_path / "tokenizer", image_size=32, patch_size=8)
    words = ("reconstruction", "--checkpoint", tmp_path / "tokenizer", "--data", "shapes", "--out", tmp_path / "out")
    code, out, err = evaluate(*words, "--count", 12, "--tokens", "1,8")
    assert code == 0, err
    assert "main_color" in out
    result = json.loads((tmp_path / "out/reconstruction.json").read_text())
    for row in result["metrics"]["tokens"].values():
        figures = {name: row[name] for name in ("main_color", "colors", "positions", "shapes", "sizes", "count")}
        assert all(0 <= value <= 1 for value in figures.values())
        assert figures.keys() <= result["protocol"]["definitions"].keys()


def test_the_same_command_gives_the_same_numbers(runs, evaluate, tmp_path):
    words = ("generation", "--checkpoint", runs / "generator", "--data", "digits", "--count", 12)
    results = []
    for batch_size in (12, 5):
        code, _, err = evaluate(*words, "--batch-size", batch_size, "--out", tmp_path / str(batch_size))
        assert code == 0, err
        results.append(json.loads((tmp_path / str(batch_size) / "generation.json").read_text()))
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert results[0]["metrics"]["tokens"]["4"] == pytest.approx(results[1]["metrics"]["tokens"]["4"], rel=1e-6)


def test_bad_input_is_one_line(runs, evaluate, tmp_path):
    base = ("reconstruction", "--checkpoint", runs / "tokenizer", "--data", "digits", "--out", tmp_path / "out")
    refused(evaluate("reconstruction", "--checkpoint", tmp_path / "none", "--data", "digits"), "none")
    refused(evaluate("reconstruction", "--checkpoint", runs / "generator", "--data", "digits"), "expected a tokenizer")
    refused(evaluate(*base, "--tokens", "1,5"), "--tokens: 5 is outside 1..4")
    refused(evaluate(*base, "--decode", "stepz=1"), "stepz", "did you mean 'steps'?")
    refused(evaluate(*base, "--decode", "steps=2.7"), "--decode: steps must be of type int")
    refused(evaluate(*base, "--decode", "progress=1"), "--decode: unknown option 'progress'")
    refused(evaluate(*base, "--data-args", "jiter=false"), "--data-args", "'jiter'", "did you mean 'jitter'?")
    refused(evaluate(*base, "--features", "inception:none.pth"), "none.pth", "6726825d", "inception:PATH")
    refused(evaluate(*base, "--features", "vgg"), "vgg", "digits")
    refused(evaluate(*base[:4], "nowhere"), "nowhere")
    words = ("generation", "--checkpoint", runs / "generator", "--data", "digits", "--out", tmp_path / "out")
    refused(evaluate(*words, "--top-p", "1.5"), "top_p")
    refused(evaluate(*words, "--decode", "steps=fast"), "--decode: steps must be of type int")
    refused(evaluate(*words, "--data-args", "on_error=skip"), "--data-args", "'on_error'")
    refused(evaluate(*words, "--features", "none"), "no feature network 'none'")
    refused(evaluate(*words, "--tokens", "1,5"), "--tokens: 5 is outside 1..4")
    refused(evaluate(*words, "--tokens", "0"), "--tokens: 0 is outside 1..4")
    refused(evaluate(*words, "--tokenizer", tmp_path / "none"), "none")
    assert not (tmp_path / "out").exists()


def test_cached_codes_are_no_images(runs, evaluate, tmp_path):
    (tmp_path / "cache.json").write_text("{}")
    for task, model in (("reconstruction", "tokenizer"), ("generation", "generator")):
        words = (task, "--checkpoint", runs / model, "--data", tmp_path, "--features", "digits")
        refused(evaluate(*words), "holds codes, not images")


def test_all_images_of_a_folder_are_reconstructed(runs, evaluate, tmp_path):
    for n in range(12):
        (tmp_path / f"in/{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * n, 0, 0)).save(tmp_path / f"in/{n % 2}/{n}.png")
    base = ("reconstruction", "--checkpoint", runs / "tokenizer", "--data", tmp_path / "in", "--features", "none")

    def measured(*words):
        code, _, err = evaluate(*base, "--tokens", 1, "--workers", 1, "--out", tmp_path / "out", *words)
        assert code == 0, err
        result = json.loads((tmp_path / "out/reconstruction.json").read_text())
        return result["metrics"]["counts"]["images"], result["protocol"]["split"]

    assert measured() == measured("--split", "train") == (12, "all")
    count, split = measured("--data-args", "val_fraction=0.5")
    assert 0 < count < 12
    assert split == "val"
    (tmp_path / "in/1/3.png").write_bytes(b"broken")
    refused(evaluate(*base, "--out", tmp_path / "out"), "3.png", "set --data-args on_error=skip")
    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        code, out, err = evaluate(*base, "--out", tmp_path / "out", "--data-args", "on_error=skip")
    assert code == 0, err
    assert "N=11" in out, "each image counts once"


def test_bad_flags_are_refused_before_anything_is_loaded(runs, evaluate):
    base = ("reconstruction", "--checkpoint", runs / "tokenizer", "--data", "digits")
    for words in (
        ("--batch-size", 0),
        ("--tokens", "1,x"),
        ("--device", "nonsense"),
        ("--count", -1),
        ("--workers", -1),
    ):
        refused(evaluate(*base, *words), words[0])


def test_the_module_runs_and_helps():
    result = subprocess.run([sys.executable, "-m", "vistok.eval", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.count("--features none") == 1
    for command in ("reconstruction", "generation", "compare", "report", "train-features", "examples:"):
        assert command in result.stdout
