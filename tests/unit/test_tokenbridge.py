"""Any latent tokenizer with codes: composition, export, and the command that fits it."""

import json
import shutil

import pytest
import torch

from tiny_models.models import exported_tokenizer, make_tokenizer
from vistok.checkpoint import export, export_hash, export_info, load_autoencoder, load_tokenizer
from vistok.config import Component, build, read_yaml, to_plain, to_yaml
from vistok.data.datamodule import load_data
from vistok.discretize import main as discretize
from vistok.errors import UserError
from vistok.quantizers.dimensionwise import DimensionwiseQuantizer, spectral_order
from vistok.tokenizers.tokenbridge import Config


def images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_encode_then_quantize_then_decode():
    bridge, latent = make_tokenizer("tokenbridge"), make_tokenizer("klvae")
    latents = latent.encode(images())
    bridge.quantizer.fit(latents, "gaussian")
    tokens = bridge.tokenize(images())
    assert torch.equal(tokens.ids, bridge.quantizer.quantize(latents))
    values = bridge.quantizer.decode(tokens.ids)
    assert torch.equal(bridge.embed(tokens), values)
    assert torch.equal(bridge.decode(tokens), latent.decode(values))
    assert torch.equal(bridge.decode(latents), latent.decode(latents))
    assert not list(bridge.parameters())
    assert set(bridge.state_dict()) == {"order", "quantizer.levels", "quantizer.midpoints"}


def test_slots_stand_in_the_order_and_latents_in_their_own():
    bridge = make_tokenizer("tokenbridge")
    natural = bridge.tokenize(images())
    bridge.set_order([2, 0, 1])
    ordered = bridge.tokenize(images())
    assert torch.equal(ordered.ids, natural.ids[..., [2, 0, 1]])
    restored = bridge.embed(ordered)
    bridge.set_order([0, 1, 2])
    assert torch.equal(restored, bridge.embed(natural))
    for wrong in ([0, 1], [0, 1, 1], [1, 2, 3], range(4)):
        with pytest.raises(UserError, match="each of 3 channels once"):
            bridge.set_order(wrong)


@pytest.fixture
def fitted(tmp_path, monkeypatch, capsys):
    """Runs the command, with more flags; returns the folder that it wrote and what it printed."""

    def run(*changes, out="bridge", tokenizer=None):
        folder = tokenizer or exported_tokenizer("klvae").name
        words = ["--tokenizer", str(folder), "--data", "digits", "--out", str(tmp_path / out), "--count", "48"]
        monkeypatch.setattr("sys.argv", ["discretize", *words, "--levels", "8", "--device", "cpu", *changes])
        discretize()
        return tmp_path / out, capsys.readouterr().out

    return run


def test_the_command_fits_measures_and_exports(fitted):
    folder, printed = fitted("--mode", "lloyd_max")
    info, bridge, latent = (
        export_info(folder),
        load_tokenizer(folder),
        load_autoencoder(exported_tokenizer("klvae").name),
    )
    assert (info["fit"]["mode"], info["fit"]["order"], info["fit"]["images"]) == ("lloyd_max", "spectral", 48)

    train, val = (torch.stack([data.get(index)["image"] for index in range(48)]) for data in
                  (load_data("digits", split, 16) for split in ("train", "val")))  # fmt: skip
    latents = latent.encode(train)
    expected = DimensionwiseQuantizer(3, 8)
    expected.fit(latents, "lloyd_max")
    torch.testing.assert_close(bridge.quantizer.levels, expected.levels)
    assert torch.equal(bridge.order, spectral_order(latents.unflatten(1, (8, 8))))
    held_out = latent.encode(val)
    squared = (bridge.embed(bridge.tokenize(val)) - held_out).square()
    assert info["held_out"]["mse"] == pytest.approx(squared.mean().item(), rel=1e-4)
    share = bridge.tokenize(val).ids[..., 0].flatten().bincount(minlength=8) / (48 * 64)
    bits = -torch.special.xlogy(share, share).sum().item() / torch.log(torch.tensor(2.0)).item()
    row = next(line for line in printed.splitlines() if line.startswith("│ 0 ") or " 0 │" in line)
    assert f"{bits:.2f}" in row and f" {bridge.order[0]} " in row and "48 held-out images" in printed


def test_better_tables_cost_less(fitted):
    costs = {mode: export_info(fitted("--mode", mode, out=mode)[0])["held_out"] for mode in ("uniform", "lloyd_max")}
    assert costs["lloyd_max"]["mse_over_variance"] < costs["uniform"]["mse_over_variance"]
    assert all(0 < cost["entropy_bits"] <= 3 for cost in costs.values())


def test_published_table_and_natural_order_change_nothing(fitted):
    folder, _ = fitted("--mode", "published", "--order", "natural")
    bridge, fresh = load_tokenizer(folder), make_tokenizer("tokenbridge")
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in bridge.state_dict().items())


def test_an_export_carries_its_tokenizer_and_can_be_moved_and_copied(fitted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported_tokenizer("klvae").name, run)
    (run / "last.ckpt").write_text("what a run leaves beside its export")
    folder, _ = fitted(tokenizer=run)
    before = load_tokenizer(folder)
    tokens, decoded = before.tokenize(images()), before.decode(before.tokenize(images()))
    shutil.rmtree(run)
    assert sorted(path.name for path in (folder / "tokenizer").iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "spec.json",
    ]
    moved = folder.rename(tmp_path / "moved")
    loaded = load_tokenizer(moved)
    assert torch.equal(loaded.tokenize(images()).ids, tokens.ids) and torch.equal(loaded.decode(tokens), decoded)
    component = Component("tokenbridge", to_plain(loaded.config))
    export(tmp_path / "again", "tokenizer", component, loaded.spec, loaded.state_dict(), helpers=loaded.frozen_helpers)
    shutil.rmtree(moved)
    assert torch.equal(load_tokenizer(tmp_path / "again").tokenize(images()).ids, tokens.ids)


def test_the_hash_follows_the_tokenizer_inside(fitted):
    folder, _ = fitted()
    before = export_hash(folder)
    weights = folder / "tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert export_hash(folder) != before


def test_another_tokenizer_than_the_fitted_one_is_refused(fitted):
    folder, _ = fitted()
    inside = folder / "tokenizer"
    other = make_tokenizer("klvae")
    torch.nn.init.ones_(other.vae.quant_conv.bias)
    info = export_info(inside)
    export(inside, "tokenizer", Component(info["name"], info["args"]), other.spec, other.state_dict())
    with pytest.raises(UserError, match=r"not the tokenizer that the quantizer was fitted for \(hash .*discretize"):
        load_tokenizer(folder)
    shutil.rmtree(inside)
    with pytest.raises(UserError, match=r"not found: .*tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_of_another_width_is_refused(tmp_path, fitted):
    folder, _ = fitted()
    component = Component("klvae", {**export_info(folder / "tokenizer")["args"], "latent_channels": 5})
    other = build("tokenizers", component)
    export(tmp_path / "other", "tokenizer", component, other.spec, other.state_dict())
    config = read_yaml(folder / "config.yaml")
    config["args"] |= {"tokenizer": str(tmp_path / "other"), "tokenizer_hash": None}
    (folder / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match=r"levels is \(3, 8\), expected \(5, 8\)"):
        load_tokenizer(folder)


def test_what_has_codes_or_no_folder_is_refused(tmp_path, fitted):
    flextok = make_tokenizer("flextok")
    component = Component("flextok", to_plain(flextok.config))
    export(tmp_path / "flextok", "tokenizer", component, flextok.spec, flextok.state_dict())
    with pytest.raises(UserError, match="discrete already"):
        fitted(tokenizer=tmp_path / "flextok")
    with pytest.raises(UserError, match="missing value for tokenizer"):
        build("tokenizers", Component("tokenbridge", {}))
    with pytest.raises(UserError, match="not found"):
        build("tokenizers", Component("tokenbridge", to_plain(Config(str(tmp_path / "nothing")))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--levels", "1"], r"must lie in 2\.\.740, got 1"),
        (["--order", "published"], "each of 3 channels once"),
        (["--mode", "linear"], "invalid choice: 'linear'"),
        (["--cutoff", "0", "--drop-dc"], "no frequency of a 8 x 8 grid"),
        (["--data-args", "nonsense=1"], "nonsense"),
    ],
)
def test_flags_that_cannot_be_leave_nothing_behind(fitted, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        fitted(*flags)
    assert not (tmp_path / "bridge").exists()


@pytest.mark.parametrize("mode", ["gaussian", "published"])
@pytest.mark.parametrize(
    ("bias", "message"), [(0.0, "channel 1 is constant"), (torch.nan, "channel 1 holds values that are not finite")]
)
def test_a_channel_without_a_distribution_is_named(fitted, tmp_path, mode, bias, message):
    model = make_tokenizer("klvae")
    torch.nn.init.zeros_(model.vae.quant_conv.weight.data[1])
    torch.nn.init.constant_(model.vae.quant_conv.bias.data[1], bias)
    component = Component("klvae", to_plain(model.config))
    export(tmp_path / "dead", "tokenizer", component, model.spec, model.state_dict())
    with pytest.raises(UserError, match=message):
        fitted("--mode", mode, tokenizer=tmp_path / "dead")
    assert not (tmp_path / "bridge").exists()


def test_an_export_is_not_overwritten(fitted):
    folder, _ = fitted()
    before = json.loads((folder / "spec.json").read_text())
    with pytest.raises(UserError, match="exists already"):
        fitted("--mode", "uniform")
    assert json.loads((folder / "spec.json").read_text()) == before


def test_components_are_slots_of_their_own_and_come_back_as_latents(fitted):
    folder, printed = fitted("--components", "2")
    assert "2 components with" in printed
    bridge, latent = load_tokenizer(folder), make_tokenizer("klvae")
    tokens = bridge.tokenize(images())
    assert tokens.ids.shape == (4, bridge.spec.num_positions, 2) and bridge.spec.latent_dim == 3
    latents = latent.encode(images())
    torch.testing.assert_close(bridge.basis.T @ bridge.basis, torch.eye(2))
    values = bridge.quantizer.decode(bridge.quantizer.quantize(bridge.project(latents)))
    torch.testing.assert_close(bridge.embed(tokens), values @ bridge.basis.T + bridge.center)
    assert bridge.decode(tokens).shape == images().shape


def test_all_components_lose_nothing_and_come_by_variance():
    folder = exported_tokenizer("klvae").name
    bridge = build("tokenizers", Component("tokenbridge", {"tokenizer": folder, "components": 3}))
    latents = torch.randn(500, 3) * torch.tensor([1.0, 5.0, 2.0]) + 3
    bridge.fit_components(latents)
    torch.testing.assert_close(bridge.expand(bridge.project(latents)), latents, atol=1e-4, rtol=1e-4)
    variances = bridge.project(latents).var(dim=0)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)
    torch.testing.assert_close(bridge.project(latents).mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("components", [0, 4])
def test_more_components_than_channels_are_refused(components):
    folder = exported_tokenizer("klvae").name
    with pytest.raises(UserError, match=r"components must lie in 1\.\.3"):
        build("tokenizers", Component("tokenbridge", {"tokenizer": folder, "components": components}))
