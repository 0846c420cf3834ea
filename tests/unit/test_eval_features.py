import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as published
from random_inception import write_random_inception
from safetensors.torch import load_file
from torchmetrics.image.fid import NoTrainInceptionV3

from vistok.data.datamodule import load_data
from vistok.errors import UserError
from vistok.eval import features, train_features
from vistok.eval.features import SMALL_NETWORKS, WEIGHTS_FOLDER, SmallCNN, load_features
from vistok.pictures import to_uint8

DATA = sorted(SMALL_NETWORKS)


@pytest.mark.parametrize("size", [16, 32])
def test_digits_are_recognised_at_every_size(size):
    network = load_features("digits")
    assert train_features.held_out_accuracy(network, "digits", size)["class"] >= 0.97


@pytest.mark.parametrize("size", [32, 64])
def test_shapes_are_recognised_at_every_size(size, monkeypatch):
    monkeypatch.setattr(train_features, "HELD_OUT_MOST", 200)
    accuracy = train_features.held_out_accuracy(load_features("shapes"), "shapes", size)
    assert accuracy["count"] >= 0.98
    assert min(accuracy["shape"], accuracy["color"], accuracy["size"]) >= 0.96


def test_digits_are_recognised_when_blurred_and_noisy():
    network = load_features("digits")
    dataset = load_data("digits", "val", 32)
    images = torch.stack([dataset.get(index)["image"] for index in range(len(dataset))])
    labels = torch.tensor([dataset.get(index)["label"] for index in range(len(dataset))])
    worse = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    worse = worse + 0.1 * torch.randn(worse.shape, generator=torch.Generator().manual_seed(0))
    assert network.count_right(network.features(to_uint8(worse)), labels) / len(labels) >= 0.93


def test_features_are_computed_without_tf32(monkeypatch):
    network, allowed = load_features("digits"), []
    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(network, "from_pixels", lambda images: allowed.append(torch.backends.cudnn.allow_tf32))
    network.features(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("data", DATA)
def test_shipped_networks_are_small_and_described(data):
    path = WEIGHTS_FOLDER / f"{data}.safetensors"
    assert path.stat().st_size < 1e6
    assert all(value.dtype == torch.float16 for value in load_file(path).values() if value.is_floating_point())
    network = load_features(data)
    assert (network.name, len(network.sha256)) == (f"{data}-cnn", 64)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    vectors = network.features(torch.zeros(3, 3, 20, 20, dtype=torch.uint8))
    assert vectors.shape == (3, network.num_features)
    assert vectors.dtype == torch.float32
    assert {head: value.shape[1] for head, value in network.logits(vectors).items()} == network.heads


def test_features_do_not_depend_on_the_batch():
    network = load_features("digits")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = network.features(images)
    torch.testing.assert_close(network.features(images[2:3]), whole[2:3], rtol=1e-4, atol=1e-4)


def test_training_reads_only_the_training_split_and_repeats_itself(tmp_path, monkeypatch):
    splits = []

    def spy(data, split, size):
        splits.append(split)
        return load_data(data, split, size)

    monkeypatch.setattr(train_features, "load_data", spy)
    monkeypatch.setitem(train_features.RECIPES, "digits", train_features.Recipe(images=100, epochs=1))
    monkeypatch.setattr(train_features, "held_out_accuracy", lambda *_: {})
    for name in ("a", "b"):
        train_features.train_features("digits", tmp_path / name)
    train_features.train_features("digits", tmp_path / "c", seed=1)
    assert splits == ["train"] * 3
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_unknown_networks_are_refused_with_the_valid_names():
    with pytest.raises(UserError, match=r"'vgg'.*digits.*inception:PATH"):
        load_features("vgg")


def test_inception_without_its_file_says_which_and_where_from(tmp_path):
    with pytest.raises(UserError) as error:
        load_features(f"inception:{tmp_path / 'nothing.pth'}")
    for part in (
        "nothing.pth",
        "weights-inception-2015-12-05-6726825d.pth",
        "v0.2.0",
        "torch-fidelity",
        "inception:PATH",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="weights not found"):
        load_features("inception")


def test_inception_refuses_another_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(SmallCNN(**SMALL_NETWORKS["digits"]).state_dict(), path)
    with pytest.raises(UserError, match="SHA-256 starts with"):
        load_features(f"inception:{path}")
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
    with pytest.raises(UserError, match="not the 1008-class Inception"):
        load_features(f"inception:{path}")


def test_inception_unpickles_nothing_but_weights(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Evil()}, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
    with pytest.raises(UserError, match="more than weights"):
        load_features(f"inception:{path}")


@torch.no_grad()
def test_inception_features_are_torch_fidelitys(tmp_path, monkeypatch):
    """Random weights: same file, same uint8 images, the TensorFlow resize and not torchmetrics' default one."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weights.pth"
    write_random_inception(path, images)
    monkeypatch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
    ours = load_features(f"inception:{path}")
    theirs = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path)).eval()
    maps = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda block, inputs, output: maps.append(output))
    pool, logits = theirs(images[:2])
    layers = ours.layers(images[:2])
    for name, expected in (("pool", pool), ("logits", logits)):
        torch.testing.assert_close(layers[name], expected, rtol=1e-3, atol=1e-3 * expected.abs().mean().item())
    assert torch.equal(ours.features(images[:2]), layers["pool"])
    # sFID: 17 x 17 places, row by row, with seven channels at each.
    places = layers["spatial"].view(2, 17, 17, 7)
    torch.testing.assert_close(places[:, 3, 5], maps[0][:, :7, 3, 5], rtol=1e-3, atol=1e-3)
    assert layers["spatial"].shape == (2, ours.num_spatial)
    assert layers["spatial"].min() == 0, "after the ReLU"
    assert layers["logits"].shape == (2, ours.num_logits)
    antialiased = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=True)(images[:2])
    assert (antialiased - pool).abs().mean() > 0.05 * pool.abs().mean()
