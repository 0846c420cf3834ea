"""The law of ``vistok.interfaces.TextEncoder`` for T5, and folders that hold none."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models.text import WIDTH, save_t5
from vistok.config import Component, available, build
from vistok.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return save_t5(tmp_path / "t5")


def make(folder, **args):
    return build("text_encoders", Component("t5", {"path": str(folder), **args}))


def test_t5_is_a_component():
    assert available("text_encoders") == ["t5", "words"]


def test_texts_are_padded_on_the_right_and_do_not_see_each_other(folder):
    encoder = make(folder)
    condition = encoder.encode(["a red circle", "", "a large blue square of a small red circle"])
    assert condition.states.shape == (3, 10, WIDTH) == (3, 10, encoder.width)
    assert condition.mask.sum(1).tolist() == [4, 1, 10] and condition.mask[:, 0].all()  # each text and its end
    torch.testing.assert_close(condition.states[:1, :4], encoder.encode(["a red circle"]).states)
    assert not torch.allclose(condition.states[0, :3], condition.states[2, :3])


def test_null_is_the_encoded_empty_text(folder):
    encoder = make(folder)
    condition = encoder.encode(["a red circle"])
    torch.testing.assert_close(condition.null().states, encoder.encode([""]).states)
    assert condition.null().mask.tolist() == [[True]]


def test_it_is_frozen_and_exact_under_autocast(folder):
    encoder = make(folder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and not encoder.model.training
    plain = encoder.encode(["a red circle"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder.encode(["a red circle"])
    assert plain.states.dtype == torch.float32 and not plain.states.requires_grad
    assert torch.equal(plain.states, cast.states)


def test_a_long_text_is_cut_but_ends(folder):
    encoder = make(folder, max_length=3)
    long, short = (encoder.encode([text]) for text in ("a red circle of a square", "a red"))
    torch.testing.assert_close(long.states, short.states)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_one_line(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=rf"{folder} .*{missing}") as error:
        make(folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*/nowhere \(t5 needs config.json, tokenizer.json"):
        make(tmp_path / "nowhere")


def test_weights_that_lack_a_tensor_are_refused(folder):
    """transformers would leave its random initial value."""
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensor\(s\) .*encoder\.final_layer_norm\.weight"):
        make(folder)


def test_a_text_needs_more_than_its_end(folder):
    with pytest.raises(UserError, match="max_length must be at least 2, got 1"):
        make(folder, max_length=1)
