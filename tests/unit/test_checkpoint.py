import json
import os

import pytest
import torch
from safetensors.torch import save_file

from vistok.checkpoint import export, export_hash, export_info, load_tokenizer, tokenizer_folder
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.tokens import Ordered1D, TokenSpec

TINY = Component("flextok", {"image_size": 8, "patch_size": 4, "num_registers": 2, "encoder_width": 16,
                             "encoder_depth": 1, "decoder_width": 16, "decoder_depth": 1, "head_dim": 8,
                             "fsq_levels": [4, 3]})  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = build("tokenizers", TINY)
    export(tmp_path / "tok", "tokenizer", TINY, model.spec, model.state_dict(), {"weights": "ema"})
    return tmp_path / "tok"


def test_an_export_says_what_it_is(folder):
    info = export_info(folder)
    assert (info["kind"], info["name"], info["weights"]) == ("tokenizer", "flextok", "ema")
    assert not list(folder.glob(".*")), "no temporary files are left"


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "spec.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_tokenizer(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"not found: .*nothing"):
        load_tokenizer(tmp_path / "nothing")


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is no complete safetensors file"):
        load_tokenizer(folder)


def test_foreign_weights_name_keys_and_shapes(folder):
    path = folder / "model.safetensors"
    state = build("tokenizers", TINY).state_dict()
    state["surprise"] = state.pop("encoder.registers")
    state["decoder.mask_token"] = torch.zeros(3)
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    for word in ("encoder.registers", "surprise", "decoder.mask_token is (3,), expected (16,)"):
        assert word in str(caught.value)


def test_a_damaged_spec(folder):
    (folder / "spec.json").write_text('{"spec": {')
    with pytest.raises(UserError, match=r"spec\.json is damaged"):
        load_tokenizer(folder)


def test_a_generator_is_no_tokenizer(folder, tmp_path):
    spec = TokenSpec(Ordered1D(2), (12,), 2, 8)
    export(tmp_path / "gen", "generator", Component("gpt", {}), spec, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="holds a generator"):
        load_tokenizer(tmp_path / "gen")


def test_the_hash_follows_weights_and_config(folder):
    first = export_hash(folder)
    model = build("tokenizers", TINY)
    model.encoder.registers.data += 1
    export(folder, "tokenizer", TINY, model.spec, model.state_dict(), {"weights": "ema"})
    assert export_hash(folder) != first


def test_a_replaced_tokenizer_is_noticed(folder, tmp_path):
    extra = {"tokenizer": "../tok", "tokenizer_hash": export_hash(folder)}
    export(
        tmp_path / "gen", "generator", Component("gpt", {}), export_info(folder)["spec"], {"x": torch.zeros(1)}, extra
    )
    assert tokenizer_folder(tmp_path / "gen").samefile(folder)
    details = json.loads((tmp_path / "gen/spec.json").read_text())
    (tmp_path / "gen/spec.json").write_text(json.dumps(details | {"tokenizer_hash": "0" * 64}))
    with pytest.raises(UserError, match="is not the tokenizer"):
        tokenizer_folder(tmp_path / "gen")
    (tmp_path / "gen/spec.json").write_text(json.dumps(details | {"tokenizer": "../gone"}))
    with pytest.raises(UserError, match="--tokenizer"):
        tokenizer_folder(tmp_path / "gen")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        model = build("tokenizers", TINY)
        export(tmp_path, "tokenizer", TINY, model.spec, model.state_dict())
        export(tmp_path, "tokenizer", TINY, model.spec, model.state_dict())
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ["model.safetensors", "config.yaml", "spec.json"], 0o640
    )


def test_a_generator_that_names_no_tokenizer(tmp_path):
    export(tmp_path, "generator", Component("gpt", {}), TokenSpec(Ordered1D(2), (12,), 2, 8), {"x": torch.zeros(1)})
    with pytest.raises(UserError, match=r"does not say which tokenizer"):
        tokenizer_folder(tmp_path)
