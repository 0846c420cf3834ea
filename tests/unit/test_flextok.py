import copy
import io
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from tiny_models.vae import save_vae
from vistok.checkpoint import export, export_hash, load_tokenizer
from vistok.config import Component, to_plain
from vistok.errors import UserError
from vistok.flow.path import target_velocity
from vistok.flow.solvers import euler
from vistok.flow.time import mode_time
from vistok.nn.patch import patchify, sincos_2d, unpatchify
from vistok.rng import SampleRng
from vistok.tokenizers import flextok
from vistok.tokenizers.flextok import Config, FlexTok, build, kept_tokens, round_up_to_pow2
from vistok.tokenizers.flextok_published import PUBLISHED_KEYS

TINY = Config(
    image_size=16,
    patch_size=4,
    num_registers=8,
    encoder_width=32,
    encoder_depth=2,
    decoder_width=48,
    decoder_depth=2,
    head_dim=16,
    fsq_levels=(8, 5, 5),
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=rng()) * 2 - 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def test_registers_see_patches_and_earlier_registers_only(model, images):
    before = model.encoder(images)
    patches = []
    model.encoder.blocks[-1].register_forward_hook(lambda m, args, out: patches.append(out[:, :16]))
    model.encoder(images)
    disturbed = copy.deepcopy(model)
    with torch.no_grad():
        disturbed.encoder.registers[5] += torch.linspace(-1, 1, 32)  # not constant: the norm would hide it
    after = disturbed.encoder(images)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()
    assert torch.equal(patches[0], patches[1])


def test_codes_at_and_behind_keep_have_no_influence(model, images):
    codes, _ = model.encode(images)
    keep, never = torch.tensor([1, 3, 8, 5]), torch.zeros(4, dtype=torch.bool)
    noise = torch.randn(4, 3, 16, 16, generator=rng())
    behind = torch.arange(8) >= keep[:, None]
    other = torch.where(behind[:, :, None], -codes, codes)
    time = torch.full((4,), 0.5)
    first, second = (model.decoder(noise, time, model.decoder.condition(c, keep, never)) for c in (codes, other))
    assert torch.equal(first, second)
    null = [model.decoder.condition(c, keep, ~never) for c in (codes, torch.zeros_like(codes))]
    assert torch.equal(*null)


def test_a_padded_prefix_equals_a_short_one(model, images):
    tokens = model.tokenize(images)
    short = model.decode(tokens.prefix(3), SampleRng.from_seed(0, 4), steps=2)
    padded = model.decode(tokens, SampleRng.from_seed(0, 4), steps=2, keep=torch.full((4,), 3))
    assert torch.equal(short, padded)
    mixed = model.decode(tokens, SampleRng.from_seed(0, 4), steps=2, keep=torch.tensor([8, 3, 3, 1]))
    torch.testing.assert_close(mixed[1:3], short[1:3])


def test_a_fresh_model_has_zero_velocity_and_the_middle_code(images):
    model = build(replace(TINY, fsq_levels=(8, 8, 8, 5, 5, 5)))
    assert (model.tokenize(images).ids == 32036).all()
    condition = model.decoder.condition(model.encode(images)[0], torch.full((4,), 8), torch.zeros(4, dtype=torch.bool))
    assert not model.decoder(images, torch.rand(4), condition).any()
    loss = model.training_loss(images, rng()).total
    expected = 1 + images.square().mean()
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0)


def test_gradients_reach_the_encoder_within_four_updates(images):
    torch.manual_seed(0)
    model = build(TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reached = []
    for update in range(6):
        optimizer.zero_grad()
        model.training_loss(images.repeat(4, 1, 1, 1), rng(update)).total.backward()
        reached.append(bool(model.encoder.blocks[0].attention.qkv.weight.grad.any()))
        optimizer.step()
    assert reached[0] is False and reached[4] is True


def test_guidance_in_one_batch_equals_two_passes(model, images):
    codes = model.encode(images)[0]
    keep, never = torch.tensor([8, 2, 4, 1]), torch.zeros(4, dtype=torch.bool)
    noise = torch.randn(4, 3, 16, 16, generator=rng())
    got = model.sample_latent(noise, codes, keep, 3, 2.5)
    conditions = [model.decoder.condition(codes, keep, flag) for flag in (never, ~never)]

    def velocity(x, time):
        conditional, null = (model.decoder(x, time, condition) for condition in conditions)
        return null + 2.5 * (conditional - null)

    torch.testing.assert_close(got, euler(velocity, noise, 3), atol=1e-4, rtol=1e-4)


def test_euler_is_exact_on_a_straight_path(images):
    noise = torch.randn(images.shape, generator=rng())
    for steps in (1, 7):
        out = euler(lambda x, time: target_velocity(images, noise), noise, steps)
        torch.testing.assert_close(out, images, atol=1e-5, rtol=1e-5)


def test_patches_are_row_column_channel_and_come_back(images):
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, 4, 4), images)
    assert torch.equal(patches[0, 1].view(4, 4, 3)[1, 2], images[0, :, 1, 6])


def test_positions_encode_the_row_first():
    table = sincos_2d(3, 5, 16)
    assert torch.equal(table[1, 0, :8], table[1, 4, :8]) and torch.equal(table[0, 2, 8:], table[2, 2, 8:])
    torch.testing.assert_close(table[2, 0, 0], torch.tensor(2.0).sin())


def test_nested_dropout_draws():
    draws = torch.rand(40000, generator=rng())
    uniform = kept_tokens(draws, 8, "uniform").bincount(minlength=9) / 40000
    torch.testing.assert_close(uniform[1:], torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    powers = kept_tokens(draws, 8, "pow2").bincount(minlength=9) / 40000
    torch.testing.assert_close(powers[[1, 2, 4, 8]], torch.full((4,), 0.25), atol=0.01, rtol=0)
    rounded = kept_tokens(draws, 8, "uniform_pow2").bincount(minlength=9) / 40000
    torch.testing.assert_close(rounded[[1, 2, 4, 8]], torch.tensor([1, 1, 2, 4]) / 8, atol=0.01, rtol=0)
    assert (kept_tokens(draws, 8, "all") == 8).all()
    assert round_up_to_pow2(torch.tensor([5, 8, 9])).tolist() == [8, 8, 16]


def test_mode_density_favours_the_middle_and_is_symmetric():
    time = mode_time((torch.arange(10000) + 0.5) / 10000, 0.25)
    quantiles = time.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.12, 0.27, 0.5, 0.73, 0.88]), atol=0.011, rtol=0)


def test_published_key_map_is_invertible(model):
    state = model.state_dict()
    published = PUBLISHED_KEYS.to_published(state)
    assert published["decoder.module_dict.dec_transformer.blocks.1.adaLN_modulation.1.weight"].shape == (12 * 48, 48)
    again = PUBLISHED_KEYS.to_ours(published)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    with pytest.raises(UserError, match="surprise"):
        PUBLISHED_KEYS.to_ours(published | {"surprise": torch.zeros(1)})


def test_sizes_of_the_released_models():
    with torch.device("meta"):
        for enc, dec, enc_count, dec_count in [(12, 12, 85_382_406, 172_448_320), (18, 28, 287_326_086, 2_169_735_744)]:
            sizes = dict(encoder_width=64 * enc, encoder_depth=enc, decoder_width=64 * dec, decoder_depth=dec)
            vae = _FakeVae(16)
            model = FlexTok(replace(Config(), **sizes), vae)
            # The released files store the fixed positions of the patches as parameters.
            counts = [sum(p.numel() for p in part.state_dict().values()) for part in (model.encoder, model.decoder)]
            assert counts == [enc_count, dec_count]


class _FakeVae(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        values = {"latent_channels": channels, "block_out_channels": (1,) * 4, "scaling_factor": 1.0}
        self.config = type("Config", (), values)


def test_latents_of_a_frozen_vae(tmp_path, images):
    vae = save_vae(tmp_path)
    model = build(replace(TINY, vae=str(tmp_path), patch_size=2))
    assert model.channels == 5 and model.latent_size == 8
    assert not any("vae" in name for name in model.state_dict())
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in vae.parameters())
    model.training_loss(images, rng()).total.backward()
    assert all(p.grad is None for p in model.vae.module.parameters())
    latent = model.encode_latent(images)
    with torch.no_grad():
        expected = vae.eval().encode(images).latent_dist.mean * 0.7
    torch.testing.assert_close(latent, expected)
    assert model.decode(model.tokenize(images), SampleRng.from_seed(0, 4), steps=1).shape == images.shape
    component = Component("flextok", to_plain(model.config))
    export(tmp_path / "export", "tokenizer", component, model.spec, model.state_dict(), helpers=model.frozen_helpers)
    digest = export_hash(tmp_path / "export")
    moved = tmp_path / "moved"
    (tmp_path / "export").rename(moved)
    tokens = model.eval().tokenize(images)
    assert torch.equal(load_tokenizer(moved).tokenize(images).ids, tokens.ids), "an export brings its VAE along"
    assert export_hash(moved) == digest
    (moved / "vae" / "config.json").write_text((moved / "vae" / "config.json").read_text() + " ")
    assert export_hash(moved) != digest, "another VAE makes other tokens"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_latent(images), latent), "a frozen VAE keeps its own precision"
    with pytest.raises(UserError, match="AutoencoderKL"):
        build(replace(TINY, vae=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="vae_scale"):
        build(replace(TINY, vae=str(tmp_path), patch_size=2, vae_scale=0.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 18}, "image_size 18 is no multiple of 4"),
        ({"image_size": 2}, "image_size 2"),
        ({"decoder_width": 52}, "decoder_width 52 is no multiple of head_dim 16"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"encoder_width": 66, "head_dim": 6}, "encoder_width must be a multiple of 4, got 66"),
        ({"max_timestep": 0.0}, "max_timestep must be positive"),
        ({"code_std": -1.0}, "code_std must be at least 0"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"num_registers": 0}, "num_registers must be at least 1"),
        ({"encoder_depth": -1}, "encoder_depth must be at least 0"),
        ({"fsq_levels": (1, 5)}, "fsq_levels must all be at least 2"),
        ({"null_probability": 1.5}, "null_probability must lie in"),
        ({"keep": "pow2", "num_registers": 6}, "power of two"),
    ],
)
def test_sizes_that_do_not_fit(change, words):
    with pytest.raises(UserError, match=words):
        build(replace(TINY, **change))


def test_steps_must_be_positive(model, images):
    with pytest.raises(UserError, match="steps"):
        model.decode(model.tokenize(images), steps=0)


def test_merged_registers_give_the_velocity_of_all(model, images):
    codes, _ = model.encode(images)
    keep, null = torch.tensor([1, 4, 7, 8]), torch.tensor([False, False, True, False])
    condition = model.decoder.condition(codes, keep, null)
    time = torch.full((4,), 0.7)
    merged, bias = model.decoder.merge(condition, torch.where(null, 0, keep))
    torch.testing.assert_close(model.decoder(images, time, merged, bias), model.decoder(images, time, condition))
    merged, bias = model.decoder.merge(condition[:2], keep[:2])
    assert merged.shape[1] == 5  # four codes and one mask token for four
    torch.testing.assert_close(
        model.decoder(images[:2], time[:2], merged, bias), model.decoder(images[:2], time[:2], condition[:2])
    )
    assert model.decoder.merge(condition, torch.full((4,), 8))[1] is None


@pytest.mark.parametrize(
    ("count", "keep", "words"),
    [
        (0, None, "decodes 1 to 8 tokens, got 0"),
        (9, None, "decodes 1 to 8 tokens, got 9"),
        (4, [0, 1], r"keep must lie in 1..4, got 0..1"),
        (4, [5, 1], r"keep must lie in 1..4, got 1..5"),
    ],
)
def test_counts_of_tokens_that_do_not_fit(model, count, keep, words):
    with pytest.raises(UserError, match=words):
        model.decode(torch.zeros(2, count, 3), keep=None if keep is None else torch.tensor(keep))


def test_a_width_below_the_values_of_a_patch_is_pointed_out():
    with pytest.warns(UserWarning, match="a patch has 48 values, more than decoder_width 32"):
        build(replace(TINY, decoder_width=32))


def test_decoding_shows_a_bar_of_its_steps_unless_progress_is_taken(model, images, monkeypatch):
    bars = []

    def bar(*args, **kwargs):
        bars.append(tqdm(*args, **{**kwargs, "disable": kwargs["disable"] or False, "file": io.StringIO()}))
        return bars[-1]

    monkeypatch.setattr(flextok, "tqdm", bar)
    tokens, steps = model.tokenize(images), []
    model.decode(tokens, steps=3)
    model.decode(tokens, steps=3, progress=steps.append)
    assert (bars[0].n, bars[0].total, bars[0].delay) == (3, 3, 1)
    assert bars[1].disable and steps == [1, 1, 1]
