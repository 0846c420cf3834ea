"""How alike two images look to a pretrained network: LPIPS, and the cosine of image features (DINOv2, CLIP, ...).

The weights are files of the user's; each figure names its network, and its definition the network's hash.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vistok.checkpoint import module_hash
from vistok.errors import UserError
from vistok.eval.pretrained import from_folder, load_pretrained, summary_of, whole_hash
from vistok.losses.perceptual import BACKBONES, Net, load_lpips
from vistok.nn.vision_teacher import load_model

_without_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@dataclass(frozen=True)
class Comparison:
    """A figure of each pair of an original and its reconstruction.

    Args:
        name: in tables and results.
        definition: which variant it is, with the SHA-256 of its weights.
        function: originals and reconstructions, uint8 ``(B, 3, H, W)``, to ``(B,)``.
    """

    name: str
    definition: str
    function: Callable[[UInt8[Tensor, "B 3 H W"], UInt8[Tensor, "B 3 H W"]], Float[Tensor, " B"]]


def lpips(text: str, image_size_px: int, device: torch.device | str = "cpu") -> Comparison:
    """LPIPS, see :mod:`vistok.losses.perceptual`; lower is better.

    Args:
        text: ``alex:FILE`` or ``vgg:FILE``, torchvision's weights of that network.
        image_size_px: side of the images.
        device: where to put it.

    Raises:
        UserError: naming the file to supply if it is missing or another, or if the images are too small.
    """
    net, _, path = text.partition(":")
    if net not in BACKBONES or not path:
        valid = ", or ".join(f"{name}:FILE with {backbone.source}" for name, backbone in BACKBONES.items())
        raise UserError(f"--lpips: give {valid}, got {text!r}")
    try:
        network = load_lpips(path, cast(Net, net), image_size_px).to(device).requires_grad_(False)
    except UserError as error:
        raise UserError(str(error).replace("perceptual.weights", "--lpips").replace("perceptual", "--lpips")) from None

    @_without_tf32
    def distance(originals: UInt8[Tensor, "B 3 H W"], decoded: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        return network(originals / 127.5 - 1, decoded / 127.5 - 1)

    return Comparison(f"LPIPS ({net})", f"version 0.1, network and heads {module_hash(network)}", distance)


def cosine(text: str, device: torch.device | str = "cpu") -> Comparison:
    """Cosine of the features of both images, one vector each; 1 is best.

    Args:
        text: folder of a CLIP, SigLIP, DINOv2 or another image model of transformers, read with its own
            preprocessing; or ``NAME=FILE``, a vision transformer of timm such as
            ``vit_small_patch14_dinov2.lvd142m=dinov2_vits14.pth``, whose images are resized to its size (bicubic with
            antialiasing).
        device: where to put it.

    Raises:
        UserError: saying what to supply if the folder or file is missing or another.
    """
    name, _, file = text.partition("=")
    digest, features = _of_timm(name, file, device) if file else _of_transformers(text, device)

    @_without_tf32
    def similarity(originals: UInt8[Tensor, "B 3 H W"], decoded: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        with torch.no_grad():
            return F.cosine_similarity(features(originals), features(decoded))

    name = Path(name).name
    return Comparison(f"cosine ({name} features)", f"mean over images, weights and preprocessing {digest}", similarity)


Features = Callable[[UInt8[Tensor, "B 3 H W"]], Float[Tensor, "B D"]]


def _of_timm(name: str, file: str, device: torch.device | str) -> tuple[str, Features]:
    try:
        model = load_model(name, file, num_classes=0).to(device).eval()
    except UserError as error:
        raise UserError(f"--similarity: {error}") from None
    mean, std = (torch.tensor(model.pretrained_cfg[part], device=device).view(3, 1, 1) for part in ("mean", "std"))

    def features(images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        resized = F.interpolate(images / 255, model.patch_embed.img_size, mode="bicubic", antialias=True)
        return model((resized - mean) / std)

    return module_hash(model, mean.tolist(), std.tolist()), features


def _of_transformers(folder: str, device: torch.device | str) -> tuple[str, Features]:
    from transformers import AutoImageProcessor, AutoModel

    model = load_pretrained(AutoModel, folder, "--similarity", device)
    processor = from_folder(AutoImageProcessor, folder, "--similarity")
    # Of a model of images and texts, the space that both share.
    embed = getattr(model, "get_image_features", model)

    def features(images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        inputs = processor(images=list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        return summary_of(embed(**inputs.to(device)))

    return whole_hash(model, processor), features
