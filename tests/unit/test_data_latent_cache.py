import pickle
import resource
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from tiny_models.args import TINY_ARGS
from tiny_models.models import make_tokenizer, randomized
from tiny_models.vae import save_vae
from vistok.checkpoint import export, load_tokenizer
from vistok.config import Component, build, to_plain
from vistok.data import latent_cache
from vistok.data.datamodule import DataModule, load_data, load_images
from vistok.errors import UserError
from vistok.losses.alignment import AlignmentConfig
from vistok.tokenizers.flextok import FlexTok


def component(vae, **changes):
    return Component("flextok", {**TINY_ARGS["tokenizers"]["flextok"], "patch_size": 2, "vae": str(vae), **changes})


def tokenizer(vae, **changes):
    return randomized(build("tokenizers", component(vae, **changes)))


class Noise:
    """Random images with a class and a caption, moved about at random in training."""

    num_classes, class_names = 2, ["a", "b"]

    def __init__(self, split, count):
        self.split, self.count, self.description = split, count, {"name": "noise", "split": split}

    def __len__(self):
        return self.count

    def get(self, index, rng=None):
        image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
        shift = 0 if rng is None else int(torch.randint(1, 16, (), generator=rng))
        return {"image": image.roll(shift, -1), "label": index % 2, "text": f"no. {index}", "key": f"noise/{index}"}


def noise():
    return {"train": Noise("train", 40), "val": Noise("val", 9)}


def extract(model, out, **options):
    latent_cache.extract(model, noise(), out, **options)
    return {split: load_data(str(out), split, 16) for split in ("train", "val")}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_vae(folder)
    return folder


@pytest.fixture(scope="module")
def model(vae):
    return tokenizer(vae)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "noise"
    extract(model, out, passes=3, seed=5, batch_size=16)
    return out


def test_round_trip(model, folder):
    for split, images in noise().items():
        cache = load_data(str(folder), split, 16)
        assert len(cache) == len(images)
        assert cache.class_names == images.class_names
        for index in (0, 1, len(images) - 1):
            sample, source = cache.get(index), images.get(index)
            assert sample["latent"].dtype == torch.float32 and sample["latent"].shape == (5, 8, 8)
            expected = model.encode_latent(source["image"][None])[0]
            torch.testing.assert_close(sample["latent"], expected, rtol=2**-11, atol=1e-5)
            assert {k: sample[k] for k in ("label", "text", "key")} == {k: source[k] for k in ("label", "text", "key")}
    assert cache.description["data"] == images.description
    assert sorted(path.name for path in folder.iterdir()) == ["latents.json", "train.npy", "val.npy"]
    assert (folder / "val.npy").stat().st_size == 128 + 9 * 5 * 8 * 8 * 2


def test_passes_augment_training_images_only(model, folder, tmp_path):
    train, val = (load_data(str(folder), split, 16) for split in ("train", "val"))
    assert (len(train.latents), len(val.latents)) == (3, 1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (train.latents[one] != train.latents[other]).any((1, 2, 3)).mean() > 0.9
    # The stream of an image is named by seed, pass and index, not by the batch it was in.
    again = extract(model, tmp_path / "again", passes=3, seed=5, batch_size=7)["train"]
    np.testing.assert_allclose(again.latents, train.latents, atol=2e-3)
    drawn = {train.get(0, rng(seed))["latent"].sum().item() for seed in range(30)}
    assert drawn == {train.stored(number, 0)["latent"].sum().item() for number in range(3)}


def test_rows_are_read_from_the_disk_as_they_are_needed(folder):
    train = load_data(str(folder), "train", 16)
    assert isinstance(train.latents, np.memmap)
    pickled = pickle.dumps(train)
    assert len(pickled) < train.latents.nbytes / 10, "loader processes are sent the path, not the table"
    assert torch.equal(pickle.loads(pickled).get(7)["latent"], train.get(7)["latent"])

    def batches(workers):
        return list(islice(DataModule(train, None, 4, workers, seed=7).train_dataloader(), 3))

    for alone, parallel in zip(batches(0), batches(1), strict=True):
        assert set(alone) == {"latent", "label", "text", "key", "position"}
        assert torch.equal(alone["latent"], parallel["latent"])


def test_latents_train_as_their_images_do(model, folder):
    images = torch.stack([noise()["val"].get(index)["image"] for index in range(8)])
    cached = torch.stack([load_data(str(folder), "val", 16).get(index)["latent"] for index in range(8)])
    latents = model.encode_latent(images)
    assert model.encode_latent(latents) is latents
    assert torch.equal(model.tokenize(latents).ids, model.tokenize(images).ids)
    of_images, of_latents, of_cached, of_others = (
        model.training_loss(batch, rng()).total for batch in (images, latents, cached, latents.flip(0))
    )
    assert torch.equal(of_latents, of_images)
    torch.testing.assert_close(of_cached, of_images, rtol=1e-4, atol=0)
    assert not torch.isclose(of_others, of_images, rtol=1e-3), "the tolerance tells other samples apart"
    assert torch.equal(model(latents, rng()).total, of_images)


@pytest.mark.parametrize("shape", [(4, 5, 8), (4, 5, 4, 8), (4, 3, 8, 8), (4, 4, 8, 8), (4, 5, 16, 16)])
def test_other_shapes_are_told_both_that_fit(model, shape):
    words = r"images \(B, 3, 16, 16\) in \[-1, 1\] or latents \(B, 5, 8, 8\), got torch.float32 \(4, "
    for function in (model.encode_latent, model.tokenize, lambda batch: model.training_loss(batch, rng())):
        with pytest.raises(UserError, match=words):
            function(torch.zeros(shape))
    with pytest.raises(UserError, match=r"got torch.int64 \(4, 5, 8, 8\)"):
        model.tokenize(torch.zeros(4, 5, 8, 8, dtype=torch.int64))


def test_a_model_of_pixels_takes_images_alone():
    pixels = randomized(build("tokenizers", Component("flextok", TINY_ARGS["tokenizers"]["flextok"])))
    assert pixels.latent_shape is None and pixels.latent_hash == ""
    with pytest.raises(UserError, match=r"images \(B, 3, 16, 16\) in \[-1, 1\], got"):
        pixels.tokenize(torch.zeros(4, 5, 8, 8))


def test_latents_that_look_like_images_are_no_latents(tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    save_vae(tmp_path, block_out_channels=(8,), latent_channels=3, **blocks)
    model = tokenizer(tmp_path)
    assert model.latent_shape is None
    images = torch.rand(2, 3, 16, 16, generator=rng())
    assert not torch.equal(model.encode_latent(images), images)


def test_a_teacher_needs_images(model, vae):
    class Teacher(torch.nn.Module):
        width = 4

        def forward(self, images):
            return images.new_ones(len(images), 2, 2, 4)

    config = replace(model.config, alignment=AlignmentConfig(projector_width=8))
    aligned = FlexTok(config, model.vae.module, Teacher())
    assert "alignment" in aligned.training_loss(torch.zeros(2, 3, 16, 16), rng()).terms
    with pytest.raises(UserError, match=r"needs images.*tokenizer\.args\.alignment=null"):
        aligned.training_loss(torch.zeros(2, 5, 8, 8), rng())
    assert aligned.tokenize(torch.zeros(2, 5, 8, 8)).ids.shape == (2, 8, 1)


def test_latents_of_another_vae_are_refused(model, vae, folder, tmp_path):
    cache = load_data(str(folder), "train", 16)
    latent_cache.check_vae(cache, model)
    latent_cache.check_vae(cache, tokenizer(vae, decoder_depth=1, num_registers=4))
    save_vae(tmp_path / "seed", seed=1)
    save_vae(tmp_path / "groups", norm_num_groups=2)
    others = [tokenizer(tmp_path / "seed"), tokenizer(tmp_path / "groups"), tokenizer(vae, vae_scale=0.5)]
    assert len({other.latent_hash for other in [model, *others]}) == 4
    for other in others:
        with pytest.raises(UserError, match=f"VAE {model.latent_hash[:12]}.*{other.latent_hash[:12]}.* latents"):
            latent_cache.check_vae(cache, other)
    pixels = build("tokenizers", Component("flextok", TINY_ARGS["tokenizers"]["flextok"]))
    with pytest.raises(UserError, match="this tokenizer has none: train it on images"):
        latent_cache.check_vae(cache, pixels)
    with pytest.raises(UserError, match="no latents to cache"):
        latent_cache.extract(pixels, noise(), tmp_path / "none")


def test_an_export_has_the_vae_that_it_was_trained_with(model, vae, tmp_path):
    made_of = Component("flextok", to_plain(model.config))
    export(tmp_path / "run", "tokenizer", made_of, model.spec, model.state_dict(), helpers=model.frozen_helpers)
    assert load_tokenizer(tmp_path / "run").latent_hash == model.latent_hash


def test_unfit_caches_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="latents of 16 px images, not of 32 px"):
        load_data(str(folder), "train", 32)
    with pytest.raises(UserError, match="no split 'test'"):
        load_data(str(folder), "test", 16)
    with pytest.raises(UserError, match="holds latents, not images"):
        load_images(str(folder), "train", 16)
    broken = tmp_path / "broken"
    broken.mkdir()
    config = latent_cache.Config(str(broken))
    with pytest.raises(UserError, match=r"broken is no latent cache .* python -m vistok.data latents"):
        latent_cache.build(config, "train", 16)
    (broken / "latents.json").write_text((folder / "latents.json").read_text())
    for content in (None, b"", (folder / "train.npy").read_bytes()[:5000]):
        if content is not None:
            (broken / "train.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"train\.npy is no complete table of latents"):
            latent_cache.build(config, "train", 16)


def test_nothing_half_written_is_left(model, tmp_path):
    def stop(shown):
        if shown > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(model, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write .*out: .*File too large"):
            extract(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="at least 1 and workers at least 0, got 0, 32 and 0"):
        extract(model, tmp_path / "out", passes=0)


# ---------------------------------------------------------------------- moments


@pytest.fixture(scope="module")
def bridge():
    model = make_tokenizer("tokenbridge")
    images = torch.stack([noise()["train"].get(index)["image"] for index in range(40)])
    model.quantizer.fit(model.tokenizer.module.encode(images), "gaussian")
    return model


@pytest.fixture(scope="module")
def drawn(bridge, tmp_path_factory):
    """The cache of moments of ``noise()``."""
    return extract(bridge, tmp_path_factory.mktemp("moments") / "noise", moments=True, batch_size=16)


def test_moments_are_those_of_the_posterior_of_both_flips(bridge, drawn):
    images = torch.stack([noise()["train"].get(index)["image"] for index in range(40)])
    assert drawn["train"].latents.shape == (1, 40, 2, 6, 8, 8) and drawn["val"].latents.shape == (1, 9, 3, 8, 8)
    for flip, each in enumerate((images, images.flip(-1))):
        posterior, scale = bridge.tokenizer.module.posterior(each), bridge.tokenizer.module.config.scaling_factor
        expected = torch.cat([posterior.mean, posterior.std], dim=1) * scale
        stored = torch.from_numpy(drawn["train"].latents[0, :, flip].astype(np.float32))
        torch.testing.assert_close(stored, expected, rtol=2**-11, atol=1e-5)


def test_the_codes_of_means_are_those_of_the_images(bridge, drawn):
    for split, data in noise().items():
        images, means = (
            torch.stack([source.get(index)[name] for index in range(len(data))])
            for source, name in ((data, "image"), (drawn[split], "latent"))
        )
        exact, ids = bridge.encode_latent(images), bridge.tokenize(images).ids
        assert bridge.encode_latent(exact) is exact and torch.equal(bridge.tokenize(exact).ids, ids)
        assert (bridge.tokenize(means).ids == ids).float().mean() > 0.99, "a float16 is rounded"
        assert (bridge.tokenize(means.flip(-1)).ids == ids).float().mean() < 0.9
    assert torch.equal(bridge.decode_latent(exact), bridge.decode(exact.flatten(2).mT))


def test_latents_are_drawn_from_image_and_mirror_image(drawn):
    train = drawn["train"]
    draws = torch.stack([train.get(3, rng(seed))["latent"] for seed in range(400)])
    assert torch.equal(draws[7], train.get(3, rng(7))["latent"]), "a draw depends on its rng alone"
    moments = torch.from_numpy(train.latents[0, 3].astype(np.float32))
    means, stds = moments.chunk(2, dim=1)
    mirrored = (draws[:, None] - means).square().mean((2, 3, 4)).argmin(dim=1)
    assert 150 < mirrored.sum() < 250
    for flip in (0, 1):
        standard = (draws[mirrored == flip] - means[flip]) / stds[flip]
        assert standard.mean().abs() < 0.02 and abs(standard.std() - 1) < 0.02
    assert drawn["val"].has_moments is False
    assert torch.equal(drawn["val"].get(3, rng(1))["latent"], drawn["val"].get(3)["latent"])


def test_moments_are_refused_by_another_vae_and_by_one_without(bridge, model, drawn, tmp_path):
    latent_cache.check_vae(drawn["train"], bridge)
    finer = make_tokenizer("tokenbridge")
    finer.set_order([2, 0, 1])
    latent_cache.check_vae(drawn["train"], finer)
    with pytest.raises(UserError, match="made by VAE"):
        latent_cache.check_vae(drawn["train"], model)
    with pytest.raises(UserError, match="FlexTok draws no latents: it has no moments"):
        extract(model, tmp_path / "none", moments=True)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_draws_what_an_uninterrupted_one_would(drawn):
    def batches(done, workers):
        loader = DataModule(drawn["train"], None, 4, workers, seed=7, consumed=lambda: done).train_dataloader()
        return [batch["latent"] for batch in islice(loader, 4 - done // 4)]

    whole = batches(0, 0)
    for done, workers in ((8, 0), (4, 1)):
        assert all(torch.equal(a, b) for a, b in zip(batches(done, workers), whole[done // 4 :], strict=True))
