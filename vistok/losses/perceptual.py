"""LPIPS: how different two images look, by the features of a frozen VGG16.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018 (arXiv 1801.03924),
section 3, version 0.1. The heads are those that torchmetrics carries; the network's weights are a file of the user's.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor, nn
from torchvision.models import vgg16

from vistok.checkpoint import load_strictly, load_torch_file
from vistok.errors import UserError
from vistok.nn.frozen import Frozen

SOURCE = "torchvision's VGG16, vgg16-397923af.pth: VGG16_Weights.IMAGENET1K_V1"
LAYERS = (3, 8, 15, 22, 29)
"""The compared features of torchvision's VGG16: what leaves the last ReLU of each of its five stages."""
CHANNELS = (64, 128, 256, 512, 512)
MIN_IMAGE_SIZE_PX = 16
"""The last stage halves the side for the fourth time."""


@dataclass
class PerceptualConfig:
    """What LPIPS adds to the loss of a tokenizer.

    Args:
        weights: torchvision's weights of VGG16, ``vgg16-397923af.pth``.
        weight: factor on the distance.

    Raises:
        UserError: if the weight is not positive.
    """

    weights: str = MISSING
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(f"perceptual.weight must be positive (perceptual=null trains without), got {self.weight}")


class PerceptualLoss:
    """The weighted mean distance of a batch; its network is frozen and no part of who uses it.

    Args:
        config: see :class:`PerceptualConfig`.
        image_size: side of the images, px.

    Raises:
        UserError: as :func:`load_lpips`, or if the images are too small for the network.
    """

    def __init__(self, config: PerceptualConfig, image_size: int) -> None:
        if image_size < MIN_IMAGE_SIZE_PX:
            raise UserError(f"perceptual: LPIPS needs images of at least {MIN_IMAGE_SIZE_PX} px, got {image_size}")
        self.weight = config.weight
        self.lpips = Frozen(load_lpips(config.weights))

    def __call__(self, images: Float[Tensor, "B 3 H W"], targets: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """Float32, whatever the autocast; images in [-1, 1]."""
        with Frozen.exact(images.device):
            return self.weight * self.lpips.on(images.device)(images.float(), targets.float()).mean()


class LPIPS(nn.Module):
    """The distance; build it with :func:`load_lpips`, whose result has weights."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):  # neither the time nor the draws of weights that a file replaces
            self.features = vgg16().features
        self.features.to_empty(device="cpu")
        self.heads = nn.ParameterList(torch.empty(channels) for channels in CHANNELS)
        # As released: ImageNet's mean and standard deviation, for images in [-1, 1] and to three digits.
        for name, value in (("mean", (-0.030, -0.088, -0.188)), ("std", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distances of images in [-1, 1], at least 16 px: squared differences of unit features, weighted by channel."""
        distance = a.new_zeros(len(a))
        for head, x, y in zip(self.heads, self._stages(a), self._stages(b)):
            distance = distance + torch.einsum("bchw,c->bhw", (x - y).square(), head).mean((1, 2))
        return distance

    def _stages(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        """Features of each stage, of length 1 at every location."""
        x, stages = (images - self.mean) / self.std, []
        for index, layer in enumerate(self.features[: LAYERS[-1] + 1]):
            x = layer(x)
            if index in LAYERS:
                # The epsilon keeps the gradient finite where all channels are 0.
                stages.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return stages


def load_lpips(weights: str | Path) -> LPIPS:
    """LPIPS with the VGG16 of a file; nothing is downloaded.

    Args:
        weights: torchvision's weights of VGG16 (read without running anything in it); the classifier is left out.

    Raises:
        UserError: naming the file to supply if it is missing, unreadable or of another network.
    """
    lpips = LPIPS()
    heads = load_torch_file(str(files("torchmetrics.functional.image") / "lpips_models" / "vgg.pth"))
    try:
        published = load_torch_file(weights)
        if not isinstance(published, dict):
            raise UserError(f"{weights} holds no state dict")
        state = {key: value for key, value in published.items() if key.startswith("features.")}
        state |= {f"heads.{index}": heads[f"lin{index}.model.1.weight"].flatten() for index in range(len(CHANNELS))}
        load_strictly(lpips, state, weights)
    except UserError as error:
        raise UserError(f"perceptual.weights: {error}; supply {SOURCE}") from None
    return lpips.eval()
