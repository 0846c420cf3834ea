"""``digits``: scikit-learn's 1,797 handwritten digits, a real data set that needs no download.

The originals are 8 x 8 grey images; they are enlarged once and, for training, moved about a little each time they
are seen. They are never flipped or cropped: a mirrored 2 is no digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor

from vistok.errors import UserError

SOURCE_SIZE_PX = 8
NUM_VAL = 297


@dataclass
class Config:
    """How training digits are moved about.

    Args:
        jitter: draw a small affine motion for each training sample.
        max_shift_px: largest shift along each axis, in pixels of the 8 x 8 original.
        max_rotation_deg: largest rotation, in degrees.
        max_scale: largest relative change of size.
    """

    jitter: bool = True
    max_shift_px: float = 0.5
    max_rotation_deg: float = 8.0
    max_scale: float = 0.05


class Digits:
    """The first 1,500 digits (``train``) or the last 297 (``val``) as RGB images.

    Args:
        config: the motion of training samples.
        split: ``train`` or ``val``.
        image_size_px: side of the images, at least 8.

    Raises:
        UserError: if ``image_size_px`` is below 8.
    """

    num_classes = 10

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        if image_size_px < SOURCE_SIZE_PX:
            raise UserError(f"digits: image_size_px must be at least {SOURCE_SIZE_PX}, got {image_size_px}")
        source = load_digits()
        rows = slice(-NUM_VAL, None) if split == "val" else slice(None, -NUM_VAL)
        grey = torch.from_numpy(source.images[rows]).float()[:, None] / 8 - 1
        size = (image_size_px, image_size_px)
        self.images = F.interpolate(grey, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        self.labels = source.target[rows].tolist()
        self.first_index = 0 if split == "train" else len(source.target) - NUM_VAL
        self.jitter = config if config.jitter and split == "train" else None
        self.class_names = [str(digit) for digit in range(10)]
        self.description = {
            "name": "digits",
            "split": split,
            "count": len(self.labels),
            "image_size_px": image_size_px,
            "resize": "bicubic",
        }

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict:
        """Sample ``index``; a training sample is moved about by draws from ``rng`` unless it is None."""
        image = self.images[index]
        if self.jitter is not None and rng is not None:
            image = _move(image, _random_motion(self.jitter, rng))
        label = self.labels[index]
        return {
            "image": image.expand(3, -1, -1).contiguous(),
            "label": label,
            "text": f"a handwritten {label}",
            "key": f"digits/{self.first_index + index:04d}",
        }


def build(config: Config, split: str, image_size_px: int) -> Digits:
    """The digits of ``split`` at ``image_size_px``."""
    return Digits(config, split, image_size_px)


def _random_motion(config: Config, rng: torch.Generator) -> Float[Tensor, "2 3"]:
    """An affine map from output to input coordinates, both in [-1, 1]."""
    shift_x, shift_y, turn, grow = (torch.rand(4, generator=rng) * 2 - 1).tolist()
    angle = math.radians(config.max_rotation_deg) * turn
    cos, sin = (f(angle) / (1 + config.max_scale * grow) for f in (math.cos, math.sin))
    unit = 2 * config.max_shift_px / SOURCE_SIZE_PX
    return torch.tensor([[cos, -sin, unit * shift_x], [sin, cos, unit * shift_y]])


def _move(image: Float[Tensor, "1 H W"], motion: Float[Tensor, "2 3"]) -> Float[Tensor, "1 H W"]:
    grid = F.affine_grid(motion[None], [1, *image.shape], align_corners=False)
    # Outside the image grid_sample finds 0, so the background (-1) must be 0 while it works.
    moved = F.grid_sample(image[None] + 1, grid, mode="bicubic", align_corners=False)[0] - 1
    return moved.clamp(-1, 1)
