"""The laws of ``vistok.interfaces.Tokenizer``, for every registered tokenizer."""

import pytest
import torch

from tiny_models.args import TINY_ARGS
from tiny_models.models import component_of
from vistok.checkpoint import export, export_info, load_tokenizer
from vistok.config import available
from vistok.errors import UserError
from vistok.rng import SampleRng
from vistok.tokens import Tokens


def test_every_tokenizer_has_a_tiny_size():
    assert available("tokenizers") == sorted(TINY_ARGS["tokenizers"])


def test_tokenize_gives_legal_deterministic_ids(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    assert tokens.spec == tokenizer.spec
    assert tokens.ids.shape == (3, tokenizer.spec.num_positions, tokenizer.spec.num_slots)
    assert torch.equal(tokens.ids, tokenizer.tokenize(images).ids)
    assert not tokens.ids.requires_grad
    assert len(tokens.ids.unique()) > 1


def test_embed_has_the_latent_shape_and_feeds_decode(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    latents = tokenizer.embed(tokens)
    assert latents.shape == (3, tokenizer.spec.num_positions, tokenizer.spec.latent_dim)
    from_ids = tokenizer.decode(tokens, SampleRng.from_seed(0, 3))
    from_latents = tokenizer.decode(latents, SampleRng.from_seed(0, 3))
    assert torch.equal(from_ids, from_latents)


def test_decode_gives_images_of_the_size_it_was_given(tokenizer, images):
    decoded = tokenizer.decode(tokenizer.tokenize(images), SampleRng.from_seed(0, 3))
    assert decoded.shape == images.shape
    assert decoded.isfinite().all()


def test_decode_depends_on_tokens_and_seed_alone(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    first = tokenizer.decode(tokens, SampleRng.from_seed(0, 3))
    assert torch.equal(first, tokenizer.decode(tokens, SampleRng.from_seed(0, 3)))
    other = Tokens((tokens.ids + 1) % torch.tensor(tokenizer.spec.vocab_sizes), tokenizer.spec)
    assert not torch.allclose(first, tokenizer.decode(other, SampleRng.from_seed(0, 3)))


def test_a_batch_of_one_equals_a_row_of_a_batch(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    alone = tokenizer.tokenize(images[1:2])
    assert torch.equal(tokens.ids[1:2], alone.ids)
    together = tokenizer.decode(tokens, SampleRng.from_seed(0, 3))
    single = tokenizer.decode(alone, SampleRng.from_seed(0, 1, start=1))
    torch.testing.assert_close(together[1:2], single, atol=1e-4, rtol=1e-4)


def test_autocast_changes_no_id(tokenizer, images):
    ids = tokenizer.tokenize(images).ids
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.tokenize(images).ids, ids)


def test_every_legal_prefix_of_a_code_decodes(tokenizer, images):
    tokens = tokenizer.tokenize(images)
    legal = tokenizer.spec.layout.prefixes
    for length in {legal[0], legal[len(legal) // 2], legal[-1]}:
        assert tokenizer.decode(tokens.prefix(length), SampleRng.from_seed(0, 3)).shape == images.shape
    for length in {0, 2, legal[-1] + 1} - set(legal):
        with pytest.raises(UserError, match=f"cannot keep {length} tokens"):
            tokens.prefix(length)


def test_unknown_decode_options_are_refused_by_name(tokenizer, images):
    with pytest.raises(UserError, match="no_such_option"):
        tokenizer.decode(tokenizer.tokenize(images), SampleRng.from_seed(0, 3), no_such_option=1)


@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (1, 1, 16, 16), (3, 16, 16)])
def test_wrong_images_are_refused(tokenizer, shape):
    with pytest.raises(UserError, match=str(tokenizer.spec.image_size_px)):
        tokenizer.tokenize(torch.zeros(shape))


def has_nothing_to_train(tokenizer, images):
    """Whether a tokenizer is all helpers and tables: then it must say so."""
    if list(tokenizer.parameters()):
        return False
    with pytest.raises(UserError, match="nothing to train"):
        tokenizer(images, torch.Generator().manual_seed(0))
    return True


def test_training_loss_is_reproducible_and_reaches_every_parameter(tokenizer, images):
    if has_nothing_to_train(tokenizer, images):
        return
    tokenizer.train()
    batch = images.repeat(8, 1, 1, 1)

    def report():
        torch.manual_seed(0)
        return tokenizer(batch, torch.Generator().manual_seed(0))

    first, second = report(), report()
    assert torch.equal(first.total, second.total)
    torch.testing.assert_close(first.total, sum(first.terms.values()))
    assert first.tokens is not None and len(first.tokens) == len(batch)
    first.total.backward()
    silent = [n for n, p in tokenizer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def test_loss_is_float32_under_bf16_autocast(tokenizer, images):
    if has_nothing_to_train(tokenizer, images):
        return
    exact = tokenizer(images, torch.Generator().manual_seed(0)).total
    with torch.autocast("cpu", torch.bfloat16):
        report = tokenizer(images, torch.Generator().manual_seed(0))
    assert report.total.dtype == torch.float32
    torch.testing.assert_close(report.total, exact, rtol=0.1, atol=0.05)


def test_export_round_trip(tokenizer, images, tmp_path):
    component = component_of(tokenizer)
    export(
        tmp_path,
        "tokenizer",
        component,
        tokenizer.spec,
        tokenizer.state_dict(),
        helpers=tokenizer.frozen_helpers,
    )
    assert export_info(tmp_path)["spec"] == tokenizer.spec
    loaded = load_tokenizer(tmp_path)
    assert torch.equal(loaded.tokenize(images).ids, tokenizer.tokenize(images).ids)
    assert not loaded.training
