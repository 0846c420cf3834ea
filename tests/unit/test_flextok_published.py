"""Released FlexTok files: read strictly, from literals only, and back."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from vistok.checkpoint import export_info, load_tokenizer
from vistok.errors import UserError
from vistok.published import main as published_command
from vistok.rng import SampleRng
from vistok.tokenizers.flextok import Config, FlexTok
from vistok.tokenizers.flextok_published import PUBLISHED_KEYS, from_state

CASES = Path(__file__).parents[1] / "parity" / "cases" / "flextok"
LAYOUTS = json.loads((CASES / "d12_d12.json").read_text())["published_layouts"]
VAE_KEYS = json.loads((CASES / "vae16.json").read_text())["keys"]
CONFIG = {
    "vae": {"_target_": "flextok.VAE", "scaling_factor": 0.5, "sample_posterior": True},
    "encoder": {"module_dict": {"enc_transformer": {"head_dim": 16}}},
    "decoder": {
        "module_dict": {
            "dec_nested_dropout": {"size_sampling_mode": "pow2"},
            "dec_latent_dropout": {"dropout_prob": 0.2},
            "dec_time_embedder": {"max_timestep": 1.0},
            "dec_transformer": {"head_dim": 16},
        }
    },
    "regularizer": {"levels": [8, 5, 5], "drop_quant_p": 0.0},
    "flow_matching_noise_module": {"ln": False, "mode_scale": 0.25},
    "pipeline": {"_target_": "flextok.Pipeline"},
}


def expanded(patterns):
    """``a.{0..2}.b`` -> ``a.0.b``, ``a.1.b``, ``a.2.b``."""
    for pattern, shape in patterns.items():
        ranges = [range(int(last) + 1) for last in re.findall(r"\{0\.\.(\d+)\}", pattern)]
        for numbers in itertools.product(*ranges):
            key = pattern
            for number in numbers:
                key = re.sub(r"\{0\.\.\d+\}", str(number), key, count=1)
            yield key, shape


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_whole_key_list_of_a_released_size_loads_and_comes_back(name):
    layout = LAYOUTS[name]
    config = json.loads(json.dumps(CONFIG))
    config["decoder"]["module_dict"]["dec_transformer"] = {}
    config["regularizer"]["levels"] = [8, 8, 8, 5, 5, 5]
    with torch.device("meta"):
        own = {key: torch.empty(shape) for key, shape in expanded(layout["patterns"])}
        vae = {key: torch.empty(shape) for key, shape in VAE_KEYS.items()}
        model = from_state(own | vae, config, name)
    assert len(own) == layout["tensors"] and len(vae) == 248
    assert sum(value.numel() for value in model.state_dict().values()) == layout["parameters"]
    back = PUBLISHED_KEYS.to_published(model.state_dict())
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in own.items()}
    assert (model.spec.image_size_px, model.spec.num_positions, model.spec.vocab_sizes) == (256, 256, (64000,))
    assert (model.vae_scale, model.config.keep, model.config.null_probability) == (0.5, "pow2", 0.2)
    assert model.decode_defaults == {"steps": 25, "guidance": 7.5, "apg": True}


@pytest.fixture
def published(tmp_path):
    """A tiny file in the published layout, with its config beside it, and the model it was made of."""
    torch.manual_seed(0)
    blocks = {
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, scaling_factor=0.5, **blocks)
    sizes = {"encoder_width": 32, "encoder_depth": 1, "decoder_width": 32, "decoder_depth": 2, "head_dim": 16}
    model = FlexTok(Config(image_size=16, num_registers=8, fsq_levels=(8, 5, 5), **sizes), vae).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = PUBLISHED_KEYS.to_published(model.state_dict())
    state |= {f"vae.vae.{key}": value for key, value in vae.state_dict().items()}
    state = {key: value.contiguous().clone() for key, value in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG, sort_keys=True))
    return tmp_path, model, state


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("place", ["folder", "header"])
def test_a_published_file_gives_the_same_tokens_and_images(published, tmp_path, place):
    folder, model, state = published
    path = folder
    if place == "header":
        (folder / "config.json").unlink()
        path = folder / "model.safetensors"
        save_file(state, path, {key: repr(value) for key, value in CONFIG.items()} | {"_target_": "flextok.FlexTok"})
    loaded = FlexTok.from_published(str(path))
    assert not loaded.training
    tokens = model.tokenize(images())
    assert torch.equal(loaded.tokenize(images()).ids, tokens.ids)
    options = {"steps": 2, "guidance": 3.0, "apg": True}
    pictures = [m.decode(tokens.prefix(3), SampleRng.from_seed(0, 2), **options) for m in (model, loaded)]
    torch.testing.assert_close(*pictures)


@pytest.mark.parametrize(
    ("part", "module", "key"),
    [
        ("decoder", "dec_time_embedder", "max_timestep"),
        ("decoder", "dec_nested_dropout", "size_sampling_mode"),
        ("decoder", "dec_latent_dropout", "dropout_prob"),
        ("flow_matching_noise_module", None, "mode_scale"),
        ("flow_matching_noise_module", None, "ln"),
        ("vae", None, "scaling_factor"),
        ("regularizer", None, "levels"),
    ],
)
def test_a_value_that_the_config_lacks_is_named(published, part, module, key):
    folder, _, _ = published
    config = json.loads(json.dumps(CONFIG))
    (config[part]["module_dict"][module] if module else config[part]).pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"does not state {part}: .*{key}"):
        FlexTok.from_published(str(folder))


def test_a_config_of_another_version_is_refused(published):
    folder, _, _ = published
    (folder / "config.json").write_text(json.dumps({"model": {}, "vae": {}}))
    with pytest.raises(UserError, match=r"lacks encoder, decoder, .*: not a version"):
        FlexTok.from_published(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="lacks vae, encoder"):
        FlexTok.from_published(str(folder))


def test_the_config_is_data_and_never_run(published, tmp_path):
    folder, _, _ = published
    call = f"__import__('pathlib').Path({str(tmp_path / 'run')!r}).touch()"
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vae": call}))
    with pytest.raises(UserError, match="config is not readable"):
        FlexTok.from_published(str(folder))
    assert not (tmp_path / "run").exists()


def test_the_load_is_strict(published):
    folder, _, state = published
    path = folder / "model.safetensors"
    registers = "encoder.module_dict.enc_register_module.registers"
    without = {key: value for key, value in state.items() if not key.endswith("dec_to_patches.proj.bias")}
    wrong = {
        "missing .*decoder.head.bias": without,
        "unknown key.*surprise": state | {"decoder.surprise": torch.zeros(1)},
        "no VAE": {key: value for key, value in state.items() if not key.startswith("vae.")},
        r"decoder\.head\.bias is \(3,\)": state | {"decoder.module_dict.dec_to_patches.proj.bias": torch.zeros(3)},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(UserError, match=message):
            FlexTok.from_published(str(folder))
    save_file(state | {"decoder.module_dict.dec_repa_head.weight": torch.zeros(1)}, path)
    with pytest.warns(UserWarning, match="dec_repa_head"):
        loaded = FlexTok.from_published(str(folder))
    assert torch.equal(loaded.encoder.registers, state[registers])


def test_a_release_becomes_an_export(published, tmp_path, monkeypatch, capsys):
    folder, model, _ = published
    out = tmp_path / "export"
    monkeypatch.setattr("sys.argv", ["published", "flextok", str(folder), "--out", str(out)])
    published_command()
    assert "16 px, 8 tokens" in capsys.readouterr().out
    loaded = load_tokenizer(out)
    assert torch.equal(loaded.tokenize(images()).ids, model.tokenize(images()).ids)
    assert (export_info(out)["weights"], loaded.decode_defaults["apg"]) == ("published", True)
    with pytest.raises(UserError, match="exists"):
        published_command()


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.safetensors"):
        with pytest.raises(UserError, match="not found"):
            FlexTok.from_published(str(path))
