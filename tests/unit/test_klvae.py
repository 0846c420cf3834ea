"""The KL-VAE outside its parity cases: scale, loss, and released files in both layouts."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tiny_models.args import TINY_ARGS
from tiny_models.models import make_tokenizer
from tiny_models.vae import save_vae
from vistok.checkpoint import export_info, load_autoencoder
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.published import main as published_command
from vistok.rng import SampleRng
from vistok.tokenizers import klvae_published
from vistok.tokenizers.klvae import KLVAE, Config, config_of, vae_arguments
from vistok.tokenizers.klvae_published import latent_diffusion_keys
from vistok.tokens import Grid2D

TINY = TINY_ARGS["tokenizers"]["klvae"]


def images(size=16, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_scaled_in_raster_order_and_decoded_back():
    model = make_tokenizer("klvae")
    posterior = model.vae.encode(images()).latent_dist
    expected = (posterior.mean * 0.2325).permute(0, 2, 3, 1).reshape(2, 64, 3)
    torch.testing.assert_close(model.encode(images()), expected)
    torch.testing.assert_close(model.decode(expected), model.vae.decode(posterior.mean).sample, atol=1e-4, rtol=1e-4)


def test_a_sample_is_mean_and_standard_deviation_times_the_streams():
    model = make_tokenizer("klvae")
    noise = SampleRng.from_seed(3, 2).normal(3, 8, 8)
    posterior = model.posterior(images())
    sampled = model.encode(images(), SampleRng.from_seed(3, 2))
    torch.testing.assert_close(sampled.mT.unflatten(2, (8, 8)) / 0.2325, posterior.mean + posterior.std * noise)


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
def test_the_loss_is_the_pixel_error_of_a_sample_and_the_divergence_per_image_value(pixel_loss):
    model = build("tokenizers", Component("klvae", {**TINY, "pixel_loss": pixel_loss, "kl_weight": 0.5}))
    report = model(images(), torch.Generator().manual_seed(7))
    mean, logvar = model.vae.encode(images()).latent_dist.parameters.chunk(2, dim=1)
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    torch.testing.assert_close(report.terms["kl"], 0.5 * divergence / (3 * 16 * 16))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    difference = model.vae.decode(mean + (logvar / 2).exp() * noise).sample - images()
    error = difference.abs().mean() if pixel_loss == "l1" else difference.square().mean()
    torch.testing.assert_close(report.terms["pixel"], error)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"image_size": 18, "block_out_channels": [8, 16, 16]}, "image_size 18 is no multiple of 4"),
        ({"block_out_channels": [8, 18]}, "multiples of norm_num_groups 4, got \\[8, 18\\]"),
        ({"block_out_channels": []}, "multiples"),
        ({"latent_channels": 0}, "latent_channels must be at least 1"),
        ({"scaling_factor": 0.0}, "scaling_factor must not be 0"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"latent_chanels": 4}, "did you mean 'latent_channels'"),
        ({"pixel_loss": "l3"}, "pixel_loss"),
    ],
)
def test_sizes_that_cannot_be_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        build("tokenizers", Component("klvae", {**TINY, **args}))


# ---------------------------------------------------------------------- released files


@pytest.fixture
def kl16(tmp_path, monkeypatch):
    """A checkpoint in MAR's layout, of a tiny model that also has attention in its decoder; and that model."""
    sizes = {**TINY, "block_out_channels": (8, 16), "decoder_attention": True}
    keys = latent_diffusion_keys(levels=2)
    monkeypatch.setattr(klvae_published, "Config", partial(Config, **sizes))
    monkeypatch.setattr(klvae_published, "KL16_KEYS", keys)
    torch.manual_seed(0)
    model = KLVAE(Config(**sizes)).eval()
    state = {key: value.clone() for key, value in keys.to_published(model.state_dict()).items()}
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    return tmp_path / "kl16.ckpt", model, state


def test_the_layout_of_latent_diffusion_comes_back(kl16):
    path, model, state = kl16
    assert state["encoder.down.1.attn.0.q.weight"].shape == (16, 16, 1, 1)
    assert state["decoder.up.1.attn.1.proj_out.weight"].shape == (16, 16, 1, 1)
    assert torch.equal(
        state["decoder.up.0.block.0.conv1.weight"], model.vae.decoder.up_blocks[1].resnets[0].conv1.weight
    )
    loaded = KLVAE.from_published(str(path))
    assert not loaded.training and loaded.config.scaling_factor == 0.2325
    assert torch.equal(loaded.encode(images()), model.encode(images()))
    assert torch.equal(loaded.decode(model.encode(images())), model.decode(model.encode(images())))


def test_a_checkpoint_that_is_not_whole_is_refused_by_key(kl16):
    path, _, state = kl16
    wrong = {
        r"missing \(vae\.encoder\.conv_in\.bias\)": {k: v for k, v in state.items() if k != "encoder.conv_in.bias"},
        r"unknown key\(s\) loss\.logvar": state | {"loss.logvar": torch.zeros(1)},
        r"quant_conv\.bias is \(5,\)": state | {"quant_conv.bias": torch.zeros(5)},
    }
    for message, tensors in wrong.items():
        torch.save({"model": tensors}, path)
        with pytest.raises(UserError, match=message):
            KLVAE.from_published(str(path))
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError, match="no state dict called 'model'"):
        KLVAE.from_published(str(path))
    path.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"kl16\.ckpt is no complete torch file"):
        KLVAE.from_published(str(path))


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_a_checkpoint_is_data_and_never_run(tmp_path, capsys):
    torch.save({"model": {"x": Harmful()}}, tmp_path / "kl16.ckpt")
    with pytest.raises(UserError, match="no complete torch file of plain weights"):
        KLVAE.from_published(str(tmp_path / "kl16.ckpt"))
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}])
@pytest.mark.parametrize("place", [".", "vae"])
def test_a_folder_of_diffusers_loads_with_its_scale(tmp_path, changes, place):
    vae = save_vae(tmp_path / place, sample_size=32, **changes).eval()
    model = KLVAE.from_published(str(tmp_path))
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.7, changes.get("shift_factor"))
    assert (model.spec.image_size_px, model.spec.layout, model.spec.latent_dim) == (32, Grid2D(16, 16), 5)
    mean = vae.encode(images(32)).latent_dist.mean
    expected = (mean - changes.get("shift_factor", 0)) * 0.7
    torch.testing.assert_close(model.encode(images(32)), expected.flatten(2).mT)
    torch.testing.assert_close(model.decode(model.encode(images(32))), vae.decode(mean).sample, atol=1e-5, rtol=1e-4)
    assert KLVAE.from_published(str(tmp_path), image_size=8).spec.layout == Grid2D(4, 4)


def test_configs_go_to_diffusers_and_back():
    for config in (Config(), Config(**{**TINY, "block_out_channels": (8, 16), "decoder_attention": True})):
        assert config_of(vae_arguments(config)) == config
    assert config_of(dict(AutoencoderKL(**vae_arguments(config)).config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "act_fn=relu"),
        ({"latents_mean": [0.0] * 5}, "latents_mean="),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "down_block_types="),
    ],
)
def test_an_autoencoder_of_another_kind_is_refused(tmp_path, changes, message):
    save_vae(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        KLVAE.from_published(str(tmp_path))


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if key != "encoder.conv_in.bias"}, path)
    with pytest.raises(UserError, match=r"missing_keys: encoder\.conv_in\.bias"):
        KLVAE.from_published(str(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="is no diffusers AutoencoderKL"):
        KLVAE.from_published(str(tmp_path))
    for nothing in (tmp_path / "nothing.ckpt", "nothing"):
        with pytest.raises(UserError, match="not found"):
            KLVAE.from_published(str(nothing))


def test_a_release_becomes_an_export(tmp_path, monkeypatch, capsys):
    save_vae(tmp_path / "release", sample_size=16)
    out = tmp_path / "export"
    monkeypatch.setattr("sys.argv", ["published", "klvae", str(tmp_path / "release"), "--out", str(out)])
    published_command()
    assert "16 px" in capsys.readouterr().out
    info = export_info(out)
    assert (info["weights"], info["args"]["scaling_factor"]) == ("published", 0.7)
    model = KLVAE.from_published(str(tmp_path / "release"))
    assert torch.equal(load_autoencoder(out).encode(images()), model.encode(images()))
