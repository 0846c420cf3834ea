"""Loaders and data sets by name; the order of samples is in tests/dist/test_data_order.py."""

import pytest
import torch
from PIL import Image

from vistok.config import available
from vistok.data.datamodule import DataModule, load_data, load_images, ordered_batches
from vistok.errors import UserError


class Broken:
    num_classes, class_names, description = 0, [], {}

    def __len__(self):
        return 4

    def get(self, index, rng=None):
        raise UserError("cannot read cats/7.png: truncated")


def test_a_batch_has_the_promised_parts():
    data = load_data("digits", "train", 16)
    batch = next(iter(DataModule(data, None, batch_size=4).train_dataloader()))
    assert set(batch) == {"image", "label", "text", "key", "position"}
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["position"].dtype == torch.int64
    assert [f"a handwritten {label}" for label in batch["label"].tolist()] == batch["text"]


def test_validation_is_in_order_complete_and_never_augmented():
    data = load_data("digits", "val", 16)
    module = DataModule(load_data("digits", "train", 16), data, batch_size=64)
    batches = list(module.val_dataloader())
    assert [key for batch in batches for key in batch["key"]] == [data.get(i)["key"] for i in range(297)]
    images = torch.cat([batch["image"] for batch in batches])
    assert torch.equal(images, torch.stack([data.get(i)["image"] for i in range(297)]))
    assert DataModule(data, None, batch_size=4).val_dataloader() == []


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(297, 64, 1), (297, 32, 4), (9, 4, 2), (5, 8, 4)])
def test_ranks_share_validation_without_duplicates_in_equally_many_batches(count, batch_size, world_size):
    shares = [ordered_batches(count, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for _, i in batch) == list(range(count))
    assert all(1 <= len(batch) <= batch_size for share in shares for batch in share)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_about_the_data_stays_one_line(workers):
    loader = DataModule(Broken(), None, batch_size=2, workers=workers).train_dataloader()
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value) == "cannot read cats/7.png: truncated"


def test_words_of_the_command_line(tmp_path):
    assert load_data("shapes", "val", 32).description["name"] == "shapes"
    with pytest.raises(UserError, match="no data called 'digit': give digits, shapes"):
        load_data("digit", "train", 16)
    with pytest.raises(UserError, match="no images"):
        load_data(str(tmp_path), "train", 16)
    with pytest.raises(UserError, match=r"no such shard: .*000001.tar"):
        load_data(str(tmp_path / "{000001..000002}.tar"), "train", 16)


def test_bad_numbers_are_refused():
    data = load_data("digits", "train", 16)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        DataModule(data, None, batch_size=0)
    with pytest.raises(UserError, match="workers at least 0"):
        DataModule(data, None, batch_size=1, workers=-1)


def test_the_room_lists_its_data_sets():
    assert available("data") == ["code_cache", "digits", "folders", "latent_cache", "photos", "shapes", "shards"]


def test_stored_images_take_options_and_can_be_all_validation(tmp_path):
    for n in range(5):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    assert len(load_images(str(tmp_path), "val", 8, val_fraction=1.0)) == 5
    (tmp_path / "2.png").write_bytes(b"")
    data = load_data(str(tmp_path), "val", 8, val_fraction=1.0, on_error="skip")
    with pytest.warns(UserWarning, match="skipped 1"):
        assert data.get(2)["key"] == "3.png"
    assert len(load_images("digits", "val", 16, val_fraction=1.0)) == 297
    (tmp_path / "cache.json").write_text("{}")
    with pytest.raises(UserError, match="holds codes, not images"):
        load_images(str(tmp_path), "val", 8)
