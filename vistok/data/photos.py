"""``photos``: crops of the sample photographs that scikit-learn and scikit-image bring along, for reconstruction.

Thirteen pictures are no data set to learn the world from; they are real pixels that need no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from PIL import Image

from vistok.data.transforms import random_flip, random_resized_crop, to_tensor
from vistok.errors import UserError
from vistok.rng import seeded_generator

TRAIN = {
    "skimage.data": ("astronaut.png", "brick.png", "coins.png", "grass.png", "gravel.png", "ihc.png", "retina.jpg"),
    "sklearn.datasets.images": ("flower.jpg",),
}
VAL = {
    "skimage.data": ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn.datasets.images": ("china.jpg",),
}
"""Held out as whole pictures."""


@dataclass
class Config:
    """How many crops there are, and how they are taken.

    Args:
        count: crops of an epoch, and as many of the validation split as a tenth of it.
        min_side: side of the smallest crop, as a share of the picture's shorter side; each is resized to the image.
        flip: mirror half of the training crops.
    """

    count: int = 10_000
    min_side: float = 0.25
    flip: bool = True


class Photos:
    """Crop ``index`` of a split: its picture is ``index`` modulo their number, its place and size are drawn.

    Without a generator the draws are those that the index names, so that the held-out crops are always the same.

    Args:
        config: see :class:`Config`.
        split: ``train`` or ``val``.
        image_size_px: side of the images.

    Raises:
        UserError: for a number out of range.
    """

    num_classes = 0

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        if config.count < 10 or not 0 < config.min_side <= 1:
            raise UserError("photos: count must be at least 10 and min_side lie in (0, 1]")
        self.config, self.split, self.image_size_px = config, split, image_size_px
        self.class_names: list[str] = []
        sources = TRAIN if split == "train" else VAL
        self.names = [name for names in sources.values() for name in names]
        self.pictures = [_read(package, name) for package, names in sources.items() for name in names]
        self.count = config.count if split == "train" else config.count // 10
        self.description = {
            "name": "photos",
            "split": split,
            "count": self.count,
            "image_size_px": image_size_px,
            "min_side": config.min_side,
        }

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Sample ``index``; its crop is drawn from ``rng``, or fixed if that is None."""
        number = index % len(self.pictures)
        draws = seeded_generator("photos", self.split, index) if rng is None else rng
        image = random_resized_crop(self.pictures[number], self.image_size_px, self.config.min_side, draws)
        if self.config.flip and rng is not None:
            image = random_flip(image, rng)
        return {"image": to_tensor(image), "label": -1, "text": "", "key": f"photos/{self.names[number]}/{index:06d}"}


def _read(package: str, name: str) -> Image.Image:
    with (files(package) / name).open("rb") as file:
        return Image.open(file).convert("RGB")


def build(config: Config, split: str, image_size_px: int) -> Photos:
    """The crops of ``split`` at ``image_size_px``."""
    return Photos(config, split, image_size_px)
