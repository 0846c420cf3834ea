"""Token merging inside this package's own tokenizers."""

import pytest
import torch

from tiny_models.models import make_tokenizer
from vistok.errors import UserError
from vistok.merging.vit import apply, merge_tokens, remove
from vistok.nn.transformer import recompute_blocks
from vistok.tokenizers import tokenbridge

VIT = {"encoder_args": {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}}
DEEP = {"flextok": {"encoder_depth": 3}, "tokenflow": VIT, "uniflow": VIT}
"""Encoders of three blocks on 16 patches; what comes with them follows."""
OTHERS = {"flextok": 8, "tokenflow": 1, "uniflow": 1}


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def codes(tokenizer, x):
    """Before quantization, where every difference shows."""
    return tokenizer.encoder(x) if hasattr(tokenizer, "decoder") else tokenizer.encode(x)


@pytest.fixture(params=DEEP)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name):
    return make_tokenizer(name, **DEEP[name])


@pytest.fixture
def flextok():
    return make_tokenizer("flextok", **DEEP["flextok"])


@torch.no_grad()
def test_no_merges_change_nothing(tokenizer):
    expected = codes(tokenizer, images())
    for settings in ({"r": 0}, {"method": "pitome", "ratio": 1.0}):
        with merge_tokens(tokenizer, **settings):
            assert torch.equal(codes(tokenizer, images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "pitome", "random"])
def test_merges_while_encoding(tokenizer, name, method):
    expected = codes(tokenizer, images())
    with merge_tokens(tokenizer, method, r=3) as merging:
        merged = codes(tokenizer, images())
        assert merging.lengths == [OTHERS[name] + 16 - 3 * count for count in (1, 2, 3)]
        assert (merging.size.sum(1) == OTHERS[name] + 16).all()
        assert merged.shape == expected.shape and not torch.allclose(merged, expected)
        code = tokenizer.tokenize(images()) if hasattr(tokenizer, "tokenize") else tokenizer.encode(images())
        assert tokenizer.decode(code).shape == (2, 3, 16, 16)
        torch.testing.assert_close(codes(tokenizer, images()[1:]), merged[1:])
    assert torch.equal(codes(tokenizer, images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_equal_patches_of_flextok_merge_without_loss(flextok, proportional):
    flextok.encoder.positions.zero_()
    x = images()[..., :8].unflatten(3, (2, 4)).repeat_interleave(2, dim=3).flatten(3)  # each patch twice, side by side
    expected = flextok.encoder(x)
    with merge_tokens(flextok, r=[8], proportional=proportional) as merging:
        merged = flextok.encoder(x)
    assert (merging.size[:, :8] == 2).all() and (merging.size[:, 8:] == 1).all()
    if proportional:
        torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    else:
        assert (merged - expected).abs().max() > 1e-2


@torch.no_grad()
def test_registers_of_flextok_stay_causal_and_see_all_patches(flextok):
    with merge_tokens(flextok, r=4) as merging:
        before = flextok.encoder(images())
        slots = merging.slots
        flextok.encoder.registers[5].neg_()
        after = flextok.encoder(images())
    assert torch.equal(slots[:, 16:], torch.arange(4, 12).expand(2, -1)) and torch.equal(merging.slots, slots)
    assert torch.equal(after[:, :5], before[:, :5]) and ((after[:, 5:] - before[:, 5:]).abs().amax(2) > 1e-4).all()


@torch.no_grad()
def test_patches_of_flextok_do_not_see_registers(flextok):
    slots = []
    for _ in range(2):
        flextok.encoder.registers.neg_()
        with merge_tokens(flextok, r=4) as merging:
            flextok.encoder(images())
        slots.append(merging.slots)
    assert torch.equal(*slots)


def test_flextok_trains_with_merges_and_with_recomputed_blocks(flextok):
    gradients = []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(flextok)
        with merge_tokens(flextok, r=4):
            flextok.zero_grad()
            flextok.training_loss(images(), torch.Generator().manual_seed(0)).total.backward()
        gradients.append(flextok.encoder.patch_in.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_dropout_of_our_blocks_stays(flextok):
    for block in flextok.encoder.blocks:
        block.dropout.p = 0.5
    flextok.train()
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(flextok.encoder(images()))
        apply(flextok, r=0)
    torch.testing.assert_close(*draws)
    remove(flextok)


@torch.no_grad()
def test_condition_tower_of_uniflow_merges_while_decoding():
    uniflow = make_tokenizer("uniflow", global_blocks=3)
    latents = uniflow.encode(images())
    expected = uniflow.tower(latents)
    with merge_tokens(uniflow.tower, r=0):
        assert torch.equal(uniflow.tower(latents), expected)
    with merge_tokens(uniflow.tower, r=2) as merging:
        condition = uniflow.tower(latents)
    assert merging.lengths == [14, 12, 10] and condition.shape == expected.shape
    # A group has one value; the positions behind the blocks are those of its patches.
    values = condition - uniflow.tower.positions_behind.flatten(0, 1)
    for image, slots in zip(values, merging.slots):
        assert len(slots.unique()) == 10
        torch.testing.assert_close(image, torch.stack([image[slots == slot].mean(0) for slot in slots]))


@torch.no_grad()
def test_tokenbridge_merges_what_its_latents_come_from():
    uniflow = make_tokenizer("uniflow", **VIT)
    bridge = tokenbridge.TokenBridge(tokenbridge.Config(tokenizer="", levels=8), uniflow)
    expected = bridge.tokenize(images()).ids
    with merge_tokens(bridge, r=2) as merging:
        merged = bridge.tokenize(images()).ids
        assert merging.lengths == [15, 13, 11]
    assert (merged != expected).any() and torch.equal(bridge.tokenize(images()).ids, expected)


@pytest.mark.parametrize("name, model", [("vqgan", "VQGAN"), ("klvae", "KLVAE"), ("tokenbridge", "TokenBridge")])
def test_tokenizers_without_a_transformer_are_refused_by_name(name, model):
    with pytest.raises(UserError, match=f"cannot merge tokens of {model}: it has no encoding_tower"):
        apply(make_tokenizer(name), r=2)


def test_a_mistake_in_a_tower_is_not_taken_for_none(flextok):
    del flextok.encoder
    with pytest.raises(AttributeError):
        apply(flextok, r=2)


def test_blocks_that_need_more_than_tokens_are_refused_by_name(flextok):
    flextok.encoder.blocks[1] = flextok.decoder.blocks[0]
    with pytest.raises(UserError, match=r"cannot merge tokens in blocks.1 \(Block\): it does not run on a sequence"):
        apply(flextok, r=2)
    assert not hasattr(flextok.encoder, "token_merging")
