"""From images to latents to a tokenizer trained on them, as a user types it, in this process to save time."""

import pytest
import torch
import yaml

from tiny_models.args import TINY_ARGS
from tiny_models.runs import read_state
from tiny_models.vae import save_vae
from vistok.checkpoint import load_tokenizer
from vistok.data.datamodule import load_data


@pytest.fixture
def config(tmp_path):
    """A run on images, of a model that lacks its VAE; and ``tmp_path/vae``."""
    save_vae(tmp_path / "vae")
    run = {
        "output": str(tmp_path / "run"),
        "tokenizer": {"name": "flextok", "args": {**TINY_ARGS["tokenizers"]["flextok"], "image_size": 32}},
        "data": {"name": "shapes", "args": {"train_count": 12, "val_count": 4}, "batch_size": 4},
        "trainer": {"max_updates": 2, "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


def refused(result, *parts):
    code, _, err = result
    line = err.split("\r")[-1]
    assert code == 2
    assert line.startswith("error: ") and line.count("\n") == 1
    assert all(part in line for part in parts), line


def test_latents_then_training_then_more_of_it(run_script, config, tmp_path):
    out, vae = tmp_path / "latents", f"vae={tmp_path / 'vae'}"
    words = ("vistok.data", "latents", "--config", config, "--data", "shapes", "--out", out, "--device", "cpu")
    counts = ("--data-args", "train_count=12", "val_count=4")
    refused(run_script(*words, *counts), "this tokenizer has no VAE", "no latents to cache")
    refused(run_script(*words, *counts, "--tokenizer-args", "vea=x"), "'vea'", "did you mean 'vae'?")
    code, said, err = run_script(*words, *counts, "--tokenizer-args", vae, "--passes", 2, "--batch-size", 5)
    assert code == 0, err
    assert said == f"wrote the latents of 28 images to {out}\n"
    refused(run_script(*words, *counts, "--tokenizer-args", vae), "latents exists already")

    model = ("train.py", "--config", config, f"tokenizer.args.{vae}")
    train = (*model, "data.name=latent_cache", f"data.args.path={out}", "data.workers=1")
    refused(run_script(*train, "tokenizer.args.vae_scale=2"), "made by VAE", "python -m vistok.data latents")
    refused(run_script(*train, "tokenizer.args.vae=null"), "latents of a VAE", "train it on images")
    code, said, err = run_script(*train)
    assert code == 0, err
    assert "latent_cache, 12 images of 32 px, 4 for validation" in said
    assert len(list((tmp_path / "run/pictures").glob("*.png"))) == 1
    assert "val/loss" in (tmp_path / "run/metrics.csv").read_text()
    code, _, err = run_script(*train, "resume=auto", "trainer.max_updates=3")
    assert code == 0, err
    state = read_state(tmp_path / "run")
    assert (state["updates"], state["images"]) == (3, 12)
    image, latent = (
        load_data(str(data), "val", 32, {} if data == out else {"val_count": 4}).get(0)[name][None]
        for data, name in (("shapes", "image"), (out, "latent"))
    )
    trained = load_tokenizer(tmp_path / "run")
    torch.testing.assert_close(trained.encode_latent(image), latent, rtol=1e-3, atol=1e-4)

    generator = ("generator.name=tiny_models.generator", f"tokenizer={tmp_path / 'run'}", f"output={tmp_path / 'gen'}")
    gpt = tmp_path / "gpt.yaml"
    gpt.write_text(yaml.safe_dump({"data": {"batch_size": 4}, "trainer": {"max_updates": 1, "accelerator": "cpu"}}))
    code, _, err = run_script("train.py", "--config", gpt, *generator, *train[4:])
    assert code == 0, err


def test_a_config_that_trains_no_tokenizer_is_refused(run_script, tmp_path):
    words = ("vistok.data", "latents", "--data", "shapes", "--out", tmp_path / "out", "--config", tmp_path / "run.yaml")
    refused(run_script(*words), "config file not found")
    (tmp_path / "run.yaml").write_text("tokenizer: runs/flextok")
    refused(run_script(*words), "run.yaml", "trains a tokenizer", "'runs/flextok'")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
