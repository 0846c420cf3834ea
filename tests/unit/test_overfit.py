"""Can the real models learn at all? Sixteen digits by heart: FlexTok through its codes, GPT the codes themselves."""

import math

import pytest
import torch

from tiny_models.args import VARIANTS
from tiny_models.text import condition_for
from vistok.config import Component, build
from vistok.data.datamodule import load_data
from vistok.interfaces import SampleOptions
from vistok.pictures import to_uint8
from vistok.pipeline import decode_prefixes, tokenize_images
from vistok.rng import SampleRng, seeded_generator

TOKENIZER = Component(
    "flextok",
    {
        "image_size": 16,
        "patch_size": 4,
        "num_registers": 16,
        "encoder_width": 64,
        "encoder_depth": 1,
        "decoder_width": 96,
        "decoder_depth": 2,
        "head_dim": 32,
        "fsq_levels": [5, 5, 5],
        "time_density": "logit_normal",
        # One step decodes from pure noise: train there. Long prefixes and no null branch save time.
        "logit_mean": 5.0,
        "keep": "uniform_pow2",
        "null_probability": 0.0,
        "token_std": 1.0,
        "steps": 1,
    },
)
GENERATOR = {
    "width": 64,
    "depth": 2,
    "heads": 2,
    "num_classes": 16,
    "text_width": 16,
    "mlp_multiple": 32,
    "dropout": 0.0,
    "condition_dropout": 0.0,
}


def optimise(model, loss, updates, peak, warmup=30):
    """AdamW with warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for update in range(updates):
        part = max(0, update - warmup) / (updates - warmup)
        optimizer.param_groups[0]["lr"] = peak * min(1, (update + 1) / warmup) * (1 + math.cos(math.pi * part)) / 2
        total = loss(update)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def psnr_db(images, decoded):
    error = (images.float() - decoded.float()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / error)).mean().item()


@pytest.fixture(scope="module")
def images():
    data = load_data("digits", "train", 16)
    return torch.stack([data.get(index)["image"] for index in range(16)])


@pytest.fixture(scope="module")
def tokenizer(images):
    torch.manual_seed(0)
    model = build("tokenizers", TOKENIZER)
    optimise(model, lambda update: model(images, seeded_generator("tokenizer", update)).total, 1300, 2e-3)
    return model


def test_flextok_learns_sixteen_images_by_heart(tokenizer, images):
    decoded = decode_prefixes(tokenizer, tokenize_images(tokenizer, images, 16), [1, 16], seed=0, batch_size=16)
    assert psnr_db(to_uint8(images), decoded[16]) > 25
    assert psnr_db(to_uint8(images), decoded[1]) < psnr_db(to_uint8(images), decoded[16]) - 5


@pytest.mark.parametrize("variant", [{}, VARIANTS["gpt"]["text"]], ids=["classes", "texts"])
def test_gpt_learns_their_tokens_by_heart(tokenizer, images, variant):
    tokens = tokenize_images(tokenizer, images, 16)
    assert len(tokens.ids.unique(dim=0)) == 16
    torch.manual_seed(0)
    model = build("generators", Component("gpt", {**GENERATOR, **variant}), tokenizer.spec)
    condition = condition_for(model, 16)
    first = model(tokens, condition, seeded_generator("generator", 0)).total.item()
    assert first == pytest.approx(math.log(125), abs=1e-4)
    optimise(model, lambda update: model(tokens, condition, seeded_generator("generator", update)).total, 200, 3e-3)
    assert model(tokens, condition, seeded_generator("generator", 0)).total.item() < 0.05
    sampled = model.generate(condition, SampleOptions(temperature=0), SampleRng.from_seed(0, 16))
    assert torch.equal(sampled.ids, tokens.ids)
