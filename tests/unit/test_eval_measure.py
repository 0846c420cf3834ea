"""The measuring loops and pictures, on a tokenizer and a generator simple enough to know their numbers."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tiny_models.models import make_generator, make_tokenizer
from vistok.data.datamodule import CheckableDataset, load_data
from vistok.errors import UserError
from vistok.eval.curves import plot_by_tokens
from vistok.eval.features import load_features
from vistok.eval.generation import balanced_classes, check_counts, measure_copies, measure_generation
from vistok.eval.images import image_batches, uint8_batches
from vistok.eval.protocol import EvalProtocol, save_result, table_by_tokens
from vistok.eval.reconstruction import (
    check_steps,
    measure_reconstruction,
    picture_reconstruction,
    table_by_steps,
)
from vistok.eval.reference import measure_reference
from vistok.eval.report import read_losses, write_report
from vistok.interfaces import NULL_CLASS, ClassCondition, Generator, SampleOptions, Tokenizer
from vistok.pictures import labelled_grid, prefix_grid, rows_by_label, save_images, to_uint8
from vistok.pipeline import (
    decode_prefixes,
    prefix_lengths,
    read_decode_options,
    sample_images,
    sample_tokens,
    tokenize_images,
)
from vistok.tokens import Grid2D, MultiScale, Ordered1D, Tokens, TokenSpec


class Blocks(Tokenizer):
    """A code for each 4 x 4 block's grey level; blocks without a code are black. ``noise`` is added by the decoder."""

    def __init__(self, layout=None):
        super().__init__()
        self.spec = TokenSpec(layout or Ordered1D(16), (64,), 1, 16)

    @property
    def decode_defaults(self):
        return {"steps": 2, "noise": 0.0, "mirror": False}

    def tokenize(self, images):
        levels = (F.avg_pool2d(images.mean(1, keepdim=True), 4) + 1) * 31.5
        return Tokens(levels.round().long().flatten(1)[:, :, None], self.spec)

    def embed(self, tokens):
        return tokens.ids / 31.5 - 1

    def decode(self, tokens, rng=None, noise=0.0):
        levels = F.pad(self.embed(tokens)[:, :, 0], (0, 16 - tokens.ids.shape[1]), value=-1.0)
        images = levels.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
        return images + noise * rng.normal(*images.shape[1:])

    def training_loss(self, images, rng):
        raise NotImplementedError


class Prototypes(Generator):
    """Draws each code around the mean code of its class."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        tokenizer, dataset = Blocks(), load_data("digits", "train", 16)
        images = torch.stack([dataset.get(index)["image"] for index in range(200)])
        labels = torch.tensor([dataset.get(index)["label"] for index in range(200)])
        ids = tokenizer.tokenize(images).ids.float()
        self.spec = tokenizer.spec
        self.means = torch.stack([ids[labels == digit].mean(0) for digit in range(10)])

    @classmethod
    def check(cls, spec):
        pass

    def loss(self, tokens, condition, rng):
        raise NotImplementedError

    def generate(self, condition, options, rng, progress=None):
        noise = options.temperature * 8 * (rng.uniform(16, 1) - 0.5)
        ids = (self.means[condition.class_ids] + noise).round().long().clamp(0, 63)
        return Tokens(ids[:, : options.num_tokens], self.spec)


def digits(split, count):
    dataset = load_data("digits", split, 16)
    return torch.stack([dataset.get(index)["image"] for index in range(count)])


def measure(tokenizer, lengths, batch_size=32, network=None, count=64, **options):
    batches = image_batches(load_data("digits", "val", 16), batch_size, count=count)
    return measure_reconstruction(tokenizer, batches, network, lengths, decode_options=options)


def test_prefix_lengths():
    def spec(layout):
        return TokenSpec(layout, (8,), 1, 16)

    assert prefix_lengths(spec(Ordered1D(16))) == [1, 2, 4, 8, 16]
    assert prefix_lengths(spec(Ordered1D(12))) == [1, 2, 4, 8, 12]
    assert prefix_lengths(spec(Ordered1D(1))) == [1]
    assert prefix_lengths(spec(Ordered1D(16)), [16, 3, 3]) == [3, 16]
    assert prefix_lengths(spec(Grid2D(4, 4))) == [16]
    scales = spec(MultiScale(((1, 1), (2, 2), (4, 4))))
    assert prefix_lengths(scales) == [1, 5, 21] and prefix_lengths(scales, [21, 5]) == [5, 21]
    with pytest.raises(UserError, match=r"--tokens: 17 is outside 1\.\.16"):
        prefix_lengths(spec(Ordered1D(16)), [4, 17])
    with pytest.raises(UserError, match="only an ordered layout"):
        prefix_lengths(spec(Grid2D(4, 4)), [4])
    with pytest.raises(UserError, match=r"--tokens: 4 is no prefix of whole scales \(1, 5, 21\)"):
        prefix_lengths(scales, [4])


def test_reconstruction_improves_with_tokens_and_names_its_features():
    network = load_features("digits")
    metrics = measure(Blocks(), [1, 8, 16], network=network)
    assert list(metrics["tokens"]) == ["1", "8", "16"]
    rows = list(metrics["tokens"].values())
    assert set(rows[0]) == {"psnr_db", "ssim", "rFID-64 (digits-cnn features)", "class_accuracy"}
    for name, better in (("psnr_db", 1), ("ssim", 1), ("rFID-64 (digits-cnn features)", -1)):
        values = [better * row[name] for row in rows]
        assert values == sorted(values), name
    originals = digits("val", 64)
    decoded = decode_prefixes(Blocks(), tokenize_images(Blocks(), originals, 64), [16], seed=0, batch_size=64)[16]
    errors = (to_uint8(originals).double() - decoded.double()).square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / errors)).mean().item()
    assert rows[-1]["psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert 0 < metrics["codebook"]["usage"] <= 1
    assert metrics["counts"] == {"images": 64}


def test_reconstruction_does_not_depend_on_the_batch_size():
    one = measure(Blocks(), [4, 16], batch_size=7, noise=0.2)
    other = measure(Blocks(), [4, 16], batch_size=64, noise=0.2)
    for length in ("4", "16"):
        assert one["tokens"][length] == pytest.approx(other["tokens"][length], rel=1e-5)
    assert one["codebook"] == other["codebook"]


def test_reconstruction_without_prefixes_or_features():
    metrics = measure(Blocks(Grid2D(4, 4)), [16])
    assert set(metrics["tokens"]["16"]) == {"psnr_db", "ssim"}


def test_samples_depend_on_the_seed_and_their_number_alone():
    models = (Prototypes(), Blocks())
    classes = ClassCondition(balanced_classes(10, 10))
    whole = sample_images(*models, classes, SampleOptions(), seed=3, batch_size=10, decode_options={"noise": 0.1})
    split = sample_images(*models, classes, SampleOptions(), seed=3, batch_size=3, decode_options={"noise": 0.1})
    other = sample_images(*models, classes, SampleOptions(), seed=4, batch_size=10, decode_options={"noise": 0.1})
    assert whole.dtype == torch.uint8
    assert whole.shape == (10, 3, 16, 16)
    assert torch.equal(whole, split)
    assert not torch.equal(whole, other)
    assert len(whole.unique(dim=0)) == 10


def test_decoder_noise_is_the_same_for_every_prefix():
    tokens = tokenize_images(Blocks(), digits("val", 2), 2)
    noisy, clean = (decode_prefixes(Blocks(), tokens, [4, 16], 0, 2, {"noise": noise}) for noise in (0.05, 0.0))
    middle = (clean[4] > 40) & (clean[4] < 215) & (clean[4] == clean[16])
    assert middle.any()
    assert torch.equal((noisy[4].float() - clean[4])[middle], (noisy[16].float() - clean[16])[middle])


def generation_metrics(samples, class_ids, reference=None):
    """``samples``: images, or pairs of a number of tokens and images."""
    sets = samples if isinstance(samples, list) else [("16", samples)]
    network = load_features("digits")
    reference = reference or measure_reference(load_data("digits", "train", 16), network)
    batches = [(dict(sets), class_ids, torch.arange(len(class_ids)))]
    val = load_data("digits", "val", 16)
    return measure_generation(batches, len(class_ids), reference, network, uint8_batches(val, 100), len(val))


def test_generation_of_memorised_images():
    """Training images as samples: perfect in every respect but one."""
    dataset = load_data("digits", "train", 16)
    classes = torch.tensor([dataset.get(index)["label"] for index in range(100)])
    metrics = generation_metrics(to_uint8(digits("train", 100)), classes)
    samples, real = metrics["tokens"]["16"], metrics["held_out"]
    assert samples["class_accuracy"] > 0.99
    assert samples["precision-100 (digits-cnn features)"] == 1.0
    assert real["class_accuracy"] >= 0.97
    assert len(real) == len(samples)
    assert {"gFID-297 (digits-cnn features)", "recall-297 (digits-cnn features)"} <= set(real)
    assert metrics["counts"] == {"samples": 100, "held_out": 297, "reference": 1500}


def copies(samples):
    held_out = to_uint8(digits("val", 297))
    return measure_copies(samples, held_out, uint8_batches(load_data("digits", "train", 16), 400))


def test_copies_are_counted_for_each_number_of_tokens():
    noise = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shares, threshold = copies({"1": noise, "16": to_uint8(digits("train", 60)), "4": to_uint8(digits("val", 60))})
    assert (shares["1"], shares["16"]) == (0.0, 1.0)
    assert shares["4"] < 0.1
    assert threshold > 0


def test_generation_of_noise_and_of_one_image():
    classes = balanced_classes(100, 10)
    noise = torch.randint(0, 256, (100, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metrics = generation_metrics(noise, classes)
    bad, real = metrics["tokens"]["16"], metrics["held_out"]
    assert bad["gFID-100 (digits-cnn features)"] > 10 * real["gFID-297 (digits-cnn features)"]
    assert bad["KID-100 (digits-cnn features)"] > 10 * abs(real["KID-297 (digits-cnn features)"])
    assert bad["recall-100 (digits-cnn features)"] == 0
    assert bad["class_accuracy"] < 0.3
    one = to_uint8(digits("val", 1)).expand(100, -1, -1, -1)
    collapsed = generation_metrics(one, classes)["tokens"]["16"]
    assert collapsed["recall-100 (digits-cnn features)"] < 0.05
    assert collapsed["IS-100 (digits-cnn features)"] == pytest.approx(1, abs=1e-6)
    assert collapsed["class_accuracy"] == 0.1


def test_real_images_have_their_own_count_in_the_table():
    metrics = generation_metrics(to_uint8(digits("val", 8)), balanced_classes(8, 0))
    assert "class_accuracy" not in metrics["tokens"]["16"]
    columns, (samples, real) = table_by_tokens(metrics)
    assert columns == ["tokens", *metrics["tokens"]["16"]]
    assert (samples[0], real[0]) == ("16", "real held-out images (N=297)")
    assert all(cell.endswith(" (N=297)") for cell in real[1:]), "no figure of 297 images passes for one of 8"
    assert [float(cell.split()[0]) for cell in real[1:]] == pytest.approx(list(metrics["held_out"].values()), rel=1e-3)


def test_sets_too_small_for_the_neighbours_are_refused():
    with pytest.raises(UserError, match="more than 3 images of each kind, got 3 samples, 1500 reference"):
        check_counts(samples=3, reference=1500)
    check_counts(samples=4, reference=None)


def test_generation_from_several_numbers_of_tokens():
    """Each row is what its set has alone, in whatever batches it comes."""
    classes = balanced_classes(60, 10)
    noise = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sets = [("1", noise), ("16", to_uint8(digits("train", 60)))]
    network = load_features("digits")
    reference = measure_reference(load_data("digits", "train", 16), network)
    together = generation_metrics(sets, classes, reference)
    assert list(together["tokens"]) == ["1", "16"]
    for length, images in sets:
        alone = generation_metrics([(length, images)], classes, reference)
        assert together["tokens"][length] == alone["tokens"][length]
        assert together["held_out"] == alone["held_out"]
    places = torch.arange(60).split(7)
    batches = [({name: images[rows] for name, images in sets}, classes[rows], rows) for rows in places]
    pieces = measure_generation(batches, 60, reference, network)
    for length in ("1", "16"):
        assert pieces["tokens"][length] == pytest.approx(together["tokens"][length], rel=1e-4)


def test_a_shorter_sample_is_a_prefix_of_a_longer_one():
    tokenizer = make_tokenizer("flextok")
    generator = make_generator("gpt", tokenizer.spec)
    condition = ClassCondition(balanced_classes(6, 10))

    def sample(**options):
        ways = {"guidance_interval": (0, 3 / 8), "final_temperature": 0.5, "top_p": 0.9}
        options = SampleOptions(cfg_scale=2.0, **ways, **options)
        return sample_tokens(generator, condition, options, seed=5, batch_size=4)

    whole = sample()
    assert len(whole.ids.unique(dim=0)) == 6
    for count in range(1, 9):
        assert torch.equal(sample(num_tokens=count).ids, whole.prefix(count).ids)
    options = SampleOptions(num_tokens=2)
    images = sample_images(generator, tokenizer, condition, options, seed=5, batch_size=4)
    tokens = sample_tokens(generator, condition, SampleOptions(), seed=5, batch_size=6)
    assert torch.equal(images, decode_prefixes(tokenizer, tokens, [2], seed=5, batch_size=4)[2])


class Black:
    """Black images that can tell whether a picture of them has turned red."""

    def __init__(self):
        self.num_classes, self.class_names, self.description = 0, [], {"name": "black", "split": "val"}
        self.agreement_definitions = {"red": "red images", "index": "their number"}

    def __len__(self):
        return 7

    def get(self, index, rng=None):
        return {"image": torch.full((3, 16, 16), -1.0), "label": -1, "text": "", "key": str(index)}

    def agreement(self, index, image):
        assert image.min() >= -1
        assert image.max() <= 1
        return {"red": float(image[0].mean() > 0), "index": float(index)}


def test_a_data_set_may_check_its_reconstructions():
    class Reddening(Blocks):
        def decode(self, tokens, rng=None, **options):
            images = super().decode(tokens, rng, **options)
            images[:, 0] = 1.0 if tokens.ids.shape[1] > 8 else -1.0
            return images

    dataset = Black()
    assert isinstance(dataset, CheckableDataset)
    assert not isinstance(load_data("digits", "val", 16), CheckableDataset)
    metrics = measure_reconstruction(Reddening(), image_batches(dataset, 3), None, [4, 16], checked=dataset)["tokens"]
    assert {name: metrics["4"][name] for name in ("red", "index")} == {"red": 0.0, "index": 3.0}
    assert {name: metrics["16"][name] for name in ("red", "index")} == {"red": 1.0, "index": 3.0}


def test_a_flow_is_measured_for_each_number_of_steps():
    class Steps(Blocks):
        def decode(self, tokens, rng=None, noise=0.0, steps=2, mirror=False):
            return super().decode(tokens, rng, noise) * (1 - 0.5**steps)

    batches = image_batches(load_data("digits", "val", 16), 20, count=30)
    metrics = measure_reconstruction(Steps(), batches, None, [8, 16], decode_options={"steps": 3}, steps=[1, 3, 9])
    assert list(metrics["steps"]) == ["1", "3", "9"]
    values = [row["psnr_db"] for row in metrics["steps"].values()]
    assert values == sorted(values) and values[1] == metrics["tokens"]["16"]["psnr_db"]
    assert metrics["counts"] == {"images": 30}
    columns, rows = table_by_steps(metrics)
    assert columns == ["steps", "psnr_db", "ssim"] and [row[0] for row in rows] == ["1", "3", "9"]


def test_steps_are_for_decoders_that_take_them():
    assert check_steps(Blocks(), [4, 1, 4]) == [1, 4]
    assert check_steps(Blocks(), None) == []
    with pytest.raises(UserError, match="--steps: VQGAN decodes without steps"):
        check_steps(make_tokenizer("vqgan"), [1])
    with pytest.raises(UserError, match="--steps: at least 1, got 0"):
        check_steps(Blocks(), [0, 2])


def test_curves_have_a_panel_for_each_metric(tmp_path):
    tokens = {str(2**n): {"psnr_db": 10.0 + n, "ssim": n / 5, "colors": 1.0, "count": 0.5} for n in range(5)}
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.eval.curves._save", lambda figure, path: figures.append(figure))
        plot_by_tokens(tokens, tmp_path / "curves.png", real=dict.fromkeys(tokens["1"], 0.7))
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == list(tokens["1"])
    measured, real = figure.axes[0].lines
    assert measured.get_xydata().tolist() == [[1, 10], [2, 11], [4, 12], [8, 13], [16, 14]]
    assert set(real.get_ydata()) == {0.7}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4", "8", "16"]
    plot_by_tokens(tokens, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_balanced_classes_are_interleaved():
    assert balanced_classes(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_classes(2, 0).tolist() == [NULL_CLASS] * 2


def test_grid_shows_every_image_enlarged_at_its_place():
    images = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    images[1, 2, 0] = 255
    picture = np.asarray(labelled_grid(images, ["zero", "one"], ["a", "b", "c"], cell_px=20))
    red = (picture == (255, 0, 0)).all(-1)
    rows, columns = red.any(1).nonzero()[0], red.any(0).nonzero()[0]
    assert red.sum() == 24 * 24
    assert (rows[-1] - rows[0], columns[-1] - columns[0]) == (23, 23)
    black = (picture == 0).all(-1)
    assert rows[0] > black[: picture.shape[0] // 2].any(1).nonzero()[0][-1]
    assert labelled_grid(images, ["", ""], ["", "", ""], cell_px=8).size == (30, 20)


def test_rows_hold_images_of_one_label():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    cells, rows, columns = rows_by_label(images, ["b", "a", "b", "b", "a"], columns=2)
    assert rows == ["b", "b", "a"]
    assert columns == ["", ""]
    assert cells[:, :, 0, 0, 0].tolist() == [[0, 2], [3, 255], [1, 4]]


def test_a_grid_of_many_images_has_about_ten_rows_or_one_for_each_of_a_hundred_labels(monkeypatch):
    def rows(labels):
        images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
        cells, names, _ = rows_by_label(images, labels)
        assert cells.shape[:2] == (len(names), 10)
        return names

    assert rows([""] * 5000) == [""] * 10
    assert rows(list("abcde") * 1000) == [name for name in "abcde" for _ in range(2)]
    assert rows([f"{n}" for n in range(150)] * 10) == [f"{n}" for n in range(100)]
    monkeypatch.setattr("vistok.pictures._MOST_ROWS", 3)
    assert rows(list("abcdefghijkl") * 10) == ["a", "b", "c"]


def test_pictures_of_evaluations():
    dataset = load_data("digits", "val", 16)
    picture = picture_reconstruction(Blocks(), [dataset.get(index) for index in range(3)], [1, 16])
    assert picture.width > 3 * 72
    # Whatever is decoded, a picture stays one that can be opened.
    images = torch.zeros(150, 3, 8, 8, dtype=torch.uint8)
    assert prefix_grid(images, {4: images}, [""] * 150).size == (2 * 74, 22 + 100 * 74)


def test_save_images_writes_grid_pngs_and_npz(tmp_path):
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    save_images(tmp_path / "out", images, ["3", "3", "4"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "samples.npz",
    ]
    expected = images.permute(0, 2, 3, 1).numpy()
    array = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert array.dtype == np.uint8
    assert np.array_equal(array, expected)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "00002.png")), expected[2])


def test_the_array_is_written_before_anything_that_may_fail(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no room for a picture")

    monkeypatch.setattr("vistok.pictures.save_png", fail)
    with pytest.raises(UserError, match="no room"):
        save_images(tmp_path, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["", ""])
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_decode_options_are_checked_before_anything_is_decoded():
    tokenizer = Blocks()
    assert read_decode_options(tokenizer, []) == {"steps": 2, "noise": 0.0, "mirror": False}
    options = read_decode_options(tokenizer, ["noise=1", "steps=3", "mirror=true"])
    assert options == {"steps": 3, "noise": 1.0, "mirror": True}
    assert type(options["noise"]) is float, "1 and 1.0 are one protocol"
    for word, parts in {
        "stepz=1": ["'stepz'", "did you mean 'steps'?"],
        "steps=fast": ["steps must be of type int", "'fast'"],
        "steps=2.7": ["steps must be of type int", "2.7"],
        "steps=true": ["steps must be of type int", "True"],
        "noise=loud": ["noise must be of type float"],
        "mirror=1": ["mirror must be of type bool"],
        "rng=1": ["'rng'", "valid: steps, noise, mirror"],
        "steps.a=1": ["steps must be of type int"],
    }.items():
        with pytest.raises(UserError, match="--decode") as caught:
            read_decode_options(tokenizer, [word])
        assert all(part in str(caught.value) for part in parts)


def test_images_that_are_skipped_are_not_measured(tmp_path):
    for n in range(6):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
    for n in (1, 2, 5):
        (tmp_path / f"{n}.png").write_bytes(b"broken")
    data = load_data(str(tmp_path), "val", 8, val_fraction=1.0, on_error="skip")
    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        batches = list(image_batches(data, batch_size=2))
    assert [level for batch in batches for level in to_uint8(batch["image"])[:, 0, 0, 0].tolist()] == [0, 3, 4]


def test_report_begins_with_the_headlines(tmp_path):
    protocol = EvalProtocol(
        task="reconstruction",
        data={"name": "digits"},
        split="val",
        count=40,
        image_size_px=16,
        quantised=True,
        weights={},
        settings={},
        seed=0,
        features={},
        reference={},
        definitions={},
        models={},
    )
    metrics = {"tokens": {"1": {"psnr_db": 14.313}, "16": {"psnr_db": 21.57}}, "codebook": {"usage": 0.5}}
    save_result(tmp_path / "reconstruction.json", protocol, metrics)
    with pytest.raises(UserError, match=r"reconstruction\.json was written by another version"):
        write_report(tmp_path)
    save_result(tmp_path / "reconstruction.json", protocol, {**metrics, "counts": {"images": 40}}, {"seconds": 3.4})
    metrics = {
        "tokens": {
            "1": {"gFID (cnn features)": 50.0, "precision (cnn features)": 0.3, "class_accuracy": 0.2},
            "16": {"gFID (cnn features)": 10.378, "precision (cnn features)": 0.6, "class_accuracy": 0.934},
        },
        "held_out": {"gFID (cnn features)": 7.152, "precision (cnn features)": 0.7, "class_accuracy": 0.983},
        "counts": {"samples": 500, "held_out": 297, "reference": 1500},
    }
    generation = dataclasses.replace(protocol, task="generation", count=500)
    save_result(tmp_path / "generation.json", generation, metrics, {"seconds": 5.4})
    summary, details = write_report(tmp_path).read_text().split("## ", 1)
    for line in (
        "| reconstruction: images measured | 40 |  |",
        "| reconstruction: PSNR from 1 token | 14.31 dB |  |",
        "| reconstruction: PSNR from 16 tokens | 21.57 dB |  |",
        "| samples: images measured | 500 | 297 |",
        "| samples: gFID (cnn features) from 16 tokens | 10.38 | 7.152 |",
        "| samples: class_accuracy from 16 tokens | 0.934 | 0.983 |",
        "| training and measuring (starting Python not counted) | 9 s |  |",
    ):
        assert line in summary.splitlines()
    assert "precision" not in summary
    for line in (
        "## Generation of 500 images",
        "| tokens | gFID (cnn features) | precision (cnn features) | class_accuracy |",
        "| 1 | 50 | 0.3 | 0.2 |",
        "| 16 | 10.38 | 0.6 | 0.934 |",
        "| real held-out images (N=297) | 7.152 | 0.7 | 0.983 |",
    ):
        assert line in details.splitlines()
    assert "![" not in details, "pictures that are not there are not shown"
    for name in ("generation", "generation_by_tokens", "reconstruction"):
        (tmp_path / f"{name}.png").touch()
    details = write_report(tmp_path).read_text()
    assert details.index("](generation.png)") < details.index("](generation_by_tokens.png)")


def test_report_reads_what_is_there(tmp_path):
    logs = {
        "tokenizer": "update,train/loss,val/loss,lr\n10,2.5,,0.1\n20,,2.25,\n30,1.5,,0.1\n",
        "generator": "update,train/loss,train/loss_codes\n5,4.0,4.0\n6,,\n",
    }
    for part, text in logs.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "metrics.csv").write_text(text)
    assert read_losses(tmp_path / "tokenizer" / "metrics.csv") == {
        "train/loss": ([10.0, 30.0], [2.5, 1.5]),
        "val/loss": ([20.0], [2.25]),
    }
    assert list(read_losses(tmp_path / "generator" / "metrics.csv")) == ["train/loss"], "one term is the loss itself"
    (tmp_path / "generator" / "run.yaml").write_text("seed: 7\n")
    (tmp_path / "generator" / "spec.json").write_text(json.dumps({"seconds": 12.5}))
    text = write_report(tmp_path).read_text()
    assert "![loss curves](loss_curves.png)" in text
    assert "| training the generator | 12 |" in text
    assert "seed: 7" in text
    assert Image.open(tmp_path / "loss_curves.png").width > 800


def test_report_on_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to report on"):
        write_report(tmp_path)
