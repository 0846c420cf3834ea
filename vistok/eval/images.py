"""Images to measure, each exactly once: of a data set, or as they lie in a folder, in shards or in an ``.npz``."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vistok.cli import flag_for
from vistok.data.datamodule import Dataset, load_data, make_loader, ordered_batches
from vistok.data.images import ImageDataset, Record
from vistok.data.transforms import center_crop, to_tensor
from vistok.errors import UserError
from vistok.eval.processes import of_all, own_share
from vistok.pictures import to_pil, to_uint8

NPZ_IMAGES = "arr_0"
GRAY = ("1", "L", "LA")
GRAY_NOTE = "grayscale images are read as RGB with three equal channels"

Batch = tuple[UInt8[Tensor, "B 3 H W"], Int[Tensor, " B"], Int[Tensor, " B"]]
"""Images, their classes (-1 where there is none), and their places among all images."""


def image_batches(
    dataset: Dataset,
    batch_size: int,
    workers: int = 0,
    count: int | None = None,
    whole: bool = False,
    pixels: PixelHash | None = None,
) -> Iterator[dict[str, Any]]:
    """Images of a data set in order, without augmentation, leaving out unreadable ones that it skips.

    Of several processes each gets its share.

    Args:
        dataset: of images.
        batch_size: images at a time.
        workers: loader processes.
        count: take the first so many; None takes all.
        whole: all of these in every process.
        pixels: gets them too.

    Yields:
        ``{"image": float32 (B, 3, H, W) in [-1, 1], "label": int64 (B,), "position": int64 (B,)}``; where nothing is
        skipped, the position is the image's index.
    """
    count = count or len(dataset)
    batches = ordered_batches(count, batch_size)
    mine = batches if whole else own_share(batches)
    # The data set puts the next image, behind the last the first one, in the place of one that it skips: that would
    # count twice. It stands where it comes first, which may be in the share of another process.
    _, first = mine[0][0]
    seen = {dataset.get(place)["key"] for place in (0, first - 1) if first}
    for batch in make_loader(dataset, mine, workers):
        rows = []
        for row, key in enumerate(batch["key"]):
            if key not in seen:
                seen.add(key)
                rows.append(row)
        if rows:
            if pixels:
                pixels.update(to_uint8(batch["image"][rows]))
            yield {name: batch[name][rows] for name in ("image", "label", "position")}


def uint8_batches(
    dataset: Dataset,
    batch_size: int,
    workers: int = 0,
    count: int | None = None,
    whole: bool = False,
    pixels: PixelHash | None = None,
) -> Iterator[Batch]:
    """Images as metrics see them, their labels and their positions; the rest as :func:`image_batches`."""
    for batch in image_batches(dataset, batch_size, workers, count, whole, pixels):
        yield to_uint8(batch["image"]), batch["label"], batch["position"]


def unaugmented(dataset: Dataset) -> dict[str, Any]:
    """What a data set says about itself, for images that are read as above: not how training would move them."""
    return {name: value for name, value in dataset.description.items() if name != "augmentation"}


class PixelHash:
    """A hash of a set of images in order, whichever batches and processes they come in."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []

    def update(self, images: UInt8[Tensor, "B 3 H W"]) -> None:
        """Add images."""
        self._digests += [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]

    def hexdigest(self) -> str:
        """SHA-256 of the SHA-256 of each image, of all processes."""
        return hashlib.sha256(b"".join(of_all(b"".join(self._digests)))).hexdigest()

    def reference(self, images: str) -> dict[str, Any]:
        """What :class:`~vistok.eval.protocol.EvalProtocol` says about a reference of these: ``images`` is what."""
        return {"images": images, "count": sum(of_all(len(self._digests))), "pixels_sha256": self.hexdigest()}


def crop(images: UInt8[Tensor, "B 3 H W"], size_px: int) -> UInt8[Tensor, "B 3 size_px size_px"]:
    """Images as ADM crops and resizes them; samples, which are square, are only resized."""
    return torch.stack([to_uint8(to_tensor(center_crop(to_pil(image), size_px))) for image in images])


def open_rgb(data: bytes, source: str) -> Image.Image:
    """An encoded image as RGB.

    Args:
        data: its file.
        source: where that lies, for messages.

    Raises:
        UserError: if it is corrupt or has more than 8 bits a channel.
    """
    with _reading(source), Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{source} has more than 8 bits a channel: convert it first")
        if image.mode in GRAY:
            warnings.warn(GRAY_NOTE, stacklevel=2)
        return image.convert("RGB")


def read_rgb(file: Path) -> UInt8[Tensor, "3 H W"]:
    """An image file, by :func:`open_rgb`; UserError also if it is not there."""
    with _reading(str(file)):
        data = file.read_bytes()
    return torch.from_numpy(np.array(open_rgb(data, str(file)))).permute(2, 0, 1)


def stored_images(files: Mapping[int, Sequence[Path]]) -> Iterator[tuple[int, Path, UInt8[Tensor, "3 H W"]]]:
    """Image files of prompts, each with the number of its prompt; of several processes, the share of this one.

    Raises:
        UserError: if one cannot be read or has another size than the first.
    """
    pairs = [(number, file) for number, of_prompt in files.items() for file in of_prompt]
    _, first = pairs[0]
    size = read_rgb(first).shape[:0:-1]
    for number, file in own_share(pairs):
        image = read_rgb(file)
        if image.shape[:0:-1] != size:
            raise UserError(
                f"images of different size: {first} has {_pixels(size)}, {file} has {_pixels(image.shape[:0:-1])}"
            )
        yield number, file, image


@contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's message names the buffer's address in memory.
        what = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot read {source}: {what}; mend or remove it") from None


class StoredImages:
    """A data set of images that are measured as they are stored, such as samples of another program.

    Args:
        images: of a folder or of shards.
        size_px: crop and resize all images to this side as ADM does; None takes them as they are.

    Raises:
        UserError: if the first image is not square and none shall be cropped. Reading an image raises it if that is
            corrupt, has more than 8 bits or another size than the first.
    """

    num_classes = 0

    def __init__(self, images: ImageDataset, size_px: int | None = None) -> None:
        self.images, self.crop = images, size_px is not None
        self.class_names = images.class_names
        self.size = self._read(0)[0].size if size_px is None else (size_px, size_px)
        _check_square(images.source(0), self.size)
        self.image_size_px = self.size[0]
        preprocessing = "adm_center_crop" if self.crop else "none"
        self.description = {"name": "stored images", "split": "all", "preprocessing": preprocessing}

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Image ``index``, see :class:`~vistok.data.datamodule.Dataset`."""
        image, record = self._read(index)
        if self.crop:
            image = center_crop(image, self.image_size_px)
        if image.size != self.size:
            raise UserError(
                f"images of different size: {self.images.source(0)} has {_pixels(self.size)}, "
                f"{self.images.source(index)} has {_pixels(image.size)}; --protocol adm{self.image_size_px} crops "
                "all of them"
            )
        return {"image": to_tensor(image), "label": record.label, "text": record.text, "key": record.key}

    def _read(self, index: int) -> tuple[Image.Image, Record]:
        with _reading(source := self.images.source(index)):
            record = self.images.record(index)
        return open_rgb(record.data, source), record


class NpzImages:
    """A data set of the images in an ADM-style ``.npz``: ``arr_0``, uint8 ``(N, H, W, 3)``.

    They are read where they lie in the file, one after the other, unless the file is compressed.

    Args:
        path: the file.

    Raises:
        UserError: if the file is no such thing.
    """

    num_classes = 0

    def __init__(self, path: Path) -> None:
        self.class_names: list[str] = []
        try:
            self.array = _open_array(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no images {NPZ_IMAGES!r} that can be read: {error}") from None
        if self.array.ndim == 3 or (self.array.ndim == 4 and self.array.shape[3] == 1):
            warnings.warn(GRAY_NOTE, stacklevel=2)
            gray = self.array.reshape(*self.array.shape[:3], 1)
            self.array = np.broadcast_to(gray, (*gray.shape[:3], 3))
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise UserError(
                f"{path}: {NPZ_IMAGES} must be uint8 (N, H, W, 3), it is {self.array.dtype} {self.array.shape}"
            )
        _check_square(str(path), self.array.shape[2:0:-1])
        self.image_size_px = self.array.shape[1]
        self.description = {"name": "stored images", "split": "all", "preprocessing": "none"}

    def __len__(self) -> int:
        return len(self.array)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Image ``index``, see :class:`~vistok.data.datamodule.Dataset`."""
        image = Image.fromarray(np.ascontiguousarray(self.array[index]))
        return {"image": to_tensor(image), "label": -1, "text": "", "key": str(index)}


def open_images(path: str, size_px: int | None = None) -> StoredImages | NpzImages:
    """The images of a folder, of shards (``.tar`` files, or a folder of them) or of an ``.npz``.

    Args:
        path: where they are.
        size_px: see :class:`StoredImages`; an ``.npz`` must have this size.

    Raises:
        UserError: if there are none, or they are not as the data sets above want them.
    """
    if path.endswith(".npz") and Path(path).is_file():
        images = NpzImages(Path(path))
        if size_px not in (None, images.image_size_px):
            raise UserError(f"{path} holds images of {images.image_size_px} px, the protocol asks for {size_px}")
        return images
    if not path.endswith(".tar") and not Path(path).is_dir():
        raise UserError(f"no images at {path!r}: give a folder, shards (.tar) or an .npz with {NPZ_IMAGES}")
    with flag_for(", or set data.args.on_error=skip", ""):  # every sample counts
        found = load_data(path, "val", size_px or 1, val_fraction=1.0)
    if not isinstance(found, ImageDataset):
        raise UserError(f"{path} holds codes or latents, not images")
    return StoredImages(found, size_px)


def _open_array(path: Path) -> np.ndarray:
    """``arr_0``, mapped from the file where it is stored as it is; read where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{NPZ_IMAGES}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(file)
            header_bytes = file.tell()
    if member.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path) as arrays:
            return arrays[NPZ_IMAGES]
    with path.open("rb") as file:
        # The local header repeats the name and has an extra field of its own length.
        file.seek(member.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2").tolist()
    offset = member.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    return np.memmap(path, dtype, "r", offset, shape)


def _check_square(source: str, size: tuple[int, ...]) -> None:
    if size[0] != size[1]:
        raise UserError(f"{source} has {_pixels(size)}: images must be square; --protocol admSIZE crops them")


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]} px"
