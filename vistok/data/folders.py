"""``folders``: images in a folder, with one subfolder per class or none, and captions in ``.txt`` files beside them.

``path/train`` and ``path/val`` are the splits if ``path/val`` exists; else a fraction of ``path`` is held out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vistok.data.images import IMAGE_SUFFIXES, ImageConfig, ImageDataset, Record, in_split
from vistok.errors import UserError


@dataclass
class Config(ImageConfig):
    """``path``: the folder. The other fields are those of all image data."""


class Folders(ImageDataset):
    """The images of a folder, in the order of their relative paths, which are also their keys.

    Raises:
        UserError: if the folder is missing, is empty, or mixes loose images with class folders.
    """

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        folder = Path(config.path)
        has_val = (folder / "val").is_dir()
        self.root = folder / split if has_val else folder
        if not self.root.is_dir():
            raise UserError(f"no such folder: {self.root}")
        keys, captions = _scan(self.root)
        if not keys:
            raise UserError(f"{self.root}: no images ({', '.join(IMAGE_SUFFIXES)})")
        # Both splits must number the classes alike.
        classes_root = folder / "train" if has_val and (folder / "train").is_dir() else self.root
        class_names = _class_names(classes_root) if any("/" in key for key in keys) else []
        _check_classes(self.root, keys, class_names)
        count = len(keys)
        if not has_val:
            keys = [key for key in keys if in_split(key, split, config.val_fraction)]
            if not keys:
                raise UserError(
                    f"{folder}: none of its {count} image(s) falls into the split {split!r}; "
                    "set data.args.val_fraction, or make the folders train and val"
                )
        # Bytes in one array: a list of strings would be copied page by page into every loader process.
        self._keys = np.array([os.fsencode(key) for key in keys])
        self._has_caption = np.array([os.path.splitext(key)[0] in captions for key in keys])
        self._labels = {name: label for label, name in enumerate(class_names)}
        super().__init__("folders", config, split, image_size_px, keys, class_names)
        if not has_val and len(keys) == count:
            self.description["split"] = "all"

    def record(self, index: int) -> Record:
        """Sample ``index`` as it is stored."""
        key = os.fsdecode(self._keys[index])
        path = self.root / key
        text = path.with_suffix(".txt").read_text(encoding="utf-8").strip() if self._has_caption[index] else ""
        return Record(path.read_bytes(), path.suffix.lower(), self._labels.get(key.split("/")[0], -1), text, key)

    def source(self, index: int) -> str:
        """The path of image ``index``."""
        return str(self.root / os.fsdecode(self._keys[index]))


def build(config: Config, split: str, image_size_px: int) -> Folders:
    """The images of ``split``."""
    return Folders(config, split, image_size_px)


def _scan(root: Path) -> tuple[list[str], set[str]]:
    """Relative paths of the images below ``root``, sorted, and those of the captions without their suffix."""
    images, captions = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(folder).relative_to(root)
        for name in files:
            stem, suffix = os.path.splitext(name)
            if name.startswith("."):
                continue
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append((prefix / name).as_posix())
            elif suffix == ".txt":
                captions.add((prefix / stem).as_posix())
    return sorted(images), captions


def _class_names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _check_classes(root: Path, keys: list[str], class_names: list[str]) -> None:
    for key in keys if class_names else []:
        name, inside, _ = key.partition("/")
        if not inside:
            raise UserError(f"{root}: {name} lies beside the class folders; move it into one")
        if name not in class_names:
            raise UserError(f"{root}: class folder {name!r} does not exist in the training split")
