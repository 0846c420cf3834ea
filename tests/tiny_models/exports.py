"""Exports of the shipped models at their smallest, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny_models.args import TINY_ARGS
from vistok.checkpoint import export, export_hash, load_tokenizer
from vistok.config import Component, build


def export_tokenizer(folder: Path, **args: Any) -> Path:
    """A FlexTok of 16 px images and 8 tokens."""
    component = Component("flextok", {**TINY_ARGS["tokenizers"]["flextok"], **args})
    model = _randomised(build("tokenizers", component), 0)
    export(folder, "tokenizer", component, model.spec, model.state_dict(), {"weights": "ema"})
    return folder


def export_generator(folder: Path, tokenizer: Path, class_names: list[str], **args: Any) -> Path:
    """A GPT of ten classes for the tokens of ``tokenizer``, which lies beside it."""
    component = Component("gpt", {**TINY_ARGS["generators"]["gpt"], **args})
    model = _randomised(build("generators", component, load_tokenizer(tokenizer).spec), 1)
    extra = {"tokenizer": f"../{tokenizer.name}", "tokenizer_hash": export_hash(tokenizer), "class_names": class_names}
    export(folder, "generator", component, model.spec, model.state_dict(), extra)
    return folder


def _randomised(model: nn.Module, seed: int) -> nn.Module:
    """Fresh heads are zero: every image and every distribution would be the same."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model
