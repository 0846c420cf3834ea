"""Every shipped YAML: it loads as it is, says what it should in its header, and trains two tiny steps on the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models.args import TINY_ARGS
from tiny_models.models import exported_tokenizer
from tiny_models.runs import ROOT, read_state
from tiny_models.text import WIDTH, save_t5
from tiny_models.vgg import vgg16_file
from vistok.checkpoint import export_info, load_autoencoder, load_generator
from vistok.config import Component
from vistok.training.run import train
from vistok.training.run_config import DataConfig, LogConfig, RunConfig, load_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OTHERS = {"tokenbridge": "tokenbridge", "next_scale": "tokenflow", "t2i": "tokenflow"}
"""Tokenizers under the configs of generators with such parts in their names."""
HEADER = ("python train.py --config {path}", "hardware:", "time:", "expected:", "verified:")


def tiny(kind: str, component: Component) -> Component:
    return Component(component.name, {**component.args, **TINY_ARGS[kind][component.name]})


def shrunk(config: RunConfig, output: Path) -> RunConfig:
    """The run at the size of a test: two updates of tiny models on digits, everything else as in the file."""
    if config.generator is None:
        tokenizer = tiny("tokenizers", Component(**config.tokenizer))
        config = replace(config, tokenizer={"name": tokenizer.name, "args": tokenizer.args})
    else:
        config = replace(config, generator=tiny("generators", config.generator))
    length = {"max_updates": 2, "max_images": None, "max_epochs": None}
    place = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "compile": False}
    trainer = replace(config.trainer, **length, **place, accumulate=1)
    perceptual, adversarial = config.perceptual, config.adversarial
    return replace(
        config,
        output=str(output),
        perceptual=perceptual and replace(perceptual, weights=str(vgg16_file())),
        adversarial=adversarial and replace(adversarial, start_update=1, layers=1, width=4),
        data=DataConfig("digits", batch_size=2),
        trainer=trainer,
        log=LogConfig(every_updates=1, pictures_every_updates=2),
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tiny tokenizers for the configs of generators: a trained FlexTok, and those of :data:`OTHERS`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "run.yaml").write_text(
        "tokenizer: {name: flextok}\ndata: {name: digits}\ntrainer: {max_updates: 2}\noutput: x"
    )
    train(shrunk(load_config(folder / "run.yaml", []), folder / "out"))
    others = {name: Path(exported_tokenizer(name).name) for name in OTHERS.values()}
    return {"flextok": folder / "out", **others}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A tiny text encoder for the configs that name one."""
    return save_t5(tmp_path_factory.mktemp("text") / "t5")


def load(path: Path, tokenizers: dict[str, Path], t5: Path) -> RunConfig:
    tokenizer = tokenizers[next((name for part, name in OTHERS.items() if part in path.stem), "flextok")]
    lines = path.read_text().splitlines()
    texts = f"width={WIDTH}" if "  name: bytes" in lines else f"path={t5}"
    changes = {"generator": f"tokenizer={tokenizer}", "text_encoder": f"text_encoder.args.{texts}"}
    return load_config(path, [change for key, change in changes.items() if f"{key}:" in lines])


def test_configs_are_shipped():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_trains_two_tiny_steps(path, tmp_path, tokenizers, t5):
    config = load(path, tokenizers, t5)
    train(shrunk(config, tmp_path / "run"))
    assert read_state(tmp_path / "run")["updates"] == 2
    assert list((tmp_path / "run" / "pictures").glob("*.png"))
    model = (load_autoencoder if config.generator is None else load_generator)(tmp_path / "run")
    assert model.spec == export_info(tmp_path / "run")["spec"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_header_says_command_hardware_time_expectation_and_what_was_verified(path):
    comments = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comments.append(line)
    header = "\n".join(comments)
    missing = [part for part in HEADER if part.format(path=path.relative_to(ROOT)) not in header]
    assert not missing, f"the header of {path} lacks {missing}"
