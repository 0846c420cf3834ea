import io
import json
import pickle
import tarfile

import pytest
import torch
import webdataset
from PIL import Image

from vistok.data import shards
from vistok.data.datamodule import DataModule, load_data
from vistok.data.images import Record
from vistok.errors import UserError


def encoded(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def records(count):
    return [Record(encoded(10 * n), ".png", n % 3, f"number {n}", "") for n in range(count)]


def write(folder, count=7, **options):
    folder.mkdir(exist_ok=True)
    return shards.write_shards(records(count), folder, 3, ["x", "y", "z"], captions=True, **options)


def make(path, split="train", **config):
    config = {"val_fraction": 0.0, "crop": "center", **config}
    return shards.build(shards.Config(path=str(path), **config), split, 16)


def values(data):
    """The red value that each image was made of."""
    return [round((float(data.get(i)["image"][0, 0, 0]) + 1) * 127.5) for i in range(len(data))]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_what_is_written_is_read_back(tmp_path):
    assert write(tmp_path / "s") == 7
    assert [p.name for p in sorted((tmp_path / "s").iterdir())] == [
        "000000.tar", "000001.tar", "000002.tar", "classes.json"]  # fmt: skip
    for path in (tmp_path / "s", tmp_path / "s" / "{000000..000002}.tar"):
        data = make(path)
        assert values(data) == [10 * n for n in range(7)]
        assert data.class_names == ["x", "y", "z"]
        sample = data.get(4)
        assert (sample["label"], sample["text"], sample["key"]) == (1, "number 4", "000001/00000004")
    assert load_data(str(tmp_path / "s"), "train", 16).description["name"] == "shards"


def test_webdataset_reads_what_we_write(tmp_path):
    write(tmp_path / "s")
    url = str(tmp_path / "s" / "{000000..000002}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil"))
    assert [(s["cls"], s["txt"]) for s in samples] == [(n % 3, f"number {n}") for n in range(7)]


def test_the_same_images_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name)
    assert (tmp_path / "a/000001.tar").read_bytes() == (tmp_path / "b/000001.tar").read_bytes()


def test_naming_rules_of_webdataset(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "some.dir/a.b.png", b"not the image: its extension is b.png")
        add(tar, "some.dir/a.jpg", encoded(50, "JPEG"))
        add(tar, "some.dir/a.cls", b"4\n")
        add(tar, "some.dir/a.json", json.dumps({"caption": "from json"}).encode())
        add(tar, "c.cls", b"9")
        add(tar, "d.WEBP", encoded(0, "WEBP"))
        add(tar, "d.txt", b"from text ")
    data = make(tmp_path / "t.tar")
    samples = [data.get(i) for i in range(len(data))]
    assert [(s["key"], s["label"], s["text"]) for s in samples] == [
        ("t/some.dir/a", 4, "from json"),
        ("t/d", -1, "from text"),
    ]
    assert data.num_classes == 5
    assert make(tmp_path / "t.tar", num_classes=10).num_classes == 10
    with pytest.raises(UserError, match="a sample has class 4, but there are 2 classes"):
        make(tmp_path / "t.tar", num_classes=2)


def test_keys_are_unique_though_every_shard_counts_from_zero(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as tar:
            for n in range(20):
                add(tar, f"{n:04d}.png", encoded(n))

    def keys(pattern, split="train", **config):
        data = make(tmp_path / pattern, split, **config)
        return [data.get(i)["key"] for i in range(len(data))]

    assert keys("a")[19:21] == ["0/0019", "1/0000"]
    assert keys("a/1.tar")[0] == "1/0000"
    assert len(set(keys("{a/0,a/1,b/0}.tar"))) == 60
    held_out = keys("a", "val", val_fraction=0.5)
    assert {key[2:] for key in held_out if key[0] == "0"} != {key[2:] for key in held_out if key[0] == "1"}


def test_splits(tmp_path):
    write(tmp_path / "s", 25)
    train, val = (make(tmp_path / "s", split, val_fraction=0.3) for split in ("train", "val"))
    keys = [[data.get(i)["key"] for i in range(len(data))] for data in (train, val)]
    assert sorted(keys[0] + keys[1]) == [f"{n // 3:06d}/{n:08d}" for n in range(25)]
    assert min(map(len, keys)) > 2
    assert train.class_names == val.class_names
    (tmp_path / "apart").mkdir()
    for name, count in (("train", 7), ("val", 4)):
        write(tmp_path / "apart" / name, count)
    assert [len(make(tmp_path / "apart", split)) for split in ("train", "val")] == [7, 4]
    data = make(tmp_path / "s", "val", val_path=str(tmp_path / "apart/val/{000000..000001}.tar"))
    assert len(data) == 4


@pytest.mark.parametrize("cut", ["header", "data", "end"])
def test_a_truncated_shard_stops_or_is_skipped(tmp_path, cut):
    write(tmp_path / "s")
    path = tmp_path / "s/000001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmembers()[3]
        last = tar.getmembers()[-1]
    size = {"header": member.offset + 100, "data": member.offset_data + 5, "end": last.offset_data + 512}[cut]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"000001.tar is no whole tar file: unexpected end of data.*on_error=skip"):
        make(tmp_path / "s")
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 shards: .*000001.tar"):
        data = make(tmp_path / "s", on_error="skip")
    assert values(data) == [0, 10, 20, 60]


def test_foreign_and_missing_shards(tmp_path):
    (tmp_path / "f.tar").write_bytes(b"this is no archive" * 100)
    with pytest.raises(UserError, match=r"f.tar is no whole tar file"):
        make(tmp_path / "f.tar")
    with pytest.raises(UserError, match="no such shard"):
        make(tmp_path / "{f,g}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .tar files"):
        make(tmp_path / "empty")
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        add(tar, "a.txt", b"words")
    with pytest.raises(UserError, match="no sample with an image"):
        make(tmp_path / "text.tar")


def test_a_corrupt_image_in_a_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "a.png", b"nothing")
        add(tar, "b.png", encoded(20))
    with pytest.raises(UserError, match=r"cannot read .*t.tar: a.png"):
        make(tmp_path / "t.tar").get(0)
    data = make(tmp_path / "t.tar", on_error="skip")
    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        assert values(data) == [20, 20]


def test_workers_read_every_sample_once(tmp_path):
    write(tmp_path / "s", 12)
    data = make(tmp_path / "s")
    loader = iter(DataModule(data, None, 2, workers=2, seed=1).train_dataloader())
    batches = [next(loader) for _ in range(6)]
    assert sorted(key for batch in batches for key in batch["key"]) == [f"{n // 3:06d}/{n:08d}" for n in range(12)]
    for batch in batches:
        found = ((batch["image"][:, 0, 0, 0] + 1) * 12.75).round().long()
        assert torch.equal(found, torch.tensor([int(key[-8:]) for key in batch["key"]]))
    assert values(pickle.loads(pickle.dumps(data))) == values(data)
