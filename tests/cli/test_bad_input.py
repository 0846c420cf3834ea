"""Everything that the first issue lists under "What bad input gets", at the four command lines.

Each case: exit code 2, one line that names what is wrong, and not a byte changed on the disk. What is not here is
checked beside its feature:

* config keys, types, ranges, names of components and devices of ``train.py``: ``test_train_cli.py``;
* flags, ``--tokens`` and missing exports of ``vistok.eval``: ``test_eval_cli.py``; those of ``vistok.data``, and
  unreadable images on the way into shards: ``test_data_cli.py``;
* every way to damage an export: ``tests/unit/test_checkpoint.py``; ``last.ckpt`` and a disk that is full at the second
  of two checkpoints: ``tests/unit/test_training_run.py``; folders, shards, code caches: ``tests/unit/test_data_*.py``.
"""

import errno
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
import yaml
from PIL import Image

from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.runs import read_state, refused, tiny_yaml
from vistok import files
from vistok.checkpoint import export_hash, export_info, load_tokenizer

WEIGHTS = "model.safetensors"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def make_images(folder, count=4):
    folder.mkdir()
    for n in range(count):
        Image.new("RGB", (16, 16), (60 * n, 0, 0)).save(folder / f"{n}.png")
    return folder


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Exports, images and configs, whole and damaged."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = export_tokenizer(root / "tok")
    export_generator(root / "gen", tokenizer, ["ant", "bee", "cat"])
    for name in ("truncated", "foreign", "nameless"):
        shutil.copytree(tokenizer, root / name)
    truncate(root / "truncated" / WEIGHTS)
    shutil.copy(root / "gen" / WEIGHTS, root / "foreign" / WEIGHTS)
    (root / "nameless/config.yaml").write_text("kind: tokenizer\n")
    shutil.copytree(root / "gen", root / "orphan")
    (root / "orphan/spec.json").write_text((root / "gen/spec.json").read_text().replace("../tok", "../gone"))
    shutil.copytree(root / "gen", root / "bad_gen")
    truncate(root / "bad_gen" / WEIGHTS)

    make_images(root / "images")
    make_images(root / "corrupt")
    truncate(root / "corrupt/2.png")
    (root / "corrupt/2.png").write_bytes(b"no image")
    (root / "empty").mkdir()
    (root / "shards").mkdir()
    (root / "shards/0.tar").write_bytes(b"no archive" * 100)
    (root / "codes").mkdir()
    (root / "codes/cache.json").write_text("{}")
    (root / "file").touch()  # also where a folder should be

    config = yaml.safe_load(tiny_yaml(root).read_text())
    (root / "misspelt.yaml").write_text(yaml.safe_dump({**config, "trainre": {"max_updates": 3}}))
    (root / "typed.yaml").write_text(yaml.safe_dump({**config, "seed": "one"}))
    for name, damage in (("cut", b"PK half of it"), ("alien", None)):
        (root / name).mkdir()
        (root / name / "last.ckpt").write_bytes(damage or b"")
    torch.save({"weights": torch.zeros(1)}, root / "alien/last.ckpt")
    return root


TRAIN = "train.py --config {root}/tiny.yaml"
GEN = "sample.py --checkpoint {root}/gen --out {root}/out"
TOK = "sample.py --checkpoint {root}/tok --out {root}/out --images {root}/images"
EVAL = "vistok.eval reconstruction --features none --out {root}/out"
DATA = "vistok.data tokens --out {root}/out --device cpu"
FOLDER = "data.name=folders data.args.val_fraction=0.5 data.args.path={root}"

CASES = [
    # unknown or misspelt keys and flags, wrong types
    ("train.py --config {root}/misspelt.yaml", ["misspelt.yaml", "'trainre'", "did you mean 'trainer'"]),
    ("train.py --config {root}/typed.yaml", ["typed.yaml", "seed", "one"]),
    ("train.py --confg {root}/tiny.yaml", ["--config"]),
    (GEN + " --cfg_scale 2", ["--cfg_scale"]),
    (GEN + " --count three", ["--count", "'three'"]),
    (GEN + " --count 0", ["--count", "'0'"]),
    (GEN + " --batch-size -1", ["--batch-size", "'-1'"]),
    (GEN + " --top-p 1.5", ["top_p", "1.5"]),
    (GEN + " --top-k -1", ["top_k", "-1"]),
    (GEN + " --temperature -1", ["temperature", "-1"]),
    (GEN + " --decode stepz=3", ["'stepz'", "did you mean 'steps'"]),
    (GEN + " --decode steps=fast", ["steps must be of type int", "'fast'"]),
    (GEN + " --decode steps=2.7", ["steps must be of type int", "2.7"]),
    (GEN + " --sampling stepz=3", ["--sampling: unknown option 'stepz'", "valid: "]),
    (TOK + " --sampling steps=3", ["--sampling is for a generator"]),
    (TOK + " --decode keep=3", ["--decode: unknown option 'keep'"]),
    (GEN + " --decode steps", ["key=value", "'steps'"]),
    (GEN + " --device gpu", ["--device", "'gpu'"]),
    (DATA + " --tokenizer {root}/tok --data digits --device gpu", ["--device", "'gpu'"]),
    (DATA + " --tokenizer {root}/tok --data digits --passes 0", ["--passes", "'0'"]),
    (DATA + " --tokenizer {root}/tok --data digits --workers -1", ["workers", "-1"]),
    # a flag of the other kind of model
    (TOK + " --class 3", ["--class is for a generator", "tok holds a tokenizer"]),
    (TOK + " --top-p 0.9", ["--top-p is for a generator"]),
    (GEN + " --images {root}/images", ["--images is for a tokenizer", "gen holds a generator"]),
    ("sample.py --checkpoint {root}/tok", ["tok holds a tokenizer", "--images"]),
    # missing, truncated and foreign checkpoints
    ("sample.py --checkpoint {root}/none", ["checkpoint folder not found", "none"]),
    ("sample.py --checkpoint {root}/images", ["images is no export", "config.yaml is missing"]),
    ("sample.py --checkpoint {root}/truncated --images digits", ["truncated/model.safetensors"]),
    ("sample.py --checkpoint {root}/foreign --images digits", ["foreign/model.safetensors does not fit", "missing"]),
    ("sample.py --checkpoint {root}/nameless --images digits", ["nameless/config.yaml is damaged"]),
    ("sample.py --checkpoint {root}/bad_gen", ["bad_gen/model.safetensors"]),
    ("sample.py --checkpoint {root}/orphan", ["its tokenizer is not at", "gone", "--tokenizer"]),
    (GEN + " --tokenizer {root}/gen", ["gen holds a generator", "expected a tokenizer"]),
    (EVAL + " --checkpoint {root}/truncated --data digits", ["truncated/model.safetensors"]),
    (EVAL + " --checkpoint {root}/foreign --data digits", ["foreign/model.safetensors does not fit"]),
    (DATA + " --tokenizer {root}/truncated --data digits", ["truncated/model.safetensors"]),
    (TRAIN + " generator.name=gpt tokenizer={root}/foreign", ["foreign/model.safetensors does not fit"]),
    (TRAIN + " resume=auto output={root}/cut", ["cut/last.ckpt is truncated or no checkpoint"]),
    (TRAIN + " resume=auto output={root}/alien", ["alien/last.ckpt is truncated or no checkpoint"]),
    # corrupt images and shards, empty folders, data that are no images
    (EVAL + " --checkpoint {root}/tok --data {root}/corrupt --split train", ["corrupt/2.png", "not an image"]),
    ("sample.py --checkpoint {root}/tok --out {root}/out --images {root}/corrupt", ["corrupt/2.png"]),
    ("sample.py --checkpoint {root}/tok --out {root}/out --images {root}/shards", ["0.tar is no whole tar file"]),
    ("sample.py --checkpoint {root}/tok --out {root}/out --images {root}/empty", ["empty: no images"]),
    ("sample.py --checkpoint {root}/tok --out {root}/out --images {root}/nowhere", ["no data called", "nowhere"]),
    ("sample.py --checkpoint {root}/tok --out {root}/out --images {root}/codes", ["codes, not images"]),
    (DATA + " --tokenizer {root}/tok --data {root}/shards", ["0.tar is no whole tar file"]),
    (DATA + " --tokenizer {root}/tok --data {root}/empty", ["empty: no images"]),
    (DATA + " --tokenizer {root}/tok --data {root}/codes", ["codes, not images"]),
    (EVAL + " --checkpoint {root}/tok --data {root}/empty", ["empty: no images"]),
    (TRAIN + f" {FOLDER}/empty", ["empty: no images"]),
    (TRAIN + f" {FOLDER}/shards data.name=shards", ["0.tar is no whole tar file"]),
    # an image smaller than a patch
    (TRAIN + " tokenizer.name=flextok tokenizer.args.image_size=2 tokenizer.args.patch_size=4", ["image_size 2", "4"]),
    # a class outside the range
    (GEN + " --class 10", ["--class 10", "0..9"]),
    (GEN + " --class -1", ["--class -1", "0..9"]),
    (GEN + " --class bea", ["--class bea", "did you mean 'bee'?"]),
    # more tokens than there are
    (GEN + " --tokens 9", ["--tokens: 9 is outside 1..8"]),
    (GEN + " --tokens 0", ["--tokens: 0 is outside 1..8"]),
    (GEN + " --tokens 1,9", ["--tokens: 9 is outside 1..8"]),
    (GEN + " --min-p 1.5", ["min_p must lie in [0, 1], got 1.5"]),
    (GEN + " --guidance-interval 0.5", ["--guidance-interval", "two numbers", "'0.5'"]),
    (GEN + " --guidance-interval 0.5,0.1", ["guidance_interval", "0 <= a <= b <= 1, got 0.5 and 0.1"]),
    (TOK + " --min-p 0.1", ["--min-p is for a generator"]),
    (TOK + " --tokens 4,9", ["--tokens: 9 is outside 1..8"]),
    (TOK + " --tokens all", ["--tokens", "'all'"]),
    # a place that cannot be written
    ("sample.py --checkpoint {root}/gen --out {root}/file", ["--out", "file"]),
    ("sample.py --checkpoint {root}/gen --out {root}/file/deeper", ["--out", "file/deeper"]),
]


@pytest.mark.parametrize(("line", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_line_and_nothing_written(world, run_script, line, parts):
    before = snapshot(world)
    refused(run_script(*line.format(root=world).split()), *parts)
    assert snapshot(world) == before


# ---------------------------------------------------------------------- unreadable data while training


@pytest.fixture
def corrupt(tmp_path, world):
    """Training data of which one image cannot be read, and the words that train on them."""
    shutil.copytree(world / "images", tmp_path / "data/train")
    shutil.copytree(world / "images", tmp_path / "data/val")
    (tmp_path / "data/train/2.png").write_bytes(b"no image")
    words = ("data.name=folders", f"data.args.path={tmp_path / 'data'}", "trainer.max_updates=2")
    return ("train.py", "--config", tiny_yaml(tmp_path), *words)


def test_a_corrupt_image_stops_training(run_script, corrupt, tmp_path):
    code, _, err = run_script(*corrupt)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: cannot read ") and "train/2.png" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run/last.ckpt").exists() and not (tmp_path / "run" / WEIGHTS).exists()


def test_a_corrupt_image_is_skipped_with_a_warning(run_script, corrupt, tmp_path):
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable image\(s\) so far, now .*2\.png"):
        assert run_script(*corrupt, "data.args.on_error=skip")[0] == 0
    assert read_state(tmp_path / "run")["updates"] == 2


def test_a_corrupt_shard_is_skipped_with_a_warning(run_script, world, tmp_path):
    assert run_script("vistok.data", "shards", "--images", world / "images", "--out", tmp_path / "s")[0] == 0
    shutil.copy(world / "shards/0.tar", tmp_path / "s/zero.tar")
    words = ("vistok.data", "tokens", "--tokenizer", world / "tok", "--data", tmp_path / "s", "--out", tmp_path / "c")
    refused(run_script(*words), "zero.tar is no whole tar file", "set --data-args on_error=skip")
    words = ("sample.py", "--checkpoint", world / "tok", "--images", tmp_path / "s", "--out", tmp_path / "out")
    with pytest.warns(UserWarning, match="skipped 1 of 2 shards: .*zero.tar"):
        code, out, _ = run_script(*words, "--on-error", "skip")
    assert code == 0 and out.startswith("4 images")


# ---------------------------------------------------------------------- a full disk


@contextmanager
def files_up_to(size):
    """A real limit of the operating system: a longer file fails at the write that crosses ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def temporaries(folder):
    return [path for path in folder.rglob("*") if ".partial" in path.name]


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(run_script, tmp_path):
    words = ("train.py", "--config", tiny_yaml(tmp_path), "resume=auto")
    assert run_script(*words, "trainer.max_updates=2")[0] == 0
    before = snapshot(tmp_path / "run")
    with files_up_to(9_000):
        code, _, err = run_script(*words, "checkpoint.every_updates=4")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'run/last.ckpt'}: ")
    assert "File too large" in err
    for name in ("last.ckpt", WEIGHTS, "spec.json"):
        path = tmp_path / "run" / name
        assert path.read_bytes() == before[path]
    assert not temporaries(tmp_path)
    assert run_script(*words)[0] == 0
    assert read_state(tmp_path / "run")["updates"] == 8


def test_a_full_disk_at_an_export_keeps_the_previous_one(run_script, tmp_path, monkeypatch):
    words, run = ("train.py", "--config", tiny_yaml(tmp_path), "resume=auto"), tmp_path / "run"
    assert run_script(*words, "trainer.max_updates=2")[0] == 0
    digest = export_hash(run)

    def save_file(weights, path):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", save_file)
        code, _, err = run_script(*words)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: cannot write {run / WEIGHTS}: ")
    assert export_hash(run) == digest and export_info(run)["updates"] == 2
    load_tokenizer(run)
    assert not temporaries(tmp_path)
    # The checkpoint of the last update was saved before: what is left to do is the export.
    code, out, _ = run_script(*words)
    assert code == 0 and "is finished: 8 updates" in out
    assert export_info(run)["updates"] == 8 and export_hash(run) != digest


@pytest.mark.parametrize("line", [GEN, TOK, DATA + " --tokenizer {root}/tok --data digits --batch-size 1000"])
def test_a_full_disk_leaves_no_half_of_a_result(world, run_script, line):
    before = snapshot(world)
    try:
        with files_up_to(2_000):
            refused(run_script(*line.format(root=world).split()), f"cannot write {world / 'out'}", "File too large")
        left = snapshot(world).keys() - before.keys()
        assert not [path for path in left if path.name == "samples.npz" or ".partial" in path.name]
        assert all(Image.open(path).verify() is None for path in left if path.suffix == ".png")
    finally:
        shutil.rmtree(world / "out", ignore_errors=True)
