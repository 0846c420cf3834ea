"""The measuring loops and pictures, on a tokenizer and a generator simple enough to know their numbers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vistok.data.datamodule import load_data, make_loader, ordered_batches
from vistok.errors import UserError
from vistok.eval.features import load_features
from vistok.eval.generation import balanced_classes, measure_generation, picture_generation, side_by_side
from vistok.eval.pictures import labelled_grid, rows_by_label
from vistok.eval.reconstruction import measure_reconstruction, picture_reconstruction, prefix_lengths
from vistok.eval.report import read_losses, write_report
from vistok.interfaces import NULL_CLASS, Generator, SampleOptions, Tokenizer
from vistok.pipeline import reconstruct_images, sample_images, save_images, to_uint8
from vistok.tokens import Grid2D, Ordered1D, Tokens, TokenSpec


class Blocks(Tokenizer):
    """A code for each 4 x 4 block's grey level; blocks without a code are black. ``noise`` is added by the decoder."""

    def __init__(self, layout=None):
        super().__init__()
        self.spec = TokenSpec(layout or Ordered1D(16), (64,), 1, 16)

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
    batches = make_loader(load_data("digits", "val", 16), ordered_batches(count, batch_size))
    return measure_reconstruction(tokenizer, batches, network, lengths, decode_options=options)


def test_prefix_lengths():
    def spec(layout):
        return TokenSpec(layout, (8,), 1, 16)

    assert prefix_lengths(spec(Ordered1D(16))) == [1, 2, 4, 8, 16]
    assert prefix_lengths(spec(Ordered1D(12))) == [1, 2, 4, 8, 12]
    assert prefix_lengths(spec(Ordered1D(1))) == [1]
    assert prefix_lengths(spec(Ordered1D(16)), [16, 3, 3]) == [3, 16]
    assert prefix_lengths(spec(Grid2D(4, 4))) == [16]
    with pytest.raises(UserError, match=r"--tokens: 17 is outside 1\.\.16"):
        prefix_lengths(spec(Ordered1D(16)), [4, 17])
    with pytest.raises(UserError, match="only an ordered layout"):
        prefix_lengths(spec(Grid2D(4, 4)), [4])


def test_reconstruction_improves_with_tokens_and_names_its_features():
    network = load_features("digits")
    metrics = measure(Blocks(), [1, 8, 16], network=network)
    assert list(metrics["tokens"]) == ["1", "8", "16"]
    rows = list(metrics["tokens"].values())
    assert set(rows[0]) == {"psnr_db", "ssim", "rFID (digits-cnn features, N=64)", "class_accuracy"}
    for name, better in (("psnr_db", 1), ("ssim", 1), ("rFID (digits-cnn features, N=64)", -1)):
        values = [better * row[name] for row in rows]
        assert values == sorted(values), name
    originals = digits("val", 64)
    decoded = reconstruct_images(Blocks(), originals, None, seed=0, batch_size=64)
    errors = (to_uint8(originals).double() - decoded.double()).square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / errors)).mean().item()
    assert rows[-1]["psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert 0 < metrics["codebook"]["usage"] <= 1


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
    classes = balanced_classes(10, 10)
    whole = sample_images(*models, classes, SampleOptions(), seed=3, batch_size=10, decode_options={"noise": 0.1})
    split = sample_images(*models, classes, SampleOptions(), seed=3, batch_size=3, decode_options={"noise": 0.1})
    other = sample_images(*models, classes, SampleOptions(), seed=4, batch_size=10, decode_options={"noise": 0.1})
    assert whole.dtype == torch.uint8
    assert whole.shape == (10, 3, 16, 16)
    assert torch.equal(whole, split)
    assert not torch.equal(whole, other)
    assert len(whole.unique(dim=0)) == 10


def test_decoder_noise_is_the_same_for_every_prefix():
    images = digits("val", 2)
    few, all_ = (reconstruct_images(Blocks(), images, n, 0, 2, {"noise": 0.05}).float() for n in (4, 16))
    clean = [reconstruct_images(Blocks(), images, n, 0, 2).float() for n in (4, 16)]
    middle = (clean[0] > 40) & (clean[0] < 215) & (clean[0] == clean[1])
    assert middle.any()
    assert torch.equal((few - clean[0])[middle], (all_ - clean[1])[middle])


def generation_metrics(samples, class_ids, **options):
    train, val = load_data("digits", "train", 16), load_data("digits", "val", 16)
    return measure_generation(samples, class_ids, train, val, load_features("digits"), **options)


def test_generation_of_memorised_images():
    """Training images as samples: perfect in every respect but one."""
    dataset = load_data("digits", "train", 16)
    metrics = generation_metrics(
        to_uint8(digits("train", 100)), torch.tensor([dataset.get(index)["label"] for index in range(100)])
    )
    samples, real = metrics["samples"], metrics["held_out"]
    assert samples["copies_share"] == 1.0
    assert real["copies_share"] == 0.01
    assert samples["class_accuracy"] > 0.99
    assert samples["precision (digits-cnn features, N=100)"] > 0.7
    assert real["class_accuracy"] >= 0.97
    assert {"gFID (digits-cnn features, N=297)", "recall (digits-cnn features, N=297)"} <= set(real)
    assert metrics["copies_threshold_l2"] > 0


def test_generation_of_noise_and_of_one_image():
    classes = balanced_classes(100, 10)
    noise = torch.randint(0, 256, (100, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bad = generation_metrics(noise, classes)["samples"]
    assert bad["precision (digits-cnn features, N=100)"] < 0.1
    assert bad["copies_share"] == 0.0
    assert bad["class_accuracy"] < 0.3
    one = to_uint8(digits("val", 1)).expand(100, -1, -1, -1)
    collapsed = generation_metrics(one, classes)["samples"]
    assert collapsed["recall (digits-cnn features, N=100)"] < 0.05
    assert collapsed["class_accuracy"] == 0.1


def test_generation_without_classes_has_no_accuracy():
    metrics = generation_metrics(to_uint8(digits("val", 8)), balanced_classes(8, 0))
    assert "class_accuracy" not in metrics["samples"]
    assert [name for name, *_ in side_by_side(metrics)] == list(metrics["samples"])
    assert [real for _, _, real in side_by_side(metrics)] == list(metrics["held_out"].values())
    with pytest.raises(UserError, match="more than 3 images"):
        generation_metrics(to_uint8(digits("val", 3)), balanced_classes(3, 10))


def test_counting_copies_can_be_skipped():
    samples, classes = to_uint8(digits("val", 8)), balanced_classes(8, 10)
    full, quick = (generation_metrics(samples, classes, copies=copies) for copies in (True, False))
    assert "copies_threshold_l2" not in quick
    assert full["samples"].items() - quick["samples"].items() == {("copies_share", full["samples"]["copies_share"])}


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


def test_pictures_of_evaluations():
    dataset = load_data("digits", "val", 16)
    picture = picture_reconstruction(Blocks(), [dataset.get(index) for index in range(3)], [1, 16])
    assert picture.width > 3 * 72
    samples = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    small = picture_generation(samples, balanced_classes(20, 4), list("abcd"), columns=3)
    large = picture_generation(samples, balanced_classes(20, 4), list("abcd"), columns=5)
    assert large.width > small.width
    assert large.height == small.height
    assert picture_generation(samples, balanced_classes(20, 0), [], columns=5).height < small.height


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
