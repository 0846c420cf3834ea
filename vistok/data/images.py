"""What image folders and shards have in common: reading a sample, unreadable images, the held-out fraction."""

from __future__ import annotations

import io
import itertools
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from omegaconf import MISSING
from PIL import Image, UnidentifiedImageError

from vistok.data.transforms import center_crop, random_crop, random_flip, to_tensor
from vistok.errors import UserError
from vistok.rng import derive_seed

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class ImageConfig:
    """Where images are and how they are prepared.

    Args:
        path: where they are.
        val_fraction: share of the images that is held out when the data do not bring a validation split; which
            ones depends on their names alone.
        crop: how training images become square; validation images are always cropped in the middle.
        flip: mirror half of the training images.
        on_error: what an unreadable image or shard does: ``stop`` the run, or ``skip`` it with a warning and a count.
    """

    path: str = MISSING
    val_fraction: float = 0.05
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Record:
    """One stored sample: the encoded image and what belongs to it; ``suffix`` tells its format."""

    data: bytes
    suffix: str
    label: int
    text: str
    key: str


class ImageDataset(ABC):
    """Samples decoded from stored images.

    An unreadable image stops the run, or is counted in ``num_skipped`` and replaced by the next readable one.

    Args:
        name: of the data module, for ``description``.
        config: preparation.
        split: ``train`` or ``val``; only training samples are augmented.
        image_size_px: side of the images.
        keys: of all samples.
        class_names: one name per class, empty if there are none.
    """

    def __init__(
        self, name: str, config: ImageConfig, split: str, image_size_px: int, keys: list[str], class_names: list[str]
    ) -> None:
        self.config, self.image_size_px, self.class_names = config, image_size_px, class_names
        self.augment = split == "train"
        self.num_classes = len(class_names)
        # One flag per image, in memory that the loader's processes share: each image counts once.
        self._unreadable = torch.zeros(len(keys), dtype=torch.bool).share_memory_()
        self.description: dict[str, Any] = {
            "name": name,
            "split": split,
            "count": len(keys),
            "keys_hash": f"{derive_seed(*keys):016x}",
            "image_size_px": image_size_px,
            "preprocessing": "adm_center_crop",
        }
        if self.augment:
            self.description["augmentation"] = {"crop": config.crop, "flip": config.flip}

    @abstractmethod
    def record(self, index: int) -> Record:
        """Sample ``index`` as it is stored; raises OSError or ValueError if it cannot be read."""

    @abstractmethod
    def source(self, index: int) -> str:
        """The file of sample ``index``, for messages."""

    @property
    def num_skipped(self) -> int:
        """Unreadable images met so far."""
        return int(self._unreadable.sum())

    def __len__(self) -> int:
        return len(self._unreadable)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Sample ``index``, cropped and flipped by draws from ``rng``; cropped in the middle if it is None.

        Raises:
            UserError: if the image is unreadable and the run shall stop, or if no image at all is readable.
        """
        record, image = self._next_readable(index)
        return {
            "image": to_tensor(self._prepare(image, rng if self.augment else None)),
            "label": record.label,
            "text": record.text,
            "key": record.key,
        }

    def read(self, index: int) -> tuple[Record, Image.Image] | None:
        """Sample ``index`` as it is stored and as an RGB image; None if it is unreadable and shall be skipped.

        Raises:
            UserError: if it is unreadable and the run shall stop.
        """
        if self._unreadable[index]:
            return None
        try:
            record = self.record(index)
            return record, decode(record.data)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self._note_unreadable(index, error)
            return None

    def _next_readable(self, index: int) -> tuple[Record, Image.Image]:
        for candidate in itertools.chain(range(index, len(self)), range(index)):
            if (found := self.read(candidate)) is not None:
                return found
        raise UserError(f"{self.config.path}: none of the {len(self)} images can be read")

    def _prepare(self, image: Image.Image, rng: torch.Generator | None) -> Image.Image:
        if rng is None:
            return center_crop(image, self.image_size_px)
        if self.config.crop == "random":
            image = random_crop(image, self.image_size_px, rng)
        else:
            image = center_crop(image, self.image_size_px)
        return random_flip(image, rng) if self.config.flip else image

    def _note_unreadable(self, index: int, error: Exception) -> None:
        if self.config.on_error == "stop":
            raise UserError(
                f"cannot read {self.source(index)}: {error}; mend or remove it, or set data.args.on_error=skip"
            ) from None
        self._unreadable[index] = True
        count = self.num_skipped
        # A line for the 1st, 10th, 100th ...: the count of a long run, not a line for each image.
        if count == 10 ** (len(str(count)) - 1):
            warnings.warn(f"skipped {count} unreadable image(s) so far, now {self.source(index)}", stacklevel=2)


def decode(data: bytes) -> Image.Image:
    """An encoded image as RGB; raises OSError, ValueError or SyntaxError (Pillow's choice) if it is corrupt."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        # Pillow's message names the buffer's address in memory.
        raise OSError("not an image") from None


def in_split(key: str, split: str, val_fraction: float) -> bool:
    """Whether a sample belongs to ``split``, decided by a hash of its key."""
    return (derive_seed("val", key) < val_fraction * 2**63) == (split == "val")
