"""LPIPS, and runs that train with it."""

import pytest
import torch
from torchmetrics.functional.image.lpips import _NoTrainLpips

from tiny_models.runs import read_state, rows, tiny_run
from tiny_models.tokenizer import TinyTokenizer
from tiny_models.vgg import alexnet_file, vgg16_file
from vistok.checkpoint import load_tokenizer
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.losses.perceptual import BACKBONES, PerceptualConfig, PerceptualLoss, load_lpips
from vistok.rng import seeded_generator
from vistok.training.run import train


@pytest.fixture(scope="module")
def lpips():
    return load_lpips(vgg16_file())


def images(count=2, height=24, width=32, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("net", "file", "side"), [("vgg", vgg16_file, 24), ("alex", alexnet_file, 35)])
def test_the_distance_is_torchmetrics_given_the_same_network(net, file, side):
    reference = _NoTrainLpips(net=net, pnet_rand=True)
    published = torch.load(file(), weights_only=True)
    for name, parameter in reference.net.named_parameters():  # slice2.5.weight
        parameter.copy_(published[f"features.{name.split('.', 1)[1]}"])
    a, b = images(height=side), images(height=side, seed=1)
    expected = reference(a, b).flatten()
    assert expected.shape == (2,) and (expected > 0.01).all()
    with torch.no_grad():
        torch.testing.assert_close(load_lpips(file(), net)(a, b), expected, rtol=1e-5, atol=1e-7)


def test_the_smallest_images_are_as_small_as_said():
    for net, file in (("vgg", vgg16_file), ("alex", alexnet_file)):
        least = BACKBONES[net].min_image_size_px
        a, b = images(height=least, width=least), images(height=least, width=least, seed=1)
        with torch.no_grad():
            assert load_lpips(file(), net, least)(a, b).isfinite().all()
        with pytest.raises(UserError, match=f"LPIPS by {net} needs images of at least {least} px, got {least - 1}"):
            load_lpips(file(), net, least - 1)


def test_an_image_is_no_distance_from_itself_and_gradients_are_finite(lpips):
    a = torch.full((1, 3, 16, 16), -1.0, requires_grad=True)
    distance = lpips(a, a.detach())
    distance.sum().backward()
    assert distance.item() == 0 and a.grad.isfinite().all()
    assert not any(p.requires_grad for p in PerceptualLoss(PerceptualConfig(str(vgg16_file())), 16).lpips.module.heads)


def test_following_the_gradient_brings_an_image_nearer():
    loss = PerceptualLoss(PerceptualConfig(str(vgg16_file()), weight=2.0), 16)
    target, image = images(1, 16, 16), images(1, 16, 16, seed=1).requires_grad_()
    optimizer, history = torch.optim.Adam([image], 0.05), []
    for _ in range(10):
        optimizer.zero_grad()
        value = loss(image, target)
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[-1] < 0.7 * history[0]


def test_the_loss_is_the_weighted_mean_in_float32_under_autocast(lpips):
    loss = PerceptualLoss(PerceptualConfig(str(vgg16_file()), weight=0.5), 24)
    a, b = images(), images(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(a, b)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, 0.5 * lpips(a, b).mean())


def test_building_it_draws_nothing():
    before = torch.get_rng_state()
    load_lpips(vgg16_file())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "weights not found"),
        (b"PK", "no complete torch file"),
        ({"classifier.6.bias": torch.zeros(1000)}, "26 missing"),
        ([1, 2], "holds no state dict"),
    ],
)
def test_another_file_is_one_line_that_says_what_to_supply(tmp_path, content, message):
    path = tmp_path / "vgg.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"perceptual\.weights: .*{message}.*vgg16-397923af\.pth") as error:
        load_lpips(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- runs


def perceptual(*more):
    weights = f"perceptual.weights={vgg16_file()}"
    return ("tokenizer.args.image_size=16", "trainer.max_updates=1", weights, *more)


def test_a_run_adds_it_to_training_and_validation_and_keeps_it_out_of_the_weights(tmp_path):
    train(tiny_run(tmp_path, *perceptual("optim.lr=1e-9")))
    row, validation = ({k: float(v) for k, v in row.items() if v} for row in rows(tmp_path / "run"))
    terms = [row[f"train/loss_{name}"] for name in ("pixel", "spread", "perceptual")]
    assert row["train/loss"] == pytest.approx(sum(terms), rel=1e-5)

    net = load_tokenizer(tmp_path / "run")  # strict: the export has nothing but the tokenizer
    assert isinstance(net, TinyTokenizer)
    data = build("data", Component("digits", {}), "val", 16)
    with torch.no_grad():
        alone = net(
            torch.stack([data.get(index)["image"] for index in range(len(data))]), seeded_generator("any")
        ).total
    assert validation["val/loss"] - alone.item() == pytest.approx(row["train/loss_perceptual"], rel=0.2)
    assert all(key.startswith("net.") for key in read_state(tmp_path / "run")["state_dict"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("perceptual.weight=0", "perceptual.weight must be positive"),
        ("perceptual.wieght=1", "did you mean 'weight'"),
        ("tokenizer.args.image_size=8", "at least 16 px, got 8"),
        ("perceptual.weights=nowhere.pth", "nowhere.pth"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, *perceptual(wrong)))
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_weights_must_be_given(tmp_path):
    with pytest.raises(UserError, match=r"missing value for perceptual\.weights"):
        tiny_run(tmp_path, "perceptual.weight=1")
