"""Linear probes of features, and the small teacher that the toy configs distil."""

import json
import sys

import pytest
import torch
from PIL import Image

from tiny_models.models import component_of, make_tokenizer
from vistok.checkpoint import export
from vistok.cli import main
from vistok.errors import UserError
from vistok.eval.__main__ import run
from vistok.eval.probe import linear_probe, pooled_features
from vistok.eval.protocol import load_result
from vistok.eval.report import write_report
from vistok.eval.train_teacher import NAME, TEACHERS, train_teacher
from vistok.nn.vision_teacher import load_teacher


class Positions(torch.nn.Module):
    """Features that are the images themselves, one position for each row."""

    def features(self, images, scale=1.0):
        return scale * images.mean(1)


def batches(labels):
    images = torch.randn(len(labels), 3, 4, 6, generator=torch.Generator().manual_seed(0))
    yield {"image": images[:2], "label": labels[:2]}
    yield {"image": images[2:], "label": labels[2:]}


def clusters(seed, count=60, classes=3):
    """Images of classes whose features differ in one direction, with far stronger noise in another."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = torch.randn(count, 4, generator=rng) * torch.tensor([0.1, 0.1, 0.1, 100.0])
    features[torch.arange(count), labels] += 1
    return features, labels


# ---------------------------------------------------------------------- the probe


def test_features_are_pooled_over_positions_and_joined_over_batches():
    labels, seen = torch.tensor([3, 1, 0, 2, 2]), []
    images = torch.cat([batch["image"] for batch in batches(labels)])
    mean, found = pooled_features(Positions(), batches(labels), "mean", {"scale": 2.0}, progress=seen.append)
    torch.testing.assert_close(mean, 2 * images.mean(1).mean(1))
    assert torch.equal(found, labels) and seen == [2, 3]
    flat, _ = pooled_features(Positions(), batches(labels), "flatten", {})
    torch.testing.assert_close(flat, images.mean(1).flatten(1))


def test_a_linear_probe_finds_what_is_linear_and_nothing_in_noise():
    assert linear_probe(clusters(0), clusters(1))["top1"] == 1
    noise = [torch.randn(60, 4, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    labels = clusters(0)[1]
    result = linear_probe((noise[0], labels), (noise[1], labels))
    assert result["top1"] < 0.6 and result["top1_train"] < 0.8


def test_images_without_classes_are_refused():
    with pytest.raises(UserError, match="a probe needs images with classes"):
        pooled_features(Positions(), batches(torch.tensor([0, 1, -1])), "mean", {})
    features, labels = clusters(0)
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe((features, torch.zeros_like(labels)), (features, labels))


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Exit code, stdout and stderr of ``python -m vistok.eval words``."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["vistok.eval", *map(str, words)])
        code = 0
        try:
            main(run)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def exported(folder, name):
    model = make_tokenizer(name)
    export(folder, "tokenizer", component_of(model), model.spec, model.state_dict())
    return folder


def test_the_command_writes_accuracy_protocol_and_a_line_of_the_report(tmp_path, evaluate):
    folder = exported(tmp_path / "tokenizer", "tokenflow")
    code, out, err = evaluate("probe", "--checkpoint", folder, "--data", "digits", "--features", "branch=semantic")
    assert code == 0, err
    assert "probe · digits · N=297" in out and "features: 4 values of an image, mean pooled" in out
    protocol, metrics, details = load_result(folder / "eval" / "probe.json")
    assert protocol.settings == {"features": {"branch": "semantic"}, "pool": "mean"}
    assert metrics["counts"] == {"train": 1500, "held_out": 297} and "probe" in details["command"]
    accuracy = metrics["tokens"]["21"]["top1"]
    assert 0.1 < accuracy < 1
    report = write_report(tmp_path).read_text()
    assert f"of which a linear classifier finds the class | {accuracy:.2%}" in report

    other = evaluate("probe", "--checkpoint", folder, "--data", "digits", "--pool", "flatten", "--out", tmp_path / "b")
    assert "features: 112 values" in other[1]  # 16 positions of 4 + 3 channels
    assert json.loads((tmp_path / "b" / "probe.json").read_text())["fingerprint"] != protocol.fingerprint


def test_other_pixels_under_the_same_names_do_not_compare(tmp_path, evaluate):
    folder, results = exported(tmp_path / "tokenizer", "tokenflow"), []
    for name, changed in (("a", ""), ("b", "train"), ("c", "val")):
        for split in ("train", "val"):
            for number in range(4):
                path = tmp_path / name / split / "xy"[number % 2] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (60 * number, 0, 9 * (split == changed))).save(path)
        words = ("probe", "--checkpoint", folder, "--data", tmp_path / name, "--out", tmp_path / name / "eval")
        code, _, err = evaluate(*words)
        assert code == 0, err
        results.append(tmp_path / name / "eval/probe.json")
    first, *others = results
    for other, place in zip(others, ("reference", "data")):
        code, _, err = evaluate("compare", first, other)
        assert code == 2 and err.count(": ") == 2 and f"{place} / pixels_sha256" in err
    assert "augmentation" not in load_result(first)[0].reference["data"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("tokenflow", ["--features", "branch=pixels"], "branch must be one of both, semantic, pixel, got 'pixels'"),
        ("tokenflow", ["--features", "branc=pixel"], "--features: unknown option 'branc'; did you mean 'branch'"),
        ("flextok", [], "FlexTok has no features for understanding"),
    ],
)
def test_what_cannot_be_probed_is_said_in_one_line(tmp_path, evaluate, name, words, message):
    code, _, err = evaluate("probe", "--checkpoint", exported(tmp_path / "x", name), "--data", "digits", *words)
    assert code == 2 and message in err.split("\r")[-1] and err.split("\r")[-1].count("\n") == 1


# ---------------------------------------------------------------------- the teacher


def test_a_small_teacher_learns_and_can_be_loaded(tmp_path):
    path = tmp_path / "teacher.safetensors"
    sizes = {**TEACHERS["digits"], "depth": 1, "embed_dim": 48}
    assert train_teacher("digits", path, sizes, epochs=7) > 0.3
    assert load_teacher(NAME, path, **sizes).grid == (4, 4)
    for name in "ab":
        train_teacher("digits", tmp_path / name, sizes, epochs=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
