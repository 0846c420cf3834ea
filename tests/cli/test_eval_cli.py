"""``python -m vistok.eval`` from exports to tables, on tiny models with random weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tiny_models.exports import export_tokenizer
from tiny_models.runs import refused
from vistok.checkpoint import export_hash
from vistok.pictures import rows_by_label


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
        "rFID-40 (digits-cnn features)",
        "class_accuracy",
    }
    assert set(result["metrics"]["codebook"]) == {"usage", "entropy_bits", "perplexity", "codes"}
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
        "gFID-20 (digits-cnn features)",
        "IS-20 (digits-cnn features)",
        "ADM-IS-20 (digits-cnn features)",
        "KID-20 (digits-cnn features)",
        "precision-20 (digits-cnn features)",
        "recall-20 (digits-cnn features)",
        "class_accuracy",
        "copies_share",
    }
    assert generation["metrics"]["counts"] == {"samples": 20, "held_out": 297, "reference": 1500}
    assert "N=20" in out
    assert generation["fingerprint"] in out
    assert "at least 65 are needed" in out
    assert generation["protocol"]["reference"]["count"] == 1500
    assert len(generation["protocol"]["reference"]["pixels_sha256"]) == 64
    assert generation["protocol"]["features"].keys() == {"name", "sha256", "resize", "dtype"}
    assert generation["protocol"]["weights"] == {"generator": "ema", "tokenizer": "ema"}
    assert generation["protocol"]["settings"]["tokens"] == [1, 2]
    wanted = {"cfg_scale": 1.5, "temperature": 1.0, "top_k": 8, "top_p": 1.0, "guidance_schedule": "constant"}
    assert wanted.items() <= generation["protocol"]["settings"]["sampling"].items()
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


def paint(folder, blue=0):
    """Images of two classes."""
    for n in range(8):
        (folder / f"{n % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * n, 0, blue)).save(folder / f"{n % 2}/{n}.png")


def test_other_pixels_under_the_same_names_do_not_compare(runs, evaluate, tmp_path):
    """Of the originals that are reconstructed, and of the held-out images beside samples."""
    for name, blue in (("a", 0), ("b", 9)):
        paint(tmp_path / name / "train")
        paint(tmp_path / name / "val", blue)
        data = ("--data", tmp_path / name, "--out", tmp_path / name / "eval")
        words = ("reconstruction", "--checkpoint", runs / "tokenizer", "--features", "none", "--tokens", 1)
        code, _, err = evaluate(*words, *data)
        assert code == 0, err
        words = ("generation", "--images", tmp_path / "a/val", "--features", "digits", "--no-copies")
        code, _, err = evaluate(*words, *data)
        assert code == 0, err
    for task, place in (("reconstruction", "reference"), ("generation", "data")):
        files = [tmp_path / name / "eval" / f"{task}.json" for name in "ab"]
        refused(evaluate("compare", *files), f"{place} / pixels_sha256")


def test_the_same_pixels_compare_however_they_are_named(runs, evaluate, tmp_path):
    """Augmentation, which nobody asks for here, is no condition."""
    for name, more in (("a", ()), ("b", ("crop=center", "flip=true"))):
        paint(tmp_path / "train")
        words = ("reconstruction", "--checkpoint", runs / "tokenizer", "--features", "none", "--tokens", 1)
        words = (*words, "--split", "train", "--data", tmp_path / "train", "--out", tmp_path / name)
        code, _, err = evaluate(*words, *(("--data-args", *more) if more else ()))
        assert code == 0, err
    code, out, err = evaluate("compare", tmp_path / "a/reconstruction.json", tmp_path / "b/reconstruction.json")
    assert code == 0 and "DIFFERENT" not in out, err


def real_images(path, size_px):
    pixels = np.random.default_rng(0).integers(0, 256, (9, size_px, size_px, 3), dtype=np.uint8)
    np.savez(path, arr_0=pixels)
    return "--reference", path, "--features", "digits"


def test_samples_may_stay_unwritten_and_the_picture_takes_what_it_shows(runs, evaluate, tmp_path, monkeypatch):
    shown = []

    def watched(images, labels):
        shown.append(len(images))
        return rows_by_label(images, labels)

    monkeypatch.setattr("vistok.pictures._ROWS", 1)
    monkeypatch.setattr("vistok.eval.commands.generation.rows_by_label", watched)
    real = real_images(tmp_path / "real.npz", 16)
    words = ("generation", "--checkpoint", runs / "generator", *real, "--count", 24)
    pictures = []
    for name, more in (("a", ()), ("b", ("--no-samples", "--batch-size", 7))):
        code, _, err = evaluate(*words, *more, "--out", tmp_path / name)
        assert code == 0, err
        pictures.append((tmp_path / name / "generation.png").read_bytes())
    assert pictures[0] == pictures[1]
    written = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert written == ["generation.json", "generation.png"]
    assert np.load(tmp_path / "a/samples.npz")["arr_0"].shape == (24, 16, 16, 3)
    # Without classes one row of ten is enough, of 24 samples.
    words = ("generation", "--images", tmp_path / "a/samples.npz", *real)
    code, _, err = evaluate(*words, "--out", tmp_path / "c", "--batch-size", 7)
    assert code == 0, err
    assert shown == [24, 24, 10]


def test_samples_are_resized_to_a_smaller_reference(runs, evaluate, tmp_path):
    """As LlamaGen's of 384 px are measured at 256 px."""
    real = {size: real_images(tmp_path / f"{size}.npz", size) for size in (8, 16)}
    words = ("generation", "--checkpoint", runs / "generator", "--count", 12)
    refused(evaluate(*words, *real[8]), "samples have 16 px, the reference 8 px", "--protocol adm8")
    results = {}
    for name, more in (("large", real[16]), ("small", (*real[8], "--protocol", "adm8"))):
        code, _, err = evaluate(*words, *more, "--out", tmp_path / name)
        assert code == 0, err
        results[name] = json.loads((tmp_path / name / "generation.json").read_text())
    protocol = results["small"]["protocol"]
    assert protocol["image_size_px"] == 8 and protocol["settings"]["preprocessing"] == "adm_center_crop"
    assert results["large"]["protocol"]["settings"]["preprocessing"] == "none"
    large, small = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("large", "small"))
    halved = [np.array(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX)) for image in large]
    assert np.array_equal(small, halved)
    # The same as when they lie in a file and are cropped to the same size there.
    for n, image in enumerate(large):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"images/{n:02d}.png")
    words = ("generation", "--images", tmp_path / "images", *real[8], "--protocol", "adm8")
    code, _, err = evaluate(*words, "--out", tmp_path / "again")
    assert code == 0, err
    again = json.loads((tmp_path / "again/generation.json").read_text())["metrics"]["tokens"]["all"]
    assert again == pytest.approx({name: results["small"]["metrics"]["tokens"]["4"][name] for name in again})


def test_flags_that_change_nothing_about_what_exists_are_refused(evaluate, questions, tmp_path):
    prompts, skills = tmp_path / "prompts.json", tmp_path / "skills.json"
    prompts.write_text('{"00000": {"prompt": "a cup"}}')
    skills.write_text('{"basic": [0]}')
    drawing = (("--cfg-scale", 4), ("--top-k", 5), ("--compile",), ("--tokens", "4"), ("--decode", "a=1"))
    prompted = (*drawing, ("--save-images",), ("--count-per-prompt", 2), ("--seed", 1))
    for command, source, flags in (
        (("generation", "--reference", "x"), "--images", (*drawing, ("--no-samples",))),
        (("geneval", "--detector", "x"), "--images", prompted),
        (("geneval",), "--results", (*prompted, ("--detector", "x"), ("--split", "train"))),
        (("dpg", "--questions", questions, "--judge", "x"), "--images", prompted),
        (("genai", "--prompts", prompts, "--skills", skills, "--judge", "x"), "--images", prompted),
    ):
        for words in flags:
            refused(evaluate(*command, source, tmp_path, *words), words[0], source, "exist already")


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
