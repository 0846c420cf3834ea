"""Image folders, and what they share with shards: crops, flips, unreadable images, the held-out fraction."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data import folders
from vistok.data.datamodule import DataModule
from vistok.data.transforms import center_crop, random_crop, to_tensor
from vistok.errors import UserError


def save(path, seed=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make(path, split="train", size=16, **config):
    config = {"val_fraction": 0.0, **config}
    return folders.build(folders.Config(path=str(path), **config), split, size)


def keys(data):
    return [data.get(i)["key"] for i in range(len(data))]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def classes(tmp_path):
    for n, name in enumerate(["dog/b.png", "dog/a.PNG", "cat/x.png", "cat/deep/y.png", "ant/z.jpg", ".hidden/h.png"]):
        save(tmp_path / name, n)
    (tmp_path / "dog/a.txt").write_text("a dog, asleep\n")
    return tmp_path


def test_class_folders_in_sorted_order(classes):
    data = make(classes)
    assert data.class_names == ["ant", "cat", "dog"]
    assert data.num_classes == 3
    samples = [data.get(i) for i in range(len(data))]
    assert [(s["key"], s["label"], s["text"]) for s in samples] == [
        ("ant/z.jpg", 0, ""),
        ("cat/deep/y.png", 1, ""),
        ("cat/x.png", 1, ""),
        ("dog/a.PNG", 2, "a dog, asleep"),
        ("dog/b.png", 2, ""),
    ]
    assert samples[0]["image"].shape == (3, 16, 16)


def test_a_flat_folder_has_no_classes(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("grün")
    data = make(tmp_path)
    assert (data.num_classes, data.class_names) == (0, [])
    assert (data.get(0)["label"], data.get(0)["text"]) == (-1, "grün")


def test_the_held_out_fraction_depends_on_names_alone(tmp_path):
    for n in range(60):
        save(tmp_path / f"{n}.png", n)
    train, val = make(tmp_path, "train", val_fraction=0.3), make(tmp_path, "val", val_fraction=0.3)
    assert sorted(keys(train) + keys(val)) == sorted(f"{n}.png" for n in range(60))
    assert 8 <= len(val) <= 28
    for n in range(60, 70):
        save(tmp_path / f"{n}.png", n)
    assert set(keys(val)) <= set(keys(make(tmp_path, "val", val_fraction=0.3)))
    assert train.description["keys_hash"] != val.description["keys_hash"]


def test_explicit_splits_share_the_class_numbers(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/b/3.png"):
        save(tmp_path / name)
    assert keys(make(tmp_path, "train")) == ["a/1.png", "b/2.png"]
    assert make(tmp_path, "val").get(0)["label"] == 1
    save(tmp_path / "val/c/4.png")
    with pytest.raises(UserError, match="class folder 'c' does not exist in the training split"):
        make(tmp_path, "val")


def test_folders_that_hold_nothing_usable_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no images \(.jpg"):
        make(tmp_path)
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"none of its 1 image\(s\) falls into the split 'val'"):
        make(tmp_path, "val")
    save(tmp_path / "cat/b.png")
    with pytest.raises(UserError, match=r"a.png lies beside the class folders"):
        make(tmp_path)


@pytest.fixture
def damaged(tmp_path):
    """Five images; b is no image, c is cut in the middle."""
    for n, name in enumerate("abcde"):
        save(tmp_path / f"{name}.png", n)
    (tmp_path / "b.png").write_bytes(b"no image at all")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:500])
    return tmp_path


def test_an_unreadable_image_stops_the_run_by_name(damaged):
    data = make(damaged)
    for index, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(UserError, match=f"cannot read .*{name}.*on_error=skip") as caught:
            data.get(index)
        assert "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_and_counted(damaged, workers):
    data = make(damaged, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = DataModule(data, data, 1, workers).val_dataloader()
        found = [key for _ in range(2) for batch in loader for key in batch["key"]]
    assert found == ["a.png", "d.png", "d.png", "d.png", "e.png"] * 2
    assert data.num_skipped == 2
    if workers == 0:
        assert [str(w.message) for w in caught] == [f"skipped 1 unreadable image(s) so far, now {damaged / 'b.png'}"]


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with warnings.catch_warnings(), pytest.raises(UserError, match="none of the 1 images can be read"):
        warnings.simplefilter("ignore")
        make(tmp_path, on_error="skip").get(0)


def test_augmentation_is_for_training_and_repeats_by_seed(classes):
    data = make(classes, flip=True)
    assert torch.equal(data.get(1, rng(1))["image"], data.get(1, rng(1))["image"])
    assert len({data.get(1, rng(seed))["image"].sum().item() for seed in range(8)}) > 4
    plain = center_crop(Image.open(classes / "cat/x.png"), 16)
    assert torch.equal(data.get(2)["image"], to_tensor(plain))


def test_flip_only_where_asked(classes):
    def mirrored(**config):
        data = make(classes, crop="center", **config)
        plain = data.get(1)["image"]
        images = [data.get(1, rng(seed))["image"] for seed in range(20)]
        assert all(torch.equal(image, plain) or torch.equal(image, plain.flip(2)) for image in images)
        return sum(not torch.equal(image, plain) for image in images)

    assert mirrored() == 0
    assert 4 <= mirrored(flip=True) <= 16


def test_center_crop_is_the_one_of_adm():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (210, 150, 3), dtype=np.uint8))
    # 150 is more than twice 32: two halvings to 37 x 52, then bicubic to 32 x 45, then the middle.
    small = image.resize((75, 105), Image.Resampling.BOX).resize((37, 52), Image.Resampling.BOX)
    small = small.resize((32, 45), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(center_crop(image, 32)), np.array(small)[6:38])


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (40, 16), (300, 33)])
def test_crops_have_the_size_asked_for(size):
    image = Image.new("RGB", size, (255, 0, 0))
    want = torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 16, 16)
    assert torch.equal(to_tensor(center_crop(image, 16)), want)
    for seed in range(5):
        assert torch.equal(to_tensor(random_crop(image, 16, rng(seed))), want)


def test_any_colour_mode_becomes_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (16, 16)).save(tmp_path / f"{mode}.png")
    assert all(make(tmp_path).get(i)["image"].shape == (3, 16, 16) for i in range(4))
