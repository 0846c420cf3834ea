import importlib
import runpy
import sys
from functools import partial

import pytest
import torch

from tiny_models.runs import ROOT
from vistok.checkpoint import export, export_hash
from vistok.cli import main
from vistok.config import Component, build


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script at the root of the repository, or ``vistok.<room>``, in this process to save time.

    Gives exit code, stdout and stderr.
    """

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = 0
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                main(importlib.import_module(f"{name}.__main__").run)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def evaluate(run_script):
    """Runs ``python -m vistok.eval`` with some words, as :func:`run_script`."""
    return partial(run_script, "vistok.eval")


TOKENIZER = Component(
    "flextok",
    {
        "image_size": 16,
        "patch_size": 4,
        "num_registers": 4,
        "encoder_width": 16,
        "encoder_depth": 1,
        "decoder_width": 16,
        "decoder_depth": 1,
        "head_dim": 8,
        "fsq_levels": [4, 4],
        "steps": 2,
    },
)
GENERATOR = Component("gpt", {"width": 16, "depth": 1, "heads": 2, "num_classes": 10, "mlp_multiple": 8})


def randomise(model, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = build("tokenizers", TOKENIZER)
    randomise(tokenizer, 0)
    export(folder / "tokenizer", "tokenizer", TOKENIZER, tokenizer.spec, tokenizer.state_dict(), {"weights": "ema"})
    generator = build("generators", GENERATOR, tokenizer.spec)
    randomise(generator, 1)
    extra = {"weights": "ema", "tokenizer": "../tokenizer", "tokenizer_hash": export_hash(folder / "tokenizer")}
    export(folder / "generator", "generator", GENERATOR, generator.spec, generator.state_dict(), extra)
    return folder


@pytest.fixture
def questions(tmp_path):
    """Of DPG-Bench's form: the colour of a circle depends on there being one."""
    file = tmp_path / "dpg_bench.csv"
    file.write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n"
        "circle,a red circle,,1,0,entity,whole,entity - whole (circle),Is there a hat?\n"
        "circle,a red circle,,2,1,attribute,color,attribute - color (circle; red),Is the hat red?\n"
        "square,a small square,,1,0,entity,whole,entity - whole (square),Is there a cup?\n"
    )
    return file
