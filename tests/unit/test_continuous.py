"""A continuous tokenizer where a discrete one is usual: measuring, pictures, training, released files of any size."""

import pytest
import torch

from tiny_models.models import exported_tokenizer, make_tokenizer, tiny_component
from tiny_models.runs import tiny_run
from tiny_models.vae import save_vae
from vistok.checkpoint import export_info, load_autoencoder
from vistok.errors import UserError
from vistok.eval.reconstruction import measure_reconstruction, picture_reconstruction
from vistok.pictures import to_uint8
from vistok.pipeline import decode_images, encode_images
from vistok.published import main as published_command
from vistok.training.run import train


def images(count=5):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_pass_through_the_pipeline_in_batches():
    model = make_tokenizer("klvae")
    latents = encode_images(model, images(), batch_size=2)
    torch.testing.assert_close(latents, model.encode(images()), atol=1e-4, rtol=1e-4)
    decoded = decode_images(model, latents, seed=0, batch_size=2)
    difference = decoded.int() - to_uint8(model.decode(latents)).int()
    assert decoded.shape == (5, 3, 16, 16) and difference.abs().max() <= 1


def test_reconstruction_is_measured_without_a_codebook():
    model = make_tokenizer("klvae")
    batch = {"image": images(), "label": torch.full((5,), -1), "position": torch.arange(5)}
    result = measure_reconstruction(model, [batch], None, [64])
    assert result["codebook"] == {} and result["tokens"]["64"]["psnr_db"] > 0
    assert picture_reconstruction(model, [{"image": image} for image in images()], [64]).size[0] > 32


def test_it_trains_and_leaves_an_export(tmp_path):
    component = tiny_component("tokenizers", "klvae")
    config = tiny_run(tmp_path, "log.pictures_every_updates=4")
    config.tokenizer = {"name": component.name, "args": component.args}
    train(config)
    assert load_autoencoder(tmp_path / "run").spec.num_slots == 0
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


def test_training_what_has_no_weights_is_refused(tmp_path):
    config = tiny_run(tmp_path)
    config.tokenizer = {"name": "tokenbridge", "args": {"tokenizer": exported_tokenizer("klvae").name}}
    with pytest.raises(UserError, match="TokenBridge has no weights to train"):
        train(config)


def test_a_release_for_any_size_is_converted_at_the_size_asked_for(tmp_path, monkeypatch, capsys):
    save_vae(tmp_path / "release", sample_size=64)
    words = ["published", "klvae", str(tmp_path / "release"), "--out", str(tmp_path / "out"), "--image-size", "16"]
    monkeypatch.setattr("sys.argv", words)
    published_command()
    assert "16 px, 64 tokens, scaling_factor 0.7" in capsys.readouterr().out
    assert export_info(tmp_path / "out")["spec"].image_size_px == 16
    monkeypatch.setattr("sys.argv", ["published", "flextok", *words[2:]])
    with pytest.raises(UserError, match="leave out --image-size"):
        published_command()
