"""``python -m vistok.data`` from images to data that train, in this process to save time."""

import subprocess
import sys

import pytest
from PIL import Image

from vistok.checkpoint import export, export_hash
from vistok.cli import main
from vistok.config import Component, build
from vistok.data.__main__ import run
from vistok.data.datamodule import load_data
from vistok.data.shapes import detect


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*words):
        """Exit code, stdout and the last line of stderr."""
        monkeypatch.setattr(sys, "argv", ["vistok.data", *map(str, words)])
        code = 0
        try:
            main(run)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err.split("\r")[-1]

    return call


def refused(result, *parts):
    code, _, line = result
    assert code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert all(part in line for part in parts)


def test_shapes_then_shards_then_training_data(call, tmp_path):
    images, out = tmp_path / "images", tmp_path / "shards"
    code, said, _ = call("shapes", "--out", images, "--count", 12, "--image-size", 32)
    assert (code, said) == (0, f"wrote 12 images to {images}\n")
    assert len(list(images.glob("*.png"))) == len(list(images.glob("*.txt"))) == 12
    code, said, _ = call("shards", "--images", images, "--out", out, "--max-per-shard", 5, "--captions")
    assert (code, said) == (0, f"wrote 12 images to {out}\n")
    assert [path.name for path in sorted(out.iterdir())] == ["000000.tar", "000001.tar", "000002.tar"]
    world = load_data("shapes", "train", 32)
    captions = {world.get(i)["text"]: world.scene(i).objects for i in range(12)}
    data = load_data(str(out), "train", 32)
    for i in range(len(data)):
        sample = data.get(i)
        assert len(detect(sample["image"])) == len(captions[sample["text"]])


def test_class_folders_with_splits_become_shards_with_splits(call, tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "train/b/3.png", "val/b/4.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    assert call("shards", "--images", tmp_path / "in", "--out", tmp_path / "out")[0] == 0
    train, val = (load_data(str(tmp_path / "out"), split, 8) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["a", "b"]
    assert sorted(train.get(i)["label"] for i in range(3)) == [0, 1, 1]
    assert [val.get(i)["label"] for i in range(len(val))] == [1]


def test_unreadable_images_stop_or_are_counted(call, tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/{n}.png")
    (tmp_path / "in/2.png").write_bytes(b"broken")
    words = ("shards", "--images", tmp_path / "in", "--out", tmp_path / "out")
    refused(call(*words), "2.png", "set --on-error skip")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.warns(UserWarning, match=r"2.png"):
        code, said, _ = call(*words, "--on-error", "skip")
    assert (code, said) == (0, f"wrote 3 images to {tmp_path / 'out'}, skipped 1 unreadable\n")


def test_tokens_of_an_exported_tokenizer(call, tmp_path):
    component = Component("tiny_models.tokenizer", {})
    tokenizer = build("tokenizers", component)
    export(tmp_path / "tok", "tokenizer", component, tokenizer.spec, tokenizer.state_dict())
    words = ("tokens", "--tokenizer", tmp_path / "tok", "--data", "digits", "--out", tmp_path / "codes")
    code, said, err = call(*words, "--passes", 2, "--batch-size", 500, "--device", "cpu")
    assert code == 0, err
    assert said == f"wrote the tokens of 3297 images to {tmp_path / 'codes'}\n"
    data = load_data(str(tmp_path / "codes"), "train", 8)
    assert data.tokenizer_hash == export_hash(tmp_path / "tok")
    image = load_data("digits", "train", 8).get(9)["image"]
    assert data.get(9)["ids"].equal(tokenizer.eval().tokenize(image[None]).ids[0])
    refused(call(*words), "codes exists already")


def test_tokens_of_data_with_arguments(call, tmp_path):
    component = Component("tiny_models.tokenizer", {})
    tokenizer = build("tokenizers", component)
    export(tmp_path / "tok", "tokenizer", component, tokenizer.spec, tokenizer.state_dict())
    (tmp_path / "in").mkdir()
    for n in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/{n}.png")
    words = ("tokens", "--tokenizer", tmp_path / "tok", "--data", tmp_path / "in", "--out", tmp_path / "out")
    refused(call(*words, "--data-args", "val_fractoin=0.5"), "--data-args", "did you mean 'val_fraction'?")
    refused(call(*words, "--data-args", "val_fraction=0"), "'val'", "set --data-args val_fraction")
    assert call(*words, "--data-args", "val_fraction=0.5", "--device", "cpu")[0] == 0
    assert 2 <= len(load_data(str(tmp_path / "out"), "val", 8)) <= 6


def test_bad_words_are_one_line(call, tmp_path):
    refused(call("shards", "--images", tmp_path / "none", "--out", tmp_path / "out"), "no such folder", "none")
    refused(call("shards", "--images", tmp_path, "--out", tmp_path / "out"), "no images")
    refused(call("shards", "--images", tmp_path, "--out", tmp_path / "o", "--max-per-shard", 0), "--max-per-shard")
    refused(call("tokens", "--tokenizer", tmp_path / "gone", "--data", "digits", "--out", tmp_path / "out"), "gone")
    refused(call("shapes", "--out", tmp_path / "out", "--image-size", 8), "at least 24")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["shards"], ["tokens"], ["shapes"]])
def test_help_with_an_example(call, words):
    code, said, _ = call(*words, "--help")
    assert code == 0
    assert ("example: python -m vistok.data" in said) == bool(words)


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "vistok.data", "shapes", "--out", str(tmp_path), "--count", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: argument --count: ")
