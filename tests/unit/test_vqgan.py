"""The VQGAN outside its parity cases: loss, gradients, scales, and released files in both layouts."""

import argparse
import re

import pytest
import torch

from tiny_models.args import TINY_ARGS, VARIANTS
from tiny_models.models import make_tokenizer
from vistok.checkpoint import export_info, load_tokenizer
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.published import main as published_command
from vistok.quantizers.vq import CodebookOptions
from vistok.tokenizers import vqgan_published
from vistok.tokenizers.cnn_published import LLAMAGEN, VAR
from vistok.tokenizers.vqgan import VQGAN, Config
from vistok.tokenizers.vqgan_published import published_keys, read_state
from vistok.tokens import Grid2D, MultiScale, Tokens

TINY = TINY_ARGS["tokenizers"]["vqgan"]
SCALES = VARIANTS["vqgan"]["scales"]
VAR_CONFIG = {"code_dim": 32, "z_channels": 32, "width": 160, "quant_kernel": 3, "vocab_size": 4096, "phi": 4}


def images(size=16, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def built(**args):
    torch.manual_seed(0)
    return build("tokenizers", Component("vqgan", {**TINY, **args}))


@pytest.mark.parametrize("pixel_loss", ["l1", "l2"])
def test_the_loss_is_the_pixel_error_of_the_reconstruction_and_the_terms_of_the_codebook(pixel_loss):
    model = built(pixel_loss=pixel_loss).eval()
    report = model(images(), torch.Generator())
    tokens = model.tokenize(images())
    assert torch.equal(report.tokens.ids, tokens.ids)
    torch.testing.assert_close(report.reconstruction, model.decode(tokens))
    difference = report.reconstruction - images()
    error = difference.abs().mean() if pixel_loss == "l1" else difference.square().mean()
    torch.testing.assert_close(report.terms["pixel"], error)
    z = torch.nn.functional.normalize(model.encode_map(images()).flatten(2).mT, dim=-1)
    distance = (z - model.embed(tokens)).square().mean()
    torch.testing.assert_close(report.terms["codebook"], distance)
    torch.testing.assert_close(report.terms["commitment"], 0.25 * distance)


@pytest.mark.parametrize("variant", [{}, SCALES, {"codebook": {"ema_decay": 0.9}}], ids=["grid", "scales", "ema"])
def test_the_reconstruction_moves_the_encoder_and_losses_move_the_codebook(variant):
    model = built(**variant).train()
    (table,) = model.quantizer.codebook.tables
    before = table.detach().clone()
    report = model(images(), torch.Generator())
    report.reconstruction.square().mean().backward(retain_graph=True)
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert table.grad is None or not table.grad.any(), "only its own loss may move it"
    report.total.backward()
    learns = "ema_decay" not in variant.get("codebook", {})
    assert (table.grad is not None and bool(table.grad.any())) == learns
    assert torch.equal(before, table) == learns
    assert model.last_layer is model.decoder.conv_out.weight and model.last_layer.grad.any()


def test_a_few_updates_fit_a_batch():
    torch.manual_seed(0)
    model = built(codebook={"kmeans": True}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        report = model(images(), torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        report.total.backward()
        optimizer.step()
        losses.append(report.terms["pixel"].item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("size", [8, 24])
def test_any_multiple_of_the_downsampling_has_its_grid(size):
    model = built(image_size=size).eval()
    assert model.spec.layout == Grid2D(size // 4, size // 4)
    tokens = model.tokenize(images(size))
    assert model.decode(tokens).shape == (2, 3, size, size)


def test_whole_scales_decode_to_coarser_images():
    model = make_tokenizer("vqgan", **SCALES)
    assert model.spec.layout == MultiScale(((1, 1), (2, 2), (4, 4)))
    tokens = model.tokenize(images())
    for length in (1, 5, 21):
        q = model.quantizer.decode(tokens.ids[:, :length, 0])
        torch.testing.assert_close(model.decode(tokens.prefix(length)), model.decode_map(q))
    latents = model.embed(tokens)
    assert torch.equal(model.decode(latents[:, :5]), model.decode(tokens.prefix(5)))
    with pytest.raises(UserError, match=r"4 is no prefix of whole scales \(1, 5, 21\)"):
        model.decode(latents[:, :4])
    codes = model.scale_codes
    torch.testing.assert_close(codes.decode(tokens.ids[:, :, 0]), model.quantizer.decode(tokens.ids[:, :, 0]))
    assert make_tokenizer("vqgan").scale_codes is None


def test_tokens_are_the_same_under_autocast():
    for variant in ({}, SCALES):
        model = make_tokenizer("vqgan", **variant)
        tokens = model.tokenize(images())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.tokenize(images()).ids, tokens.ids)
            assert torch.equal(model.decode(tokens), model.decode(Tokens(tokens.ids, tokens.spec)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"image_size": 18}, "image_size 18 is no multiple of 4"),
        ({"groups": 3}, r"width 8 and its multiples \[1, 1, 2\] must be multiples of groups 3"),
        ({"multipliers": []}, "multiples"),
        ({"code_dim": 0}, "code_dim must be at least 1"),
        ({"quant_kernel": 2}, "quant_kernel must be odd"),
        ({"scales": [1, 2, 3]}, r"end at the grid of 4 x 4 positions, got \[1, 2, 3\]"),
        ({"phi": -1}, "phi must be at least 0"),
        ({"vocabulary": 4}, "did you mean 'vocab_size'"),
        ({"codebook": {"decay": 0.5}}, "did you mean 'ema_decay'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        built(**args)


# ---------------------------------------------------------------------- released files


def tiny(layout, **args):
    """A tiny model with random weights as one of the two would release it, and its state dict there."""
    sizes = {**TINY, "groups": 32, "width": 32, "multipliers": (1, 2), "codebook": CodebookOptions(), **args}
    torch.manual_seed(0)
    model = VQGAN(Config(**sizes)).eval()
    state = published_keys(layout, levels=2).to_published(model.state_dict())
    return model, {key: value.clone() for key, value in state.items()}


def llamagen():
    model, state = tiny(LLAMAGEN)
    return model, state | {"quantize.codebook_used": torch.zeros(65536)}


def var(monkeypatch):
    monkeypatch.setattr(vqgan_published, "VAR_SCALES", {8: (1, 2, 4, 8)})
    options = {"codebook": CodebookOptions(normalized=False), "scales": (1, 2, 4, 8), "mode": "residual", "phi": 2}
    model, state = tiny(VAR, quant_kernel=3, **options)
    return model, state | {"quantize.ema_vocab_hit_SV": torch.zeros(4, 24)}


def test_names_of_the_two_releases():
    model, state = llamagen()
    assert torch.equal(state["decoder.conv_blocks.0.res.0.conv1.weight"], model.decoder.levels[0].res[0].conv1.weight)
    assert state["decoder.conv_blocks.0.attn.1.q.weight"].shape == (64, 64, 1, 1)
    qkv = [state[f"encoder.mid.1.{name}.bias"] for name in "qkv"]
    assert torch.equal(torch.cat(qkv), model.encoder.middle[1].qkv.bias)
    model, state = tiny(VAR)
    assert torch.equal(state["decoder.up.1.block.0.conv1.weight"], model.decoder.levels[0].res[0].conv1.weight)
    assert torch.equal(state["encoder.mid.attn_1.qkv.bias"], model.encoder.middle[1].qkv.bias)


@pytest.mark.parametrize("container", ["bare", "model", "ema"])
def test_llamagens_file_loads_from_any_of_its_containers(tmp_path, container):
    model, state = llamagen()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    content = {
        "bare": state,
        "model": {"model": state, "args": argparse.Namespace(lr=1e-4), "steps": 3},
        "ema": {"model": other, "ema": state},
    }
    torch.save(content[container], tmp_path / "vq.pt")
    loaded = VQGAN.from_published(str(tmp_path / "vq.pt"), image_size=16)
    assert not loaded.training and loaded.config == model.config and loaded.spec == model.spec
    tokens = loaded.tokenize(images())
    assert torch.equal(tokens.ids, model.tokenize(images()).ids)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    assert VQGAN.from_published(str(tmp_path / "vq.pt")).spec.layout == Grid2D(128, 128)


def test_vars_file_loads_with_the_scales_of_its_image_size(tmp_path, monkeypatch):
    model, state = var(monkeypatch)
    torch.save(state, tmp_path / "vae.pth")
    loaded = VQGAN.from_published(str(tmp_path / "vae.pth"), image_size=16)
    assert loaded.config == model.config and loaded.spec.layout.sizes[-1] == (8, 8)
    tokens = loaded.tokenize(images())
    assert torch.equal(tokens.ids, model.tokenize(images()).ids)
    assert torch.equal(loaded.decode(tokens.prefix(21)), model.decode(tokens.prefix(21)))
    with pytest.raises(UserError, match="no scales were released for images of 24 px, only for 16 px"):
        VQGAN.from_published(str(tmp_path / "vae.pth"), image_size=24)


def test_a_file_that_is_not_whole_is_refused_by_key(tmp_path):
    _, state = llamagen()
    path = tmp_path / "vq.pt"
    wrong = {
        r"missing \(decoder\.conv_in\.bias\)": {k: v for k, v in state.items() if k != "decoder.conv_in.bias"},
        r"quantizer\.codebook\.tables\.0 is missing": {k: v for k, v in state.items() if "embedding" not in k},
        r"encoder\.mid\.1\.k\.bias missing": {k: v for k, v in state.items() if k != "encoder.mid.1.k.bias"},
        r"unknown key\(s\) loss\.logvar": state | {"loss.logvar": torch.zeros(1)},
        r"quant_conv\.bias is \(5,\)": state | {"quant_conv.bias": torch.zeros(5)},
        "no VQGAN of LlamaGen or VAR": {"net.weight": torch.zeros(1)},
        "holds no state dict": {"optimizer": {"lr": 1e-4}},
    }
    for message, content in wrong.items():
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            VQGAN.from_published(str(path), image_size=16)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"vq\.pt is no complete torch file"):
        VQGAN.from_published(str(path))
    for nothing in (tmp_path / "nothing.pt", "nothing.pt"):
        with pytest.raises(UserError, match=r"not found: .*nothing\.pt"):
            VQGAN.from_published(str(nothing))


def test_a_name_of_the_hub_is_a_repository_and_a_file(tmp_path, monkeypatch):
    model, state = llamagen()
    torch.save({"model": state}, tmp_path / "vq.pt")
    asked = []

    def download(*names):
        asked.append(names)
        if len(asked) > 1:
            raise ConnectionError("no route")
        return str(tmp_path / "vq.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = VQGAN.from_published("owner/repository/vq.pt", image_size=16)
    assert asked == [("owner/repository", "vq.pt")]
    assert torch.equal(loaded.tokenize(images()).ids, model.tokenize(images()).ids)
    with pytest.raises(UserError, match=r"owner/repository/other\.pt is neither a file nor .*: no route"):
        VQGAN.from_published("owner/repository/other.pt")


PUBLISHED = {
    # layout, config, parameters, tensors of the file without counters, some of its keys
    "VQ-16": (LLAMAGEN, {}, 71_883_403, 343, {"encoder.conv_blocks.4.attn.1.q.weight": (512, 512, 1, 1)}),
    "VQ-8": (
        LLAMAGEN,
        {"multipliers": (1, 2, 2, 4)},
        70_109_835,
        299,
        {"decoder.conv_blocks.0.res.2.conv1.weight": (512, 512, 3, 3)},
    ),
    "VAR": (
        VAR,
        {**VAR_CONFIG, "scales": vqgan_published.VAR_SCALES[16], "mode": "residual"},
        108_948_355,
        323,
        {"quantize.quant_resi.qresi_ls.3.weight": (32, 32, 3, 3), "decoder.up.4.attn.2.qkv.bias": (1920,)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_read_from_their_tensors(name):
    layout, args, parameters, tensors, some = PUBLISHED[name]
    with torch.device("meta"):
        model = VQGAN(Config(**args, codebook=CodebookOptions(normalized=layout is LLAMAGEN)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = published_keys(layout, len(model.config.multipliers)).to_published(model.state_dict())
    assert len(state) == tensors
    for key, shape in some.items():
        assert tuple(state[key].shape) == shape
    config, ours = read_state(state, name, 256)
    assert config == model.config
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_release_becomes_an_export(tmp_path, monkeypatch, capsys):
    model, state = llamagen()
    torch.save({"model": state}, tmp_path / "vq.pt")
    out = tmp_path / "export"
    command = ["published", "vqgan", str(tmp_path / "vq.pt"), "--out", str(out), "--image-size", "16"]
    monkeypatch.setattr("sys.argv", command)
    published_command()
    assert re.search("16 px, 64 tokens", capsys.readouterr().out)
    assert export_info(out)["weights"] == "published"
    assert torch.equal(load_tokenizer(out).tokenize(images()).ids, model.tokenize(images()).ids)
