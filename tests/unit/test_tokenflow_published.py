"""The released TokenFlow files: their key layouts at full size, and whole files at a tiny one."""

import argparse
import re

import pytest
import torch

from tiny_models.args import TINY_ARGS
from tiny_models.models import randomized
from vistok.checkpoint import export_info, load_tokenizer
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.published import main as published_command
from vistok.tokenizers import tokenflow_published
from vistok.tokenizers.tokenflow import ENHANCED, TokenFlow, preset
from vistok.tokenizers.tokenflow_published import from_state, interpolated, published_keys
from vistok.tokens import MultiScale, TokenSpec

TINY = TINY_ARGS["tokenizers"]["tokenflow"]
TOWER = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZES = {
    "b": {"encoder": "vit_base_patch16_clip_quickgelu_224", "encoder_args": TOWER, "target_width": 6},
    "xl": {"encoder": "vit_so400m_patch14_siglip_384", "encoder_args": TOWER, "penultimate": True},
    "l": {
        "encoder": "vitamin_small_224",
        "encoder_args": {"pos_embed": "none", "depth": 1},
        "image_size": 32,
        "scales": [1, 2],
        "multipliers": [1, 1, 1, 1, 2],
    },
}


def tiny(size):
    return randomized(build("tokenizers", Component("tokenflow", {**TINY, **SIZES[size]})))


def published(model, size):
    """What the authors would have saved of ``model``, with what nothing needs."""
    state = published_keys(size, len(model.config.multipliers)).to_published(model.state_dict())
    state["quantize.codebook_used"] = torch.zeros(5)
    if size != "b":
        state |= {f"scaling_layer.{name}": torch.zeros(1, 3, 1, 1) for name in ("shift", "scale")}
    if size == "xl":
        layer = {key: value for key, value in state.items() if ".encoder.layers.0." in key}
        state |= {key.replace(".layers.0.", ".layers.1."): value for key, value in layer.items()}
        state |= {f"encoder_vqkd.{name}": torch.zeros(1) for name in ("post_layernorm.weight", "head.probe")}
        state = {key.replace("encoder_vqkd.", "encoder_vqkd.vision_model."): value for key, value in state.items()}
    return state


def images(size):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---------------------------------------------------------------------- full size, without memory


@pytest.mark.parametrize(
    ("name", "changes", "keys", "unread", "millions", "tokens", "grid"),
    [
        ("b", {}, 549, 1, 182.0, 561, 14),
        ("b", ENHANCED, 649, 1, 376.7, 561, 14),
        ("l", {}, 972, 3, 560.1, 817, 16),
        # Of SigLIP also 16 tensors of its last block, 2 of its last norm and 11 of its head.
        ("xl", {}, 848, 3 + 29, 554.1 - 30.48, 2227, 27),
    ],
)
def test_published_sizes(name, changes, keys, unread, millions, tokens, grid):
    with torch.device("meta"):
        model = TokenFlow(preset(name, **changes))
    state = published_keys(name).to_published(model.state_dict())
    assert len(state) == keys - unread
    # Published counts include 0.13 M ids that the training chose lately.
    assert sum(p.numel() for p in model.parameters()) / 1e6 + 0.131072 == pytest.approx(millions, abs=0.06)
    assert model.spec == TokenSpec(MultiScale(model.spec.layout.sizes), (32768,), 40, model.config.image_size)
    assert model.spec.num_positions == tokens and model.spec.layout.sizes[-1] == (grid, grid)


def test_b_at_256_px_has_another_scale():
    with torch.device("meta"):
        assert TokenFlow(preset("b_256")).spec.num_positions == 561 + 16 * 16


# ---------------------------------------------------------------------- files


@pytest.fixture
def released(monkeypatch, tmp_path):
    """Saves a tiny model as its authors would, and lets its file be read as one of that size."""

    def save(size, container="model", **more):
        model = tiny(size)
        path = tmp_path / f"{size}.pt"
        torch.save({container: published(model, size), "steps": 7, "args": argparse.Namespace(lr=1), **more}, path)
        monkeypatch.setattr(tokenflow_published, "preset", lambda name, **changes: model.config)
        return model, path

    return save


@pytest.mark.parametrize("size", list(SIZES))
def test_a_released_file_gives_the_same_tokens_and_images(released, size):
    model, path = released(size)
    loaded = TokenFlow.from_published(str(path))
    x = images(model.config.image_size)
    assert not loaded.training and torch.equal(loaded.tokenize(x).ids, model.tokenize(x).ids)
    tokens = model.tokenize(x)
    torch.testing.assert_close(loaded.decode(tokens), model.decode(tokens))
    # The bias of keys, which is not published, changes nothing.
    torch.testing.assert_close(loaded.semantic(tokens), model.semantic(tokens), atol=1e-5, rtol=1e-5)


def test_averaged_weights_come_first(released):
    model, path = released("b", "ema", model={"no": torch.zeros(1)})
    tokens = model.tokenize(images(16))
    torch.testing.assert_close(TokenFlow.from_published(str(path)).decode(tokens), model.decode(tokens))


def test_both_prefixes_of_siglip_are_read():
    model = tiny("xl")
    state = published(model, "xl")
    bare = {key.replace(".vision_model.", "."): value for key, value in state.items()}
    assert bare.keys() != state.keys()
    one, two = (from_state(part, model.config, "file").state_dict() for part in (state, bare))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_the_command_writes_an_export(released, tmp_path, monkeypatch, capsys):
    model, path = released("b")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["published", "tokenflow", str(path), "--out", str(out)])
    published_command()
    assert "tokenflow, 16 px, 21 tokens" in capsys.readouterr().out
    assert export_info(out)["weights"] == "published"
    assert torch.equal(load_tokenizer(out).tokenize(images(16)).ids, model.tokenize(images(16)).ids)


def test_positions_are_interpolated_by_a_factor_not_to_a_size():
    positions = torch.randn(1, 1 + 36, 4, generator=torch.Generator().manual_seed(0))
    assert interpolated(positions, 6) is positions
    larger = interpolated(positions, 8)
    assert larger.shape == (1, 1 + 64, 4) and torch.equal(larger[:, 0], positions[:, 0])
    table = positions[:, 1:].mT.unflatten(2, (6, 6))
    to_a_size = torch.nn.functional.interpolate(table, (8, 8), mode="bicubic").flatten(2).mT
    assert (larger[:, 1:] - to_a_size).norm() > 0.02 * to_a_size.norm()
    by_a_factor = torch.nn.functional.interpolate(table, scale_factor=8.1 / 6, mode="bicubic").flatten(2).mT
    assert torch.equal(larger[:, 1:], by_a_factor)


def test_a_model_for_larger_images_takes_interpolated_positions():
    model = tiny("b")
    larger = build("tokenizers", Component("tokenflow", {**TINY, **SIZES["b"], "image_size": 24, "scales": [1, 6]}))
    loaded = from_state(published(model, "b"), larger.config, "file")
    expected = interpolated(model.semantic_decoder.positions, 6)
    assert torch.equal(loaded.semantic_decoder.positions, expected)
    assert loaded.semantic_encoder.tower.model.pos_embed.shape == (1, 37, 16)


# ---------------------------------------------------------------------- bad input


def test_an_image_size_that_was_not_released_is_refused(released):
    for size, name, sizes in (("b", "TokenFlow-B", "224 or 256"), ("xl", "TokenFlow-XL", "384")):
        _, path = released(size)
        with pytest.raises(UserError, match=rf"{size}\.pt is {name}, .* images of {sizes} px, not 320"):
            TokenFlow.from_published(str(path), 320)


def test_weights_of_one_size_do_not_go_into_another():
    with pytest.raises(UserError, match=r"file, a TokenFlow-B, does not fit TokenFlow: keys 1 missing \(.*patch_embed"):
        from_state(published(tiny("b"), "b"), tiny("xl").config, "file")


def test_keys_that_are_missing_or_foreign_are_named():
    model = tiny("b")
    for change, words in (
        ({"decode_task_layer.2.bias": None}, r"missing \(semantic_decoder\.head\.2\.bias\)"),
        ({"decoder_vqkd.blocks.0.attn.v_bias": None}, r"decoder_vqkd\.blocks\.0\.attn\.v_bias missing"),
        ({"discriminator.weight": torch.zeros(1)}, r"unknown key\(s\) discriminator\.weight"),
        ({"quant_conv.bias": torch.zeros(9)}, r"pixel_in\.bias is \(9,\), expected \(3,\)"),
    ):
        state = published(model, "b") | change
        with pytest.raises(UserError, match=words):
            from_state({key: value for key, value in state.items() if value is not None}, model.config, "file")


class Code:
    pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"a": torch.zeros(1)}}, "holds no TokenFlow tokenizer: it has none of encoder_vqkd.class_embedding"),
        ({"weights": {}}, "no checkpoint of TokenFlow: it has no weights called ema, model, state_dict"),
        ({"model": {}, "args": Code()}, "no complete torch file of plain weights"),
        (b"hello", "no complete torch file"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, content, words):
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=re.escape(str(path)) + " .*" + words):
        TokenFlow.from_published(str(path))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"published TokenFlow not found: gone\.pt"):
        TokenFlow.from_published("gone.pt")
