"""The laws of ``vistok.interfaces.LatentTokenizer``, for every registered one."""

import pytest
import torch

from tiny_models.models import component_of, make_tokenizer, tokenizer_names
from vistok.checkpoint import export, export_info, load_autoencoder, load_tokenizer
from vistok.errors import UserError
from vistok.interfaces import LatentTokenizer
from vistok.rng import SampleRng


@pytest.fixture(params=tokenizer_names(LatentTokenizer))
def tokenizer(request):
    return make_tokenizer(request.param)


def test_encode_gives_deterministic_float32_latents_of_the_spec(tokenizer, images):
    latents = tokenizer.encode(images)
    assert tokenizer.spec.num_slots == 0
    assert latents.shape == (3, tokenizer.spec.num_positions, tokenizer.spec.latent_dim)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert torch.equal(latents, tokenizer.encode(images))
    assert (latents.std(dim=(0, 1)) > 0).all()


def test_streams_give_a_sample_that_depends_on_the_seed_alone(tokenizer, images):
    first, again, other = (tokenizer.encode(images, SampleRng.from_seed(seed, 3)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    # An encoder that describes no distribution has nothing to draw.
    assert not torch.equal(first, other) or torch.equal(first, tokenizer.encode(images))
    alone = tokenizer.encode(images[1:2], SampleRng.from_seed(0, 1, start=1))
    torch.testing.assert_close(first[1:2], alone, atol=1e-4, rtol=1e-4)


def test_decode_gives_images_of_the_size_it_was_given(tokenizer, images):
    latents = tokenizer.encode(images)
    decoded = tokenizer.decode(latents, SampleRng.from_seed(0, 3))
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert torch.equal(decoded, tokenizer.decode(latents, SampleRng.from_seed(0, 3)))
    assert not torch.allclose(decoded, tokenizer.decode(-latents, SampleRng.from_seed(0, 3)))


def test_a_batch_of_one_equals_a_row_of_a_batch(tokenizer, images):
    latents, alone = tokenizer.encode(images), tokenizer.encode(images[1:2])
    torch.testing.assert_close(latents[1:2], alone, atol=1e-4, rtol=1e-4)
    together = tokenizer.decode(latents, SampleRng.from_seed(0, 3))
    single = tokenizer.decode(latents[1:2], SampleRng.from_seed(0, 1, start=1))
    torch.testing.assert_close(together[1:2], single, atol=1e-4, rtol=1e-4)


def test_autocast_changes_no_latent(tokenizer, images):
    latents = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), latents)


def test_unknown_decode_options_are_refused_by_name(tokenizer, images):
    with pytest.raises(UserError, match="no_such_option"):
        tokenizer.decode(tokenizer.encode(images), no_such_option=1)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 16, 16), (3, 16, 16)])
def test_wrong_images_are_refused(tokenizer, shape):
    with pytest.raises(UserError, match=str(tokenizer.spec.image_size_px)):
        tokenizer.encode(torch.zeros(shape))


def test_training_loss_is_reproducible_and_reaches_every_parameter(tokenizer, images):
    tokenizer.train()
    first, second = (tokenizer(images, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first.total, second.total) and first.tokens is None
    torch.testing.assert_close(first.total, sum(first.terms.values()))
    first.total.backward()
    silent = [n for n, p in tokenizer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def test_loss_is_float32_under_bf16_autocast(tokenizer, images):
    exact = tokenizer(images, torch.Generator().manual_seed(0)).total
    with torch.autocast("cpu", torch.bfloat16):
        report = tokenizer(images, torch.Generator().manual_seed(0))
    assert report.total.dtype == torch.float32
    torch.testing.assert_close(report.total, exact, rtol=0.1, atol=0.05)


def test_export_round_trip(tokenizer, images, tmp_path):
    component = component_of(tokenizer)
    export(tmp_path, "tokenizer", component, tokenizer.spec, tokenizer.state_dict(), helpers=tokenizer.frozen_helpers)
    assert export_info(tmp_path)["spec"] == tokenizer.spec
    loaded = load_autoencoder(tmp_path)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images)) and not loaded.training
    with pytest.raises(UserError, match=r"continuous tokenizer: .*discretize"):
        load_tokenizer(tmp_path)
