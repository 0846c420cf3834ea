"""``generation`` of images that exist and ``reference``: folders, shards, ``.npz`` files, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from random_inception import write_random_inception

from tiny_models.runs import refused
from vistok.data.datamodule import load_data
from vistok.data.images import Record
from vistok.data.shards import write_shards
from vistok.eval import features
from vistok.eval.images import open_images, uint8_batches
from vistok.eval.protocol import load_result
from vistok.pictures import save_npz, to_pil

COUNT = 24
NETWORK = ("--features", "digits")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same digits as a folder, an ``.npz`` and shards, and others to compare with."""
    root = tmp_path_factory.mktemp("stored")
    for name, split in (("samples", "val"), ("real", "train")):
        images, *_ = next(uint8_batches(load_data("digits", split, 16), COUNT, count=COUNT))
        save_npz(root / f"{name}.npz", images)
        (root / name).mkdir()
        for index, image in enumerate(images):
            to_pil(image).save(root / name / f"{index:03d}.png")
    (root / "shards").mkdir()
    files = sorted((root / "samples").iterdir())
    records = [Record(file.read_bytes(), ".png", -1, "", file.stem) for file in files]
    write_shards(records, root / "shards", 10, [], False)
    return root


def measured(evaluate, out, *words):
    code, text, err = evaluate("generation", *words, "--out", out)
    assert code == 0, err
    protocol, metrics, _ = load_result(out / "generation.json")
    assert protocol.fingerprint in text
    return protocol, metrics, text


def test_a_folder_shards_and_an_npz_measure_alike(stored, evaluate, tmp_path):
    results = [
        measured(evaluate, tmp_path / name, "--images", stored / name, "--reference", stored / real, *NETWORK, *more)
        for name, real, more in (
            ("samples", "real.npz", ()),
            ("samples.npz", "real", ("--batch-size", 7)),
            ("shards", "real", ("--workers", 1)),
        )
    ]
    (protocol, metrics, text), *others = results
    row = metrics["tokens"]["all"]
    names = ["gFID", "IS", "ADM-IS", "KID", "precision", "recall"]
    assert list(row) == [f"{name}-24 (digits-cnn features)" for name in names]
    assert metrics["counts"] == {"samples": COUNT, "reference": COUNT}
    assert protocol.settings == {"sampling": "unknown", "preprocessing": "none"}
    assert "N=24" in text and "50k" not in text
    for other_protocol, other, _ in others:
        assert other_protocol == protocol, "the same pixels on both sides"
        assert other["tokens"]["all"] == pytest.approx(row, rel=1e-4)
    Image.open(tmp_path / "samples/generation.png").verify()
    code, text, _ = evaluate("compare", tmp_path / "samples/generation.json", tmp_path / "shards/generation.json")
    assert code == 0 and "gFID-24" in text


def test_a_set_has_distance_0_from_itself(stored, evaluate, tmp_path):
    words = ("--images", stored / "real", "--reference", stored / "real.npz", *NETWORK)
    _, metrics, _ = measured(evaluate, tmp_path, *words)
    row = metrics["tokens"]["all"]
    assert row["gFID-24 (digits-cnn features)"] == pytest.approx(0, abs=1e-3)
    assert row["precision-24 (digits-cnn features)"] == row["recall-24 (digits-cnn features)"] == 1


def test_a_reference_file_stands_for_its_images(stored, evaluate, tmp_path):
    file = tmp_path / "stats.npz"
    code, text, err = evaluate("reference", "--data", "digits", "--protocol", "adm16", "--out", file)
    assert code == 0, err
    assert "1500 images of 16 px" in text
    with np.load(file) as arrays:
        shapes = {name: arrays[name].shape for name in ("mu", "sigma", "arr_0", "features")}
    assert shapes == {"mu": (64,), "sigma": (64, 64), "arr_0": (1500, 16, 16, 3), "features": (1500, 64)}
    words = ("--images", stored / "samples", "--features", "digits")
    protocol, metrics, _ = measured(evaluate, tmp_path / "file", *words, "--reference", file)
    again, others, _ = measured(evaluate, tmp_path / "data", *words, "--data", "digits", "--no-copies")
    assert protocol.reference == again.reference
    assert metrics["tokens"]["all"] == pytest.approx({**others["tokens"]["all"], **metrics["tokens"]["all"]}, rel=1e-4)
    assert set(metrics["tokens"]["all"]) <= set(others["tokens"]["all"])
    assert others["counts"]["held_out"] == 297
    assert "gFID-297 (digits-cnn features)" in others["held_out"]


def test_a_folder_is_cropped_as_adm_does(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index, size in enumerate([(40, 50), (33, 70), (64, 64), (90, 41), (36, 36)]):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{index}.png")
    file = tmp_path / "stats.npz"
    words = ("reference", "--data", tmp_path / "photos", "--protocol", "adm16", *NETWORK, "--out", file)
    code, text, err = evaluate(*words)
    assert code == 0, err
    assert "adm_center_crop" in text and "at least 65 are needed" in text
    with np.load(file) as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 3)
    # Samples of the same photos, cropped the same way, are the reference; as they lie, they have no common size.
    words = ("generation", "--images", tmp_path / "photos", "--reference", file, *NETWORK, "--out", tmp_path / "out")
    code, _, err = evaluate(*words, "--protocol", "adm16")
    assert code == 0, err
    row = json.loads((tmp_path / "out/generation.json").read_text())["metrics"]["tokens"]["all"]
    assert row["gFID-5 (digits-cnn features)"] == pytest.approx(0, abs=1e-3)
    code, _, err = evaluate(*words)
    assert code == 2 and "must be square" in err


def test_a_reference_of_images_is_cropped_as_the_samples(evaluate, tmp_path):
    """Photographs of any shape, as they lie and as a file: the same pixels, so the same fingerprint."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"photos/{index}.png"
        )
    files = [tmp_path / f"{name}.npz" for name in "ab"]
    for file, more in zip(files, ((), ("--data-args", "crop=center", "flip=true"))):
        words = ("reference", "--data", tmp_path / "photos", "--protocol", "adm16", *NETWORK, "--out", file)
        code, text, err = evaluate(*words, *more)
        assert code == 0, err
        assert "augmentation" not in text and "published" not in text
    words = ("--images", tmp_path / "photos", *NETWORK)
    references = (*files, tmp_path / "photos")
    results = [
        measured(evaluate, tmp_path / f"{n}", *words, "--protocol", "adm16", "--reference", reference)
        for n, reference in enumerate(references)
    ]
    assert len({protocol.fingerprint for protocol, *_ in results}) == 1
    assert results[2][1]["tokens"]["all"]["gFID-5 (digits-cnn features)"] == pytest.approx(0, abs=1e-3)
    words = ("--images", tmp_path / "photos", *NETWORK, "--reference")
    refused(evaluate("generation", *words, tmp_path / "photos"), "must be square", "--protocol admSIZE")


def test_published_statistics_without_images(stored, evaluate, tmp_path):
    """Plain mu and sigma: FID alone, and the report says what cannot be known."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "plain.npz", mu=rng.normal(size=64), sigma=np.eye(64))
    words = ("--images", stored / "samples", "--reference", tmp_path / "plain.npz", *NETWORK)
    protocol, metrics, text = measured(evaluate, tmp_path / "out", *words)
    assert [name.split("-24")[0] for name in metrics["tokens"]["all"]] == ["gFID", "IS", "ADM-IS"]
    assert metrics["counts"]["reference"] is None
    assert protocol.reference.keys() == {"images", "file_sha256"}
    assert "no precision, recall and KID" in text and "how large its images were" in text


def test_adm_files_are_read_with_sfid(stored, evaluate, tmp_path, monkeypatch):
    """ADM's layout, whose images bring precision and recall, through an Inception with random weights."""
    images, *_ = next(uint8_batches(load_data("digits", "train", 16), 5, count=5))
    write_random_inception(tmp_path / "weights.pth", images)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
    network = features.load_features(f"inception:{tmp_path / 'weights.pth'}")
    with torch.no_grad():
        layers = network.layers(images)
    save_npz(tmp_path / "samples.npz", images)
    statistics = {
        key: value
        for layer, suffix in (("pool", ""), ("spatial", "_s"))
        for key, value in (
            (f"mu{suffix}", layers[layer].double().mean(0).numpy()),
            (f"sigma{suffix}", layers[layer].double().T.cov().numpy()),
        )
    }
    np.savez(tmp_path / "adm.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), **statistics)
    words = ("--images", tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", "--features")
    protocol, metrics, text = measured(evaluate, tmp_path / "out", *words, f"inception:{tmp_path / 'weights.pth'}")
    row = metrics["tokens"]["all"]
    names = ["gFID", "sFID", "IS", "ADM-IS", "KID", "precision", "recall"]
    assert list(row) == [f"{name}-5 (inception features)" for name in names]
    assert row["gFID-5 (inception features)"] == pytest.approx(0, abs=1e-3)
    assert row["sFID-5 (inception features)"] == pytest.approx(0, abs=1e-3)
    assert row["precision-5 (inception features)"] == row["recall-5 (inception features)"] == 1
    assert protocol.features["resize"].startswith("TensorFlow 1 bilinear to 299 px")
    assert "at least 2049 are needed" in text


def test_bad_images_are_one_line(stored, evaluate, tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, image in files.items():
            if isinstance(image, bytes):
                (tmp_path / name / f"{file}.png").write_bytes(image)
            else:
                image.save(tmp_path / name / f"{file}.png")
        return ("generation", "--images", tmp_path / name, *end)

    end = ("--reference", stored / "real", *NETWORK, "--out", tmp_path / "out")
    square = {f"a{index}": Image.new("RGB", (16, 16)) for index in range(5)}
    mixed = folder("mixed", **square, b=Image.new("RGB", (20, 20)))
    refused(evaluate(*mixed), "a0.png has 16 x 16 px", "b.png has 20 x 20 px", "--protocol adm16")
    broken = folder("broken", **square, b=b"no picture")
    refused(evaluate(*broken), "b.png", "not an image", "mend or remove it")
    half = (stored / "samples/000.png").read_bytes()[:80]
    refused(evaluate(*folder("half", **square, b=half)), "b.png")
    deep = folder("deep", **square, b=Image.fromarray(np.zeros((16, 16), np.uint16)))
    refused(evaluate(*deep), "b.png", "more than 8 bits")
    refused(evaluate(*folder("few", a=square["a0"], b=square["a1"])), "more than 3 images", "2 samples")
    refused(evaluate("generation", "--images", tmp_path / "none", *end), "no images at")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    refused(evaluate("generation", "--images", tmp_path / "bad.npz", *end), "bad.npz", "arr_0")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((5, 16, 16, 3)))
    refused(evaluate("generation", "--images", tmp_path / "float.npz", *end), "must be uint8", "float64")
    np.savez(tmp_path / "other.npz", images=np.zeros((5, 16, 16, 3), np.uint8))
    refused(evaluate("generation", "--images", tmp_path / "other.npz", *end), "other.npz", "arr_0")


def test_grayscale_is_read_as_three_equal_channels(stored, evaluate, tmp_path):
    (tmp_path / "gray").mkdir()
    with np.load(stored / "samples.npz") as arrays:
        gray = arrays["arr_0"][..., 0]
    for index, image in enumerate(gray):
        Image.fromarray(image).save(tmp_path / f"gray/{index:03d}.png")
    np.savez_compressed(tmp_path / "gray.npz", arr_0=gray)
    for name in ("gray", "gray.npz"):
        with pytest.warns(UserWarning, match="grayscale images are read as RGB"):
            images = open_images(str(tmp_path / name))
            pixels, *_ = next(uint8_batches(images, COUNT))
        assert torch.equal(pixels, torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1))


def test_references_that_do_not_fit_are_refused(stored, evaluate, tmp_path):
    images = ("generation", "--images", stored / "samples", "--out", tmp_path / "out")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "inception.npz", mu=rng.normal(size=2048), sigma=np.eye(2048))
    words = (*images, *NETWORK, "--reference")
    refused(evaluate(*words, tmp_path / "inception.npz"), "(2048,)", "digits-cnn has 64", "another feature network")
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    refused(evaluate(*words, tmp_path / "nan.npz"), "not finite")
    np.savez(tmp_path / "large.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((5, 32, 32, 3), np.uint8))
    refused(evaluate(*words, tmp_path / "large.npz"), "samples have 16 px, the reference 32 px")
    save_npz(tmp_path / "images.npz", torch.zeros(5, 3, 32, 32, dtype=torch.uint8))
    refused(evaluate(*words, tmp_path / "images.npz"), "samples have 16 px, the reference 32 px")
    refused(evaluate(*words, tmp_path / "none.npz"), "no images at", "none.npz")
    stats = tmp_path / "stats.npz"
    made = evaluate("reference", "--data", stored / "real", "--protocol", "adm16", *NETWORK, "--out", stats)
    assert made[0] == 0
    refused(evaluate(*images, "--features", "shapes", "--reference", stats), "digits-cnn (", "shapes-cnn (")
    refused(evaluate(*images, *NETWORK), "--data NAME or --reference PATH")
    refused(evaluate(*images, "--reference", stats), "no feature network comes with a reference")
    refused(evaluate(*images, "--reference", stats, "--features", "inception:no.pth"), "no.pth", "6726825d")
    refused(evaluate(*words, stats, "--count", 99), "--count 99", "holds 24 images")
    refused(evaluate("reference", "--data", "digits", "--protocol", "clean", "--out", stats), "adm256", "'clean'")
    assert not (tmp_path / "out").exists()


def test_other_protocols_do_not_compare(stored, evaluate, tmp_path):
    for name, more in (("a", ()), ("b", ("--count", 20))):
        measured(
            evaluate, tmp_path / name, "--images", stored / "samples", "--reference", stored / "real", *NETWORK, *more
        )
    words = ("compare", tmp_path / "a/generation.json", tmp_path / "b/generation.json")
    refused(evaluate(*words), "different protocols", "count: 24 / 20")
    code, text, _ = evaluate(*words, "--force")
    assert code == 0 and "DIFFERENT PROTOCOLS" in text
    protocol, _, _ = load_result(tmp_path / "a/generation.json")
    assert dataclasses.replace(protocol, models={}).fingerprint == protocol.fingerprint
