import pytest
import torch
from sklearn.datasets import load_digits

from vistok.data import digits
from vistok.errors import UserError


def make(split="train", size=16, **config):
    return digits.build(digits.Config(**config), split, size)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_split_by_index_with_the_right_labels():
    train, val = make("train"), make("val")
    assert (len(train), len(val)) == (1500, 297)
    target = load_digits().target.tolist()
    assert train.labels + val.labels == target
    assert train.get(1499)["key"] == "digits/1499"
    assert val.get(0)["key"] == "digits/1500"
    assert val.class_names[val.get(0)["label"]] == str(target[1500])


@pytest.mark.parametrize("size", [8, 16, 32])
def test_images_are_the_originals_enlarged(size):
    image = make(size=size).get(7)["image"]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert image.min() >= -1
    assert image.max() <= 1
    assert torch.equal(image[0], image[2])
    small = torch.nn.functional.interpolate(image[None, :1], (8, 8), mode="area")[0, 0]
    original = torch.from_numpy(load_digits().images[7]).float() / 8 - 1
    assert (small - original).abs().mean() < 0.1


def test_training_digits_move_a_little_by_the_given_stream():
    data = make(size=32)
    plain = data.get(3)["image"]
    moved = data.get(3, rng(1))["image"]
    assert torch.equal(moved, data.get(3, rng(1))["image"])
    assert not torch.equal(moved, data.get(3, rng(2))["image"])
    assert 0 < (moved - plain).abs().mean() < 0.4
    assert moved.abs().max() <= 1


def test_motion_moves_by_what_it_says():
    data = make(size=32, max_rotation_deg=0, max_scale=0, max_shift_px=2)
    columns = torch.arange(32.0)

    def centre(image):
        weight = image[0] + 1
        return float((weight.sum(0) * columns).sum() / weight.sum())

    shifts = [centre(data.get(3, rng(i))["image"]) - centre(data.get(3)["image"]) for i in range(50)]
    # Two original pixels are eight of 32.
    assert 5 < max(shifts) < 8.5
    assert -8.5 < min(shifts) < -5


def test_no_motion_without_a_stream_or_in_validation():
    assert torch.equal(make("val").get(3, rng())["image"], make("val").get(3)["image"])
    still = make(jitter=False)
    assert torch.equal(still.get(3, rng())["image"], still.get(3)["image"])


def test_too_small_images_are_refused():
    with pytest.raises(UserError, match="at least 8, got 4"):
        make(size=4)
