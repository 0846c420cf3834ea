"""Feature networks: what FID, precision, recall and class accuracy look through.

* ``inception:PATH``: the 2015 TensorFlow Inception of the field's FID, from a weight file that the user has.
* ``digits``, ``shapes``: small classifiers of our own toy data, shipped with the package; they never saw a generator
  nor a held-out image (``python -m vistok.eval train-features`` makes them again).

Every network reads uint8 images of any size and resizes them itself, so that the resize belongs to its name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from vistok.errors import UserError
from vistok.files import load_weights
from vistok.key_maps import load_strictly

# TensorFloat-32, which cuDNN uses unless told otherwise, moves FID in its third digit.
_without_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_KEYS = 472


class FeatureNetwork(nn.Module, ABC):
    """Images to feature vectors, and to class logits where there are classes.

    Attributes:
        name: how reports call it.
        sha256: of its weight file.
        resize: how it brings images to its own size.
        num_features: F.
        num_spatial: S, or 0 without a layer for sFID.
        num_logits: K of :meth:`layers`, or 0 without classes for the Inception score.
        heads: number of classes of each classification head, by name; empty without classes.
    """

    name: str
    sha256: str
    resize: str
    num_features: int
    num_spatial: int = 0
    num_logits: int
    heads: dict[str, int]

    @property
    def identity(self) -> dict[str, str]:
        """What a protocol says about the network."""
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "dtype": "float32"}

    @abstractmethod
    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Feature vectors of uint8 images of any size."""

    def layers(self, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B ..."]]:
        """All that metrics look at, from one pass: ``pool`` ``(B, F)``; where the network has them, ``spatial``
        ``(B, S)`` for sFID and ``logits`` ``(B, K)`` for the Inception score."""
        pool = self.features(images)
        return {"pool": pool, **({"logits": self.logits(pool)["class"]} if self.num_logits else {})}

    def logits(self, features: Float[Tensor, "B F"]) -> dict[str, Float[Tensor, "B K"]]:
        """Logits of each head in ``heads``, from features."""
        return {}

    def count_right(self, features: Float[Tensor, "B F"], labels: Int[Tensor, " B"]) -> int:
        """How many images the head ``class`` takes for their label; 0 without that head."""
        if "class" not in self.heads:
            return 0
        return int((self.logits(features)["class"].argmax(1) == labels.to(features.device)).sum())


class SmallCNN(FeatureNetwork):
    """A classifier of toy images: stages of two convolutions, a mean over positions, one feature layer, linear heads.

    Args:
        name: how reports call it.
        size_px: images are resized to this side (bilinear with antialiasing).
        widths: channels of the stages; each stage halves the side.
        num_features: width of the feature layer. Features are taken before its non-linearity: nearer to a Gaussian.
        heads: number of classes of each head, by name.
    """

    def __init__(self, name: str, size_px: int, widths: tuple[int, ...], num_features: int, heads: dict[str, int]):
        super().__init__()
        self.name, self.size_px, self.num_features, self.heads = name, size_px, num_features, heads
        self.resize, self.num_logits = f"bilinear with antialiasing to {size_px} px", heads.get("class", 0)
        stages: list[nn.Module] = []
        for width_in, width in zip((3, *widths[:-1]), widths, strict=True):
            stages += [*_conv(width_in, width), *_conv(width, width), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages)
        self.feature_layer = nn.Linear(widths[-1], num_features)
        self.classifiers = nn.ModuleDict({head: nn.Linear(num_features, classes) for head, classes in heads.items()})

    @_without_tf32
    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Feature vectors of uint8 images of any size."""
        return self.from_pixels(images.float() / 127.5 - 1)

    def from_pixels(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Features of float images in [-1, 1]."""
        if images.shape[-2:] != (self.size_px, self.size_px):
            images = F.interpolate(images, (self.size_px, self.size_px), mode="bilinear", antialias=True)
        return self.feature_layer(self.stages(images).mean((2, 3)))

    def logits(self, features: Float[Tensor, "B F"]) -> dict[str, Float[Tensor, "B K"]]:
        """Logits of each head, from features."""
        return {head: layer(F.relu(features)) for head, layer in self.classifiers.items()}


class Inception(FeatureNetwork):
    """The Inception v3 of 2015-12-05 with 2048 pool features and TensorFlow 1's resize, as in ADM's evaluator.

    Args:
        path: torch-fidelity's weight file, checked before anything else reads it.

    Raises:
        UserError: if the file is missing or is not that file.
    """

    name = "inception"
    resize = "TensorFlow 1 bilinear to 299 px (no antialiasing, no half-pixel centres)"
    num_features = 2048
    spatial_channels = 7
    num_spatial = spatial_channels * 17 * 17
    num_logits = 1008

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.heads = {}
        self.sha256 = _check_inception_file(path)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        # The same function in fewer passes over memory; features move by rounding only.
        for block in self.network.modules():
            if isinstance(block, BasicConv2d):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        self.network.to(memory_format=torch.channels_last)

    def features(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2048"]:
        """Pool features."""
        return self.layers(images)["pool"]

    @_without_tf32
    def layers(self, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B ..."]]:
        """Pool features; ADM's spatial ones, the first 7 channels of ``mixed_6/conv`` after its ReLU, in the order
        rows, columns, channels; logits without bias."""
        found: list[Tensor] = []
        with self.network.Mixed_6d.branch1x1.register_forward_hook(lambda block, inputs, output: found.append(output)):
            pool, logits = self.network(images)
        spatial = found[0][:, : self.spatial_channels].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}


SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {
        "name": "digits-cnn",
        "size_px": 16,
        "widths": (32, 64, 128),
        "num_features": 64,
        "heads": {"class": 10},
    },
    "shapes": {
        "name": "shapes-cnn",
        "size_px": 32,
        "widths": (16, 32, 96),
        "num_features": 128,
        "heads": {"count": 3, "shape": 6, "color": 8, "size": 2},
    },
}
"""Arguments of the shipped :class:`SmallCNN` networks, by data set."""


def load_features(text: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network that ``--features`` names, in evaluation mode and without gradients.

    Args:
        text: "digits", "shapes" or "inception:PATH".
        device: where to put it.

    Raises:
        UserError: for an unknown name, or a weight file that is missing or not what it should be.
    """
    kind, _, path = text.partition(":")
    network: FeatureNetwork
    if kind == "inception":
        network = Inception(Path(path))
    elif text in SMALL_NETWORKS:
        network = load_small(text, WEIGHTS_FOLDER / f"{text}.safetensors")
    else:
        raise UserError(f"no feature network {text!r} (valid: {', '.join(SMALL_NETWORKS)}, inception:PATH)")
    return network.to(device).eval().requires_grad_(False)


def load_small(data: str, path: Path) -> SmallCNN:
    """The small network of a data set, from a weight file (stored in float16, computed in float32)."""
    network = SmallCNN(**SMALL_NETWORKS[data])
    load_strictly(network, load_weights(path), path)
    network.sha256 = sha256_of(path)
    return network.eval()


def _conv(width_in: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def _check_inception_file(path: Path) -> str:
    """SHA-256 of the weight file, once it is known to be the right one (torch-fidelity would unpickle anything)."""
    if not path.is_file():
        raise UserError(
            f"Inception weights not found at {str(path)!r}: get {INCEPTION_FILE} from the release v0.2.0 of "
            f"torch-fidelity (github.com/toshas/torch-fidelity) and give it as --features inception:PATH"
        )
    digest = sha256_of(path)
    if not digest.startswith(INCEPTION_SHA256_PREFIX):
        raise UserError(
            f"{path} is not {INCEPTION_FILE}: its SHA-256 starts with {digest[:8]}, not {INCEPTION_SHA256_PREFIX}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} holds more than weights, or is damaged: {type(error).__name__}") from None
    keys = [key for key in state if not key.endswith("num_batches_tracked")]
    if len(keys) != INCEPTION_KEYS or "fc.weight" not in state or state["fc.weight"].shape != (1008, 2048):
        raise UserError(f"{path} is not the 1008-class Inception: {len(keys)} tensors, expected {INCEPTION_KEYS}")
    return digest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
