import json

import pytest
import torch
from torch import nn

from vistok.data import code_cache
from vistok.data.datamodule import DataModule, load_data
from vistok.errors import UserError
from vistok.tokens import Grid2D, Tokens, TokenSpec


class MeanTokenizer(nn.Module):
    """One code for each quarter of the image, in two slots: its mean value, and zero."""

    spec = TokenSpec(Grid2D(2, 2), (4096, 5), 1, 16)

    def tokenize(self, images):
        means = nn.functional.adaptive_avg_pool2d(images[:, :1], 2).flatten(1)
        return Tokens(
            torch.stack([((means + 1) * 2047).long(), torch.zeros(means.shape, dtype=torch.int64)], -1), self.spec
        )


def digits():
    return {split: load_data("digits", split, 16) for split in ("train", "val")}


def extract(out, **options):
    code_cache.extract(MeanTokenizer(), "abc123", digits(), out, **options)
    return {split: load_data(str(out), split, 16) for split in ("train", "val")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("codes") / "digits"
    extract(out, passes=3, seed=5, batch_size=100)
    return out


def test_round_trip(folder):
    for split, images in digits().items():
        cache = load_data(str(folder), split, 16)
        assert len(cache) == len(images)
        assert cache.spec == MeanTokenizer.spec
        assert cache.class_names == images.class_names
        for index in (0, 1, len(images) - 1):
            sample, source = cache.get(index), images.get(index)
            assert torch.equal(sample["ids"], MeanTokenizer().tokenize(source["image"][None]).ids[0])
            assert {k: sample[k] for k in ("label", "text", "key")} == {k: source[k] for k in ("label", "text", "key")}
    assert cache.description["data"] == images.description
    assert sorted(path.name for path in folder.iterdir()) == ["cache.json", "codes.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "others may read both files or neither"


def test_batches_hold_ids(folder):
    batch = next(iter(DataModule(load_data(str(folder), "train", 16), None, 4).train_dataloader()))
    assert set(batch) == {"ids", "label", "text", "key", "position"}
    assert batch["ids"].shape == (4, 4, 2)
    assert batch["ids"].dtype == torch.int64


def test_passes_augment_training_images_only(folder, tmp_path):
    train, val = (load_data(str(folder), split, 16) for split in ("train", "val"))
    assert (len(train.ids), len(val.ids)) == (3, 1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (train.ids[one] != train.ids[other]).any(-1).any(-1).float().mean() > 0.9
    # The stream of an image is named by seed, pass and index, not by the batch it was in.
    again = extract(tmp_path / "again", passes=3, seed=5, batch_size=333)["train"]
    assert torch.equal(again.ids, train.ids)
    other = extract(tmp_path / "other", passes=2, seed=6)["train"]
    assert torch.equal(other.ids[0], train.ids[0])
    assert not torch.equal(other.ids[1], train.ids[1])


def test_a_stream_chooses_the_pass(folder):
    train = load_data(str(folder), "train", 16)
    drawn = {tuple(train.get(0, torch.Generator().manual_seed(seed))["ids"][:, 0].tolist()) for seed in range(30)}
    assert drawn == {tuple(train.ids[number, 0, :, 0].tolist()) for number in range(3)}


def test_codes_of_another_tokenizer_are_refused(folder):
    cache = load_data(str(folder), "train", 16)
    assert cache.tokenizer_hash == "abc123"
    code_cache.check_tokenizer(cache, "abc123")
    with pytest.raises(UserError, match=r"abc123.*def456"):
        code_cache.check_tokenizer(cache, "def456")


def test_unfit_caches_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="codes of 16 px images, not of 32 px"):
        load_data(str(folder), "train", 32)
    with pytest.raises(UserError, match="no split 'test'"):
        load_data(str(folder), "test", 16)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cache.json").write_text(json.dumps({"spec": {}}))
    with pytest.raises(UserError, match="broken is no code cache"):
        load_data(str(broken), "train", 16)
    (broken / "cache.json").write_text((folder / "cache.json").read_text())
    (broken / "codes.safetensors").write_bytes((folder / "codes.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"codes.safetensors is no complete safetensors file"):
        load_data(str(broken), "train", 16)


def test_nothing_half_written_is_left(tmp_path):
    class Failing(MeanTokenizer):
        def tokenize(self, images):
            raise OSError("No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        code_cache.extract(Failing(), "abc", digits(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(UserError, match="out exists already"):
        extract(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1 and workers at least 0, got 0, 256 and 0"):
        extract(tmp_path / "a", passes=0)
    continuous = MeanTokenizer()
    continuous.spec = TokenSpec(Grid2D(2, 2), (), 4, 16)
    with pytest.raises(UserError, match="no codes to cache"):
        code_cache.extract(continuous, "abc", digits(), tmp_path / "b")
