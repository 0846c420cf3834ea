"""Crops of the sample photographs."""

import pytest
import torch

from vistok.data.photos import TRAIN, VAL, Config, build
from vistok.errors import UserError
from vistok.rng import seeded_generator


def test_held_out_crops_are_of_other_pictures_and_always_the_same():
    assert not {name for names in TRAIN.values() for name in names} & {name for names in VAL.values() for name in names}
    val, again = build(Config(count=200), "val", 32), build(Config(count=200), "val", 32)
    assert len(val) == 20
    assert torch.equal(val.get(7)["image"], again.get(7)["image"])
    assert not torch.equal(val.get(2)["image"], val.get(7)["image"])  # another crop of the same picture


def test_training_crops_follow_the_generator():
    train = build(Config(), "train", 48)
    first, same, other = (train.get(3, seeded_generator(seed)) for seed in (0, 0, 1))
    assert first["image"].shape == (3, 48, 48) and first["image"].abs().max() <= 1
    assert torch.equal(first["image"], same["image"]) and not torch.equal(first["image"], other["image"])


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UserError, match="min_side"):
        build(Config(min_side=0.0), "train", 32)
