"""LPIPS: how different two images look, by the features of a frozen VGG16 or AlexNet.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018 (arXiv 1801.03924),
section 3, version 0.1. The heads are those that torchmetrics carries; the network's weights are a file of the user's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor, nn
from torchvision.models import alexnet, vgg16

from vistok.errors import UserError
from vistok.key_maps import load_strictly, load_torch_file
from vistok.nn.frozen import Frozen
from vistok.nn.precision import exact

Net = Literal["vgg", "alex"]


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision that LPIPS looks through.

    Args:
        make: builds it.
        source: the weights file to supply.
        layers: the compared features: what leaves the last ReLU of each of its five stages.
        channels: of these features.
        min_image_size_px: below it a stage has nothing left.
    """

    make: Callable[[], nn.Module]
    source: str
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    min_image_size_px: int


BACKBONES: dict[Net, Backbone] = {
    "vgg": Backbone(
        vgg16,
        "torchvision's VGG16, vgg16-397923af.pth: VGG16_Weights.IMAGENET1K_V1",
        layers=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        min_image_size_px=16,
    ),
    "alex": Backbone(
        alexnet,
        "torchvision's AlexNet, alexnet-owt-7be5be79.pth: AlexNet_Weights.IMAGENET1K_V1",
        layers=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        min_image_size_px=31,
    ),
}


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
        self.weight = config.weight
        self.lpips = Frozen(load_lpips(config.weights, image_size=image_size))

    def __call__(self, images: Float[Tensor, "B 3 H W"], targets: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """Float32, whatever the autocast; images in [-1, 1]."""
        with exact(images.device):
            return self.weight * self.lpips.on(images.device)(images.float(), targets.float()).mean()


class LPIPS(nn.Module):
    """The distance; build it with :func:`load_lpips`, whose result has weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.layers = backbone.layers
        with torch.device("meta"):  # neither the time nor the draws of weights that a file replaces
            network: Any = backbone.make()
        self.features = network.features[: self.layers[-1] + 1].to_empty(device="cpu")
        self.heads = nn.ParameterList(torch.empty(channels) for channels in backbone.channels)
        # As released: ImageNet's mean and standard deviation, for images in [-1, 1] and to three digits.
        for name, value in (("mean", (-0.030, -0.088, -0.188)), ("std", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distances of images in [-1, 1]: squared differences of unit features, weighted by channel."""
        distance = a.new_zeros(len(a))
        for head, x, y in zip(self.heads, self._stages(a), self._stages(b)):
            distance = distance + torch.einsum("bchw,c->bhw", (x - y).square(), head).mean((1, 2))
        return distance

    def _stages(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B C h w"]]:
        """Features of each stage, of length 1 at every location."""
        x, stages = (images - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.layers:
                # The epsilon keeps the gradient finite where all channels are 0.
                stages.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return stages


def load_lpips(weights: str | Path, net: Net = "vgg", image_size: int | None = None) -> LPIPS:
    """LPIPS with the network of a file; nothing is downloaded.

    Args:
        weights: torchvision's weights of the network (read without running anything in it); the classifier is left out.
        net: which network it is; papers report either, and they differ.
        image_size: side of the images that it will compare, px.

    Raises:
        UserError: naming the file to supply if it is missing, unreadable or of another network; or if the images are
            too small for it.
    """
    backbone = BACKBONES[net]
    if image_size is not None and image_size < (least := backbone.min_image_size_px):
        raise UserError(f"perceptual: LPIPS by {net} needs images of at least {least} px, got {image_size}")
    lpips = LPIPS(backbone)
    heads = load_torch_file(str(files("torchmetrics.functional.image") / "lpips_models" / f"{net}.pth"))
    try:
        published = load_torch_file(weights)
        if not isinstance(published, dict):
            raise UserError(f"{weights} holds no state dict")
        state = {key: value for key, value in published.items() if key.startswith("features.")}
        state |= {f"heads.{index}": heads[f"lin{index}.model.1.weight"].flatten() for index in range(len(lpips.heads))}
        load_strictly(lpips, state, weights)
    except UserError as error:
        raise UserError(f"perceptual.weights: {error}; supply {backbone.source}") from None
    return lpips.eval()
