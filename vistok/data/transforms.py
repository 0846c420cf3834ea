"""From a decoded image to a training sample: the crops of the field, flips, and the way to a tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

_MIN_CROP_FRACTION = 0.8


def center_crop(image: Image.Image, size_px: int) -> Image.Image:
    """The middle square of an image whose shorter side becomes ``size_px``.

    Same rule as ``center_crop_arr`` of ADM (Dhariwal & Nichol, 2021), so that statistics compare with theirs: halve
    by box filter while the shorter side is at least twice the target, then one bicubic step, which also enlarges
    images that are too small.
    """
    image = _resize_shorter_side(image, size_px)
    return _crop(image, (image.width - size_px) // 2, (image.height - size_px) // 2, size_px)


def random_crop(image: Image.Image, size_px: int, rng: torch.Generator) -> Image.Image:
    """A square at a random place of the image whose shorter side becomes ``size_px`` to ``size_px / 0.8`` (ADM)."""
    shorter_px = _draw(size_px, math.ceil(size_px / _MIN_CROP_FRACTION), rng)
    image = _resize_shorter_side(image, shorter_px)
    left, top = _draw(0, image.width - size_px, rng), _draw(0, image.height - size_px, rng)
    return _crop(image, left, top, size_px)


def random_resized_crop(image: Image.Image, size_px: int, min_side: float, rng: torch.Generator) -> Image.Image:
    """A square at a random place, its side ``min_side`` to all of the shorter side, resized to ``size_px``."""
    shorter_px = min(image.size)
    side_px = _draw(math.ceil(min_side * shorter_px), shorter_px, rng)
    left, top = _draw(0, image.width - side_px, rng), _draw(0, image.height - side_px, rng)
    return _resize_shorter_side(_crop(image, left, top, side_px), size_px)


def random_flip(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """The image or its mirror image, with equal probability."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _draw(0, 1, rng) else image


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """An RGB image as float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1).contiguous()


def _resize_shorter_side(image: Image.Image, size_px: int) -> Image.Image:
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size_px / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, left: int, top: int, size_px: int) -> Image.Image:
    return image.crop((left, top, left + size_px, top + size_px))


def _draw(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))
