import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from vistok.config import Component, build
from vistok.data import code_cache
from vistok.data.datamodule import DataModule, load_data
from vistok.data.text_states import check_text_encoder
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


# ---------------------------------------------------------------------- text states


def captioned():
    return {split: load_data("shapes", split, 24, {"train_count": 60, "val_count": 12}) for split in ("train", "val")}


def component(**args):
    return Component("bytes", {"width": 32, **args})


def reader():
    return build("text_encoders", component())


def extract_text(out, data=None, **options):
    tokenizer = MeanTokenizer()
    tokenizer.spec = TokenSpec(Grid2D(2, 2), (4096, 5), 1, 24)
    code_cache.extract(tokenizer, "abc123", data or captioned(), out, text_encoder=component(), **options)
    return {split: load_data(str(out), split, 24) for split in ("train", "val")}


@pytest.fixture(scope="module", params=[16, 32])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def texts(tmp_path_factory, bits):
    out = tmp_path_factory.mktemp("texts") / "shapes"
    extract_text(out, batch_size=7, passes=2, text_bits=bits)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_has_what_the_encoder_makes_of_its_captions(texts, bits, workers):
    for split in ("train", "val"):
        module = DataModule(load_data(str(texts), split, 24), load_data(str(texts), split, 24), 5, workers)
        for loader in (module.train_dataloader(), module.val_dataloader()):
            batch = next(iter(loader))
            expected, got = reader().encode(batch["text"]), batch["condition"]
            assert got.states.dtype == torch.float32 and got.states.shape == expected.states.shape
            assert torch.equal(got.mask, expected.mask) and torch.equal(got.null_mask, expected.null_mask)
            rtol = 2**-11 if bits == 16 else 0
            for name in ("states", "null_states"):
                torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=rtol, atol=0)


def test_a_caption_is_stored_once_and_stays_on_the_disk(texts, bits):
    data = {split: load_data(str(texts), split, 24) for split in ("train", "val")}
    different = {"", *data["train"].texts, *data["val"].texts}
    assert len(different) < 73, "some captions of the world are alike"
    table = np.load(texts / "text_states.npy", mmap_mode="r")
    assert table.shape == (int(reader().encode(list(different)).mask.sum()), 32) and table.itemsize == bits // 8
    assert isinstance(data["train"].text.table.array, np.memmap)
    again = pickle.loads(pickle.dumps(data["train"]))
    assert "array" not in again.text.table.__dict__, "loader processes are sent the path, not the table"
    assert torch.equal(again.get(7)["condition"].states, data["train"].get(7)["condition"].states)


def uncaptioned(which):
    data = captioned()
    for dataset in data.values():
        get = dataset.get
        dataset.get = lambda i, rng=None, get=get: get(i, rng) | ({"text": ""} if which(i) else {})
    return data


def test_images_without_a_caption_have_the_empty_text(tmp_path):
    data = uncaptioned(lambda index: index % 2)
    train = extract_text(tmp_path / "some", data=data, text_bits=32)["train"]
    condition = train.get(3)["condition"]
    assert torch.equal(condition.states, condition.null_states) and not torch.equal(
        train.get(2)["condition"].states, condition.null_states
    )


def test_states_of_another_text_encoder_are_refused(texts):
    data = load_data(str(texts), "train", 24)
    check_text_encoder(data.text, component(on_long="refuse"))
    with pytest.raises(
        UserError, match=r"by text encoder bytes max_length=64 width=32, .* is bytes max_length=9 .*text_states=false"
    ):
        check_text_encoder(data.text, component(max_length=9))
    data.text.made_by = None  # as in a cache that has the hash alone
    check_text_encoder(data.text, component(on_long="refuse"))
    with pytest.raises(UserError, match=rf"made by text encoder {reader().states_hash[:12]}, .*text_states=false"):
        check_text_encoder(data.text, component(max_length=9))
    without = load_data(str(texts), "train", 24, {"text_states": False})
    assert without.text is None and "condition" not in without.get(0)


def test_a_table_that_is_not_whole_is_refused(texts, tmp_path):
    for name in ("cache.json", "codes.safetensors"):
        (tmp_path / name).write_bytes((texts / name).read_bytes())
    with pytest.raises(UserError, match=r"text_states.npy is no complete table of text states"):
        load_data(str(tmp_path), "train", 24)
    np.save(tmp_path / "text_states.npy", np.load(texts / "text_states.npy")[:-1])
    with pytest.raises(UserError, match=r"text_states.npy holds \d+ states, expected \d+"):
        load_data(str(tmp_path), "train", 24)


def test_states_that_cannot_be_kept_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no captions for the text encoder"):
        extract_text(tmp_path / "none", data=uncaptioned(lambda index: True))
    monkeypatch.setattr("vistok.text_encoders.bytes.Bytes._vector", lambda self, word: torch.full((32,), 1e5))
    with pytest.raises(UserError, match="too large for half precision"):
        extract_text(tmp_path / "half")
    assert list(tmp_path.iterdir()) == []
    assert extract_text(tmp_path / "full", text_bits=32)["val"].get(0)["condition"].states[0, 0, 0] == 1e5
