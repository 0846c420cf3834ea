"""A file like torchvision's weights of VGG16, with random ones."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torchvision.models import vgg16


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Lasts as long as the tests."""
    folder = tempfile.TemporaryDirectory()
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in vgg16().features.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    # As strong as a trained network's, so that the last stage still sees something.
    weights = {
        key: torch.randn(shape, generator=rng) * (2 / max(1, shape[1:].numel())) ** 0.5 if len(shape) > 1
        else 0.1 * torch.randn(shape, generator=rng)
        for key, shape in shapes.items()
    }  # fmt: skip
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, Path(folder.name) / "vgg16-397923af.pth")
    return folder


def vgg16_file() -> Path:
    """The file."""
    return Path(_folder().name) / "vgg16-397923af.pth"
