"""Files like torchvision's weights of VGG16 and AlexNet, with random ones."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torchvision.models import alexnet, vgg16


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Lasts as long as the tests."""
    return tempfile.TemporaryDirectory()


@cache
def _file(make: Any, name: str) -> Path:
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in make().features.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    # As strong as a trained network's, so that the last stage still sees something.
    weights = {
        key: torch.randn(shape, generator=rng) * (2 / max(1, shape[1:].numel())) ** 0.5 if len(shape) > 1
        else 0.1 * torch.randn(shape, generator=rng)
        for key, shape in shapes.items()
    }  # fmt: skip
    path = Path(_folder().name) / name
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def vgg16_file() -> Path:
    """The file of VGG16."""
    return _file(vgg16, "vgg16-397923af.pth")


def alexnet_file() -> Path:
    """The file of AlexNet."""
    return _file(alexnet, "alexnet-owt-7be5be79.pth")
