"""``python sample.py`` as a researcher types it, on tiny models with random weights, in this process to save time."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.runs import ROOT

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
"""Two fewer than the generator's classes: the last two are known by their numbers alone."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = export_tokenizer(folder / "tokenizer")
    export_generator(folder / "generator", tokenizer, NAMES)
    return folder


@pytest.fixture
def sample(run_script):
    """Runs sample.py, which must succeed; gives what it printed."""

    def sample(*words):
        code, out, err = run_script("sample.py", *words)
        assert code == 0, err
        return out

    return sample


def pixels(folder):
    """``samples.npz`` of a folder, after comparing it with the PNG of each image."""
    array = np.load(folder / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8
    paths = sorted(folder.glob("0*.png"))
    assert [path.name for path in paths] == [f"{index:05d}.png" for index in range(len(array))]
    for path, image in zip(paths, array):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    Image.open(folder / "grid.png").verify()
    return array


@pytest.fixture
def photos(tmp_path):
    """Five images of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 256, (20, 17, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def test_the_documented_call_of_a_generator(runs, sample, tmp_path):
    out = tmp_path / "deep" / "samples"
    line = "--class 3 --count 16 --cfg-scale 2 --top-k 0 --top-p 0.95 --temperature 1 --seed 0"
    said = sample("--checkpoint", runs / "generator", *line.split(), "--out", out)
    assert said == f"16 samples: {out / 'grid.png'}, {out / 'samples.npz'}\n"
    images = pixels(out)
    assert images.shape == (16, 16, 16, 3)
    assert len(np.unique(images, axis=0)) == 16
    assert len(list(out.iterdir())) == 18, "nothing else, no temporary files"


def test_a_sample_depends_on_seed_and_index_alone(runs, sample, tmp_path):
    def images(name, *words):
        sample("--checkpoint", runs / "generator", "--cfg-scale", 1.5, "--out", tmp_path / name, *words)
        return pixels(tmp_path / name)

    def largest_difference(a, b):
        return np.abs(a.astype(int) - b).max()

    eight = images("a", "--count", 8)
    # Sums of another batch size may round the other way; another code changes pixels by tens of levels.
    assert largest_difference(eight, images("b", "--count", 8, "--batch-size", 3)) <= 1
    assert largest_difference(eight[:4], images("c", "--count", 4)) <= 1
    assert np.array_equal(eight, images("a again", "--count", 8))
    assert largest_difference(eight, images("d", "--count", 8, "--seed", 1)) > 50
    assert largest_difference(eight, images("e", "--count", 8, "--temperature", 0.2)) > 50


def test_a_class_by_name_or_number_and_all_in_turn(runs, sample, tmp_path):
    def images(name, *words):
        sample("--checkpoint", runs / "generator", "--decode", "steps=1", "--out", tmp_path / name, *words)
        return pixels(tmp_path / name)

    cats, all_ = images("name", "--class", "cat", "--count", 3), images("all", "--count", 12)
    assert np.array_equal(cats, images("number", "--class", "2", "--count", 3))
    assert np.array_equal(all_[2], cats[2])
    assert not np.array_equal(all_[:2], cats[:2])
    assert np.array_equal(all_[9:10], images("unnamed", "--class", "9", "--count", 10)[9:])


def test_a_prefix_of_the_tokens(runs, sample, tmp_path):
    words = ("--checkpoint", runs / "generator", "--class", 1, "--count", 2)
    for tokens in (2, 8):
        sample(*words, "--tokens", tokens, "--out", tmp_path / str(tokens))
    sample(*words, "--out", tmp_path / "all")
    assert np.array_equal(pixels(tmp_path / "8"), pixels(tmp_path / "all"))
    assert not np.array_equal(pixels(tmp_path / "2"), pixels(tmp_path / "all"))


def test_several_prefixes_of_one_code(runs, sample, tmp_path):
    words = ("--checkpoint", runs / "generator", "--count", 3, "--cfg-scale", 2)
    said = sample(*words, "--tokens", "8,2", "--out", tmp_path / "both")
    assert said == f"3 samples, columns [2, 8]: {tmp_path / 'both' / 'grid.png'}\n"
    for tokens in (2, 8):
        sample(*words, "--tokens", tokens, "--out", tmp_path / str(tokens))
        assert np.array_equal(pixels(tmp_path / "both" / f"tokens_{tokens:03d}"), pixels(tmp_path / str(tokens)))
    # The grid shows the longest in its last column: 16 px enlarged by 5 = ceil(72 / 16), with 2 px between.
    with Image.open(tmp_path / "both" / "grid.png") as grid:
        corner = np.asarray(grid)[-82:-2:5, -82:-2:5]
    assert np.array_equal(corner, pixels(tmp_path / "8")[2])


def test_one_image_of_a_set_again(runs, sample, tmp_path):
    words = ("--checkpoint", runs / "generator", "--cfg-scale", 2)
    sample(*words, "--count", 6, "--out", tmp_path / "all")
    sample(*words, "--first", 4, "--count", 1, "--out", tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").glob("0*.png")) == ["00004.png"]
    again, all_ = (np.asarray(Image.open(tmp_path / name / "00004.png")) for name in ("one", "all"))
    assert np.array_equal(again, all_)


def test_a_generator_without_classes(runs, sample, run_script, tmp_path):
    export_tokenizer(tmp_path / "tokenizer")
    words = ("--checkpoint", export_generator(tmp_path / "free", tmp_path / "tokenizer", [], num_classes=0))
    sample(*words, "--count", 2, "--out", tmp_path / "out")
    assert len(pixels(tmp_path / "out")) == 2
    code, _, err = run_script("sample.py", *words, "--class", 0)
    assert code == 2 and "without classes" in err


def test_the_documented_call_of_a_tokenizer(runs, sample, tmp_path, photos):
    """All images of a flat folder, whatever a training run would hold out of it."""
    out = tmp_path / "out"
    said = sample("--checkpoint", runs / "tokenizer", "--images", photos, "--tokens", "1,4,8", "--out", out)
    assert said == f"5 images, columns [1, 4, 8]: {out / 'reconstruction.png'}\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "original", "reconstruction.png", "tokens_001", "tokens_004", "tokens_008"]  # fmt: skip
    columns = [pixels(out / name) for name in ("original", "tokens_001", "tokens_004", "tokens_008")]
    assert {column.shape for column in columns} == {(5, 16, 16, 3)}
    assert not np.array_equal(columns[1], columns[3])
    with Image.open(photos / "c.png") as image:  # 17 x 20 becomes 16 x 19, then the middle
        resized = np.asarray(image.resize((16, 19), Image.Resampling.BICUBIC))[1:17]
    assert np.array_equal(columns[0][2], resized)
    # The grid shows the columns side by side, enlarged by 5 = ceil(72 / 16), with 2 px between.
    with Image.open(out / "reconstruction.png") as grid:
        corner = np.asarray(grid)[-82:-2:5, -82:-2:5]
    assert np.array_equal(corner, columns[3][4])


def test_reconstructions_of_other_data(runs, sample, tmp_path, photos):
    words = ("--checkpoint", runs / "tokenizer", "--decode", "steps=1", "guidance=1")
    sample(*words, "--images", "digits", "--count", 3, "--batch-size", 2, "--out", tmp_path / "digits")
    assert sorted(path.name for path in (tmp_path / "digits").glob("tokens*")) == [
        f"tokens_{length:03d}" for length in (1, 2, 4, 8)
    ]
    few, more = tmp_path / "few", tmp_path / "more"
    sample(*words, "--images", photos, "--tokens", 8, "--count", 2, "--out", few)
    sample(*words, "--images", photos, "--tokens", 8, "--batch-size", 2, "--out", more)
    assert np.array_equal(pixels(few / "tokens_008"), pixels(more / "tokens_008")[:2])
    (photos / "val").mkdir()
    (photos / "a.png").rename(photos / "val" / "a.png")
    sample(*words, "--images", photos, "--out", tmp_path / "val")
    assert np.array_equal(pixels(tmp_path / "val" / "original"), pixels(more / "original")[:1])


def test_an_unreadable_image_stops_or_is_left_out(runs, sample, run_script, tmp_path, photos):
    sample("--checkpoint", runs / "tokenizer", "--images", photos, "--tokens", 1, "--out", tmp_path / "whole")
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:300])
    words = ("--checkpoint", runs / "tokenizer", "--images", photos, "--tokens", 1, "--out", tmp_path / "out")
    code, _, err = run_script("sample.py", *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "b.png" in err and "set --on-error skip" in err
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable image\(s\) so far, now .*b\.png"):
        assert sample(*words, "--on-error", "skip").startswith("4 images")
    kept = pixels(tmp_path / "whole" / "original")[[0, 2, 3, 4]]
    assert np.array_equal(pixels(tmp_path / "out" / "original"), kept)


def test_the_script_runs_and_helps():
    result = subprocess.run([sys.executable, "sample.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    for part in ("--class", "--images", "samples.npz", "python sample.py --checkpoint"):
        assert part in result.stdout


def test_half_precision_gives_nearly_the_same_images(runs, sample, tmp_path):
    words = ("--checkpoint", runs / "tokenizer", "--images", "digits", "--count", 4, "--tokens", "8")
    for precision in ("32", "bf16"):
        sample(*words, "--precision", precision, "--out", tmp_path / precision)
    exact, half = (pixels(tmp_path / precision / "tokens_008").astype(int) for precision in ("32", "bf16"))
    assert abs(exact - half).max() > 0
    assert abs(exact - half).mean() < 16  # a code at the edge of its level may fall on the other side
