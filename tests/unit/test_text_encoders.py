"""The laws of ``vistok.interfaces.TextEncoder`` for each one, texts that are too long, and folders that hold none."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from tiny_models.text import CLIP_SIZES, WIDTH, clip_config, save_clip, save_t5
from vistok.config import Component, available, build
from vistok.errors import UserError
from vistok.interfaces import TextCondition

SAVE = {"t5": save_t5, "words": save_t5, "clip": save_clip}
NAMES = ["bytes", *SAVE]
PRETRAINED = pytest.mark.parametrize("name", ["t5", "clip"])


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def folder(tmp_path, name):
    return SAVE[name](tmp_path / name) if name in SAVE else None


def make(name, folder, **args):
    where = {"width": WIDTH} if folder is None else {"path": str(folder)}
    return build("text_encoders", Component(name, {**where, **args}))


def test_they_are_components():
    assert available("text_encoders") == sorted(NAMES)


def test_texts_are_padded_on_the_right_and_do_not_see_each_other(name, folder):
    encoder = make(name, folder)
    texts = ["a red circle", "", "a large blue square of a small red circle"]
    condition = encoder.encode(texts)
    lengths = condition.mask.sum(1)
    assert condition.states.shape == (3, lengths.max(), WIDTH) == (3, *condition.mask.shape[1:], encoder.width)
    assert torch.equal(condition.mask, torch.arange(lengths.max()) < lengths[:, None])
    assert lengths[2] > lengths[0] > lengths[1] >= 1
    for row, text in enumerate(texts):
        alone = encoder.encode([text]).states
        assert alone.shape[1] == lengths[row]
        torch.testing.assert_close(condition.states[row : row + 1, : lengths[row]], alone)


def test_null_is_the_encoded_empty_text(name, folder):
    encoder = make(name, folder)
    condition = encoder.encode(["a red circle"])
    torch.testing.assert_close(condition.null().states, encoder.encode([""]).states)
    assert condition.null().mask.all()


def test_they_are_frozen_and_exact_under_autocast(name, folder):
    encoder = make(name, folder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    plain = encoder.encode(["a red circle"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder.encode(["a red circle"])
    assert plain.states.dtype == torch.float32 and not plain.states.requires_grad
    assert torch.equal(plain.states, cast.states)


def test_a_long_text_is_cut_with_a_warning_but_ends(name, folder):
    encoder = make(name, folder, max_length=6)
    text = "a red circle of a small large blue square"
    with pytest.warns(UserWarning, match=rf"^{name}: cut 1 of 2 texts after max_length=6 tokens, .*'a red circle of"):
        condition = encoder.encode([text, "a"])
    assert condition.mask.sum(1)[0] == 6
    if name in ("t5", "bytes"):  # a token is a word
        torch.testing.assert_close(condition.states[:1], encoder.encode(["a red circle of a"]).states)


def test_texts_that_fit_are_not_warned_of(name, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(name, folder, max_length=20).encode(["a red circle", ""])


def test_a_warning_for_the_first_and_the_tenth_text():
    encoder, said = make("bytes", None, max_length=2), []
    for _ in range(25):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            encoder.encode(["too long"])
        said += [str(each.message) for each in caught]
    assert [line.split(" texts")[0] for line in said] == ["bytes: cut 1 of 1", "bytes: cut 10 of 10"]


def test_a_long_text_is_refused_if_asked(name, folder):
    encoder = make(name, folder, max_length=3, on_long="refuse")
    with pytest.raises(UserError, match=rf"^{name}: 1 of 2 texts longer than max_length=3 tokens, such as 'a large b"):
        encoder.encode(["", "a large blue square of a small red circle"])
    encoder.encode([""])


def test_a_text_needs_more_than_its_end(name, folder):
    with pytest.raises(UserError, match=f"{name}: max_length must be at least 2, got 1"):
        make(name, folder, max_length=1)
    with pytest.raises(UserError, match="on_long"):
        make(name, folder, on_long="shorten")


def test_an_encoder_is_known_by_its_hash(name, folder, tmp_path):
    encoder = make(name, folder)
    before = encoder.states_hash
    encoder.encode(["a red circle"])
    assert before == encoder.states_hash == make(name, folder, on_long="refuse").states_hash
    others = {before, make(name, folder, max_length=9).states_hash}
    if folder:
        others.add(make(name, SAVE[name](tmp_path / "other", seed=1)).states_hash)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        one, other, *_ = sorted(vocabulary.keys() - {"<pad>", "</s>", "<unk>"})
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        others.add(make(name, folder).states_hash)
    else:
        others.add(make(name, folder, width=32).states_hash)
    assert len(others) == (4 if folder else 3)


def test_conditions_of_one_row_become_a_batch(name, folder):
    encoder, texts = make(name, folder), ["a red circle", "", "a large blue square"]
    stacked, batch = TextCondition.stacked([encoder.encode([text]) for text in texts]), encoder.encode(texts)
    assert torch.equal(stacked.mask, batch.mask)
    torch.testing.assert_close(stacked.states[stacked.mask], batch.states[batch.mask])
    assert torch.equal(stacked.null_states, batch.null_states)


# ---------------------------------------------------------------------- T5


def test_t5_reads_in_lower_case_if_asked(tmp_path):
    folder = save_t5(tmp_path / "t5")
    plain, lower = make("t5", folder), make("t5", folder, lower=True)
    text = " \tA Red CIRCLE\n"
    assert torch.equal(lower.encode([text]).states, plain.encode(["a red circle"]).states)
    assert not torch.equal(plain.encode([text]).states, plain.encode(["a red circle"]).states)
    assert [text[start:end] for start, end in lower.spans(text)] == ["A", "Red", "CIRCLE", ""]
    assert make("t5", folder, lower=False).states_hash == plain.states_hash != lower.states_hash


# ---------------------------------------------------------------------- CLIP


def test_clip_reads_from_begin_to_end_token(tmp_path):
    """A state for each of its own tokens, the model's own last ones; the words behind an end token are none."""
    encoder = make("clip", save_clip(tmp_path / "clip"))
    ids = torch.tensor([[encoder.tokenizer.bos_token_id, *map(int, encoder.tokenizer(["a"]).input_ids[0][1:])]])
    assert ids[0, -1] == encoder.tokenizer.eos_token_id and ids.shape == (1, 3)
    condition = encoder.encode(["a", "a red"])
    assert condition.mask.sum(1).tolist() == [3, 6]
    with torch.no_grad():
        expected = encoder.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(condition.states[:1, :3], expected)


def test_a_whole_clip_will_do(tmp_path):
    alone = make("clip", save_clip(tmp_path / "text"))
    folder = save_clip(tmp_path / "whole")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    whole = CLIPModel(CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision, projection_dim=8))
    whole.text_model.load_state_dict(alone.model.state_dict())
    whole.save_pretrained(folder)
    assert torch.equal(make("clip", folder).encode(["a red"]).states, alone.encode(["a red"]).states)


def test_clip_has_so_many_positions(tmp_path):
    positions = CLIP_SIZES["max_position_embeddings"]
    with pytest.raises(UserError, match=rf"clip: max_length is 78, but .*clip has {positions} positions"):
        make("clip", save_clip(tmp_path / "clip"), max_length=78)


# ---------------------------------------------------------------------- folders


@PRETRAINED
@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_one_line(folder, name, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"^{name}: {folder} lacks {missing}$"):
        make(name, folder)


@PRETRAINED
def test_all_missing_files_are_named(tmp_path, name):
    (tmp_path / "pytorch_model.bin.index.json").touch()
    with pytest.raises(UserError, match=r" lacks config.json, tokenizer_config.json, tokenizer.json$"):
        make(name, tmp_path)


@PRETRAINED
def test_a_missing_folder_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=rf"no such folder: .*/nowhere \({name} needs config.json, tokenizer"):
        make(name, tmp_path / "nowhere")


def test_words_without_a_tokenizer(tmp_path):
    folder = save_t5(tmp_path / "t5")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"^words: {folder} lacks tokenizer.json"):
        make("words", folder)
    with pytest.raises(UserError, match=r"words not found: .*nowhere"):
        make("words", tmp_path / "nowhere")


@PRETRAINED
def test_weights_that_lack_a_tensor_are_refused(folder, name):
    """transformers would leave its random initial value."""
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight" if name == "t5" else "final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensor\(s\) of a .*, such as .*final_layer_norm\.weight"):
        make(name, folder)


@PRETRAINED
def test_weights_of_another_config_are_refused(folder, name):
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"^{name}: {folder}: \d+ tensor.* of other shapes than its config.json"):
        make(name, folder)


def test_spans_tell_what_each_state_spells(name, folder):
    encoder = make(name, folder)
    text = "a red circle, and a star"
    spans = encoder.spans(text)
    assert len(spans) == int(encoder.encode([text]).mask.sum())
    spelled = [text[start:end].strip() for start, end in spans]
    assert "".join(spelled) == text.replace(" ", "") and spelled[-1] == ""
    short = make(name, folder, max_length=4)
    assert short.spans(text)[:3] == spans[:3] and len(short.spans(text)) == 4
