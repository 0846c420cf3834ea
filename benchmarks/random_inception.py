"""An Inception with random weights, for benchmarks and tests: the published file cannot ship with either."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _AsDrawn(FeatureExtractorInceptionV3):
    def load_state_dict(self, *_: Any, **__: Any) -> None:
        """Keep the weights that the constructor has drawn."""


def write_random_inception(path: Path, images: Tensor) -> Path:
    """A weight file in the published layout; returns ``path``.

    Args:
        path: of the file.
        images: uint8 ``(B, 3, H, W)`` whose statistics normalise every layer, so that features differ between images
            (with fresh weights they are all but constant).
    """
    torch.save({}, path)  # the constructor reads a file, whatever becomes of it
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = _AsDrawn("inception-v3-compat", ["2048"], str(path))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(images)
    torch.save(dict(network.state_dict()), path)
    return path
