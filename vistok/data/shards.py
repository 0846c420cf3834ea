"""``shards``: samples in tar files, by the naming rules of WebDataset.

Members that share the path up to the first dot of the file name are one sample: ``key.jpg`` (or jpeg, png, webp),
``key.cls`` (class number), ``key.txt`` (caption), ``key.json`` (its ``caption`` is used where there is no ``.txt``).
The shards are read at random, not as streams: an index of where each member lies is made once, from the headers,
so the order of samples is the same as for any other data set.

A folder may hold ``classes.json``, the list of class names; :func:`write_shards` puts it there.
"""

from __future__ import annotations

import json
import os
import tarfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from braceexpand import braceexpand

from vistok.data.images import IMAGE_SUFFIXES, ImageConfig, ImageDataset, Record, in_split
from vistok.errors import UserError

CLASSES = "classes.json"
_PARTS = ("image", "txt", "json")  # the rows of ShardIndex.places


@dataclass
class Config(ImageConfig):
    """Shards; fields not named here are those of all image data.

    Args:
        path: a pattern such as ``train-{000..127}.tar``, or a folder of ``.tar`` files or of ``train`` and ``val``.
        val_path: the validation shards, if they are apart.
        num_classes: 0 takes it from ``classes.json`` or from the largest class number.
    """

    val_path: str = ""
    num_classes: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Args:
        keys: one per sample.
        places: offset and size in bytes of image, caption and JSON, int64 ``(M, 3, 2)``; size -1 where absent.
        suffixes: of the images.
        labels: class numbers, -1 where absent.
    """

    keys: list[str]
    places: np.ndarray
    suffixes: list[str]
    labels: list[int]


class Shards(ImageDataset):
    """The samples of several shards, in the order of the shards and of their members.

    Their keys begin with the shard's path, seen from the folder of all shards: many tools count members anew in each.

    Raises:
        UserError: if a shard is missing or unreadable (unless ``on_error`` is ``skip``), or no sample is left.
    """

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        apart = bool(config.val_path) or (Path(config.path) / "val").is_dir()
        pattern = config.val_path if config.val_path and split == "val" else config.path
        self.paths = expand_shards(pattern, split)
        indexes = _read_indexes(self.paths, config.on_error)
        labels = np.array([label for index in indexes for label in index.labels])
        members = [member for index in indexes for member in index.keys]
        shard_of = np.repeat(np.arange(len(indexes)), [len(index.keys) for index in indexes])
        self._names = _names(self.paths)
        keys = [f"{self._names[shard]}/{member}" for shard, member in zip(shard_of, members)]
        class_names = _class_names(self.paths[0].parent, config.num_classes, labels)
        rows = [row for row, key in enumerate(keys) if apart or in_split(key, split, config.val_fraction)]
        if not rows:
            raise UserError(f"{pattern}: no sample with an image in the split {split!r} ({len(keys)} in all)")
        # Arrays, not lists of objects: loader processes share their memory.
        self._members = np.array([members[row].encode() for row in rows])
        self._labels = labels[rows]
        self._places = np.concatenate([index.places for index in indexes])[rows]
        self._suffixes = np.array([suffix for index in indexes for suffix in index.suffixes])[rows]
        self._shards = shard_of[rows]
        super().__init__("shards", config, split, image_size_px, [keys[row] for row in rows], class_names)
        if not apart and len(rows) == len(keys):
            self.description["split"] = "all"

    def record(self, index: int) -> Record:
        """Sample ``index`` as it is stored."""
        # Opened for each sample: an open file that forked loader processes share would share its position.
        with open(self.paths[self._shards[index]], "rb") as shard:
            image, text, details = (_read_part(shard, *place) for place in self._places[index].tolist())
        caption = _caption(text, details).strip()
        key = f"{self._names[self._shards[index]]}/{self._members[index].decode()}"
        return Record(image, str(self._suffixes[index]), int(self._labels[index]), caption, key)

    def source(self, index: int) -> str:
        """The shard and the member of image ``index``."""
        return f"{self.paths[self._shards[index]]}: {self._members[index].decode()}{self._suffixes[index]}"


def build(config: Config, split: str, image_size_px: int) -> Shards:
    """The samples of ``split``."""
    return Shards(config, split, image_size_px)


def expand_shards(pattern: str, split: str = "train") -> list[Path]:
    """The tar files that a brace pattern names, or those in a folder (in its subfolder ``split``, if it has ``val``).

    Raises:
        UserError: if there are none, or one that is named does not exist.
    """
    folder = Path(pattern)
    if folder.is_dir():
        folder = folder / split if (folder / "val").is_dir() else folder
        paths = sorted(folder.glob("*.tar"))
    else:
        paths = [Path(path) for path in braceexpand(pattern)]
    if not paths:
        raise UserError(f"{folder}: no .tar files")
    for path in paths:
        if not path.is_file():
            raise UserError(f"no such shard: {path}")
    return paths


def read_index(path: Path) -> ShardIndex:
    """The index of one shard, from its headers and its class numbers.

    Raises:
        tarfile.TarError: if the file is no tar or ends too early.
        ValueError: if a class number is none.
    """
    samples: dict[str, dict] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not member.isfile() or not stem:
                continue
            sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {"label": -1})
            extension, place = extension.lower(), (member.offset_data, member.size)
            if f".{extension}" in IMAGE_SUFFIXES:
                sample["image"], sample["suffix"] = place, f".{extension}"
            elif extension == "cls":
                sample["label"] = int(_read_part(tar.fileobj, *place))
            elif extension in ("txt", "json"):
                sample[extension] = place
        # tarfile takes a broken header for the end; a whole archive ends with blocks of zeros.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")
    samples = {key: sample for key, sample in samples.items() if "image" in sample}
    places = [[sample.get(part, (0, -1)) for part in _PARTS] for sample in samples.values()]
    return ShardIndex(
        keys=list(samples),
        places=np.array(places, dtype=np.int64).reshape(-1, len(_PARTS), 2),
        suffixes=[sample["suffix"] for sample in samples.values()],
        labels=[sample["label"] for sample in samples.values()],
    )


def write_shards(
    records: Iterable[Record], folder: Path, max_per_shard: int, class_names: list[str], captions: bool
) -> int:
    """Write samples as ``folder/000000.tar``, ``folder/000001.tar``, ...

    Args:
        records: the samples, in order; the n-th gets the key ``n`` with eight digits.
        folder: an existing folder.
        max_per_shard: samples in one shard.
        class_names: for ``classes.json``; none for data without classes.
        captions: write the captions too.

    Returns:
        The number of samples.
    """
    pattern = str(folder).replace("%", "%%") + "/%06d.tar"
    count = 0
    # Owner and time stay out, so that the same images give the same bytes.
    with webdataset.ShardWriter(pattern, maxcount=max_per_shard, verbose=0, mtime=0) as writer:
        for count, record in enumerate(records, start=1):
            sample: dict[str, Any] = {"__key__": f"{count - 1:08d}", record.suffix.removeprefix("."): record.data}
            if record.label >= 0:
                sample["cls"] = record.label
            if captions and record.text:
                sample["txt"] = record.text
            writer.write(sample)
    if class_names:
        (folder / CLASSES).write_text(json.dumps(class_names) + "\n")
    return count


def _names(paths: list[Path]) -> list[str]:
    """What tells shards apart: their paths without ``.tar``, seen from the folder that holds them all."""
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().with_suffix("").relative_to(root).as_posix() for path in paths]


def _read_indexes(paths: list[Path], on_error: str) -> list[ShardIndex]:
    """One index per path; an empty one for a shard that is skipped."""
    indexes, broken = [], []
    for path in paths:
        try:
            indexes.append(read_index(path))
        except (tarfile.TarError, OSError, ValueError) as error:
            message = f"{path} is no whole tar file: {error}"
            if on_error == "stop":
                raise UserError(f"{message}; mend or remove it, or set data.args.on_error=skip") from None
            broken.append(message)
            indexes.append(ShardIndex([], np.zeros((0, len(_PARTS), 2), dtype=np.int64), [], []))
    if broken:
        warnings.warn(f"skipped {len(broken)} of {len(paths)} shards: {broken[0]}", stacklevel=2)
    return indexes


def _class_names(folder: Path, num_classes: int, labels: np.ndarray) -> list[str]:
    highest = int(labels.max(initial=-1))
    if (folder / CLASSES).is_file():
        names = json.loads((folder / CLASSES).read_text())
    else:
        names = [str(label) for label in range(num_classes or highest + 1)]
    if highest >= len(names):
        raise UserError(f"{folder}: a sample has class {highest}, but there are {len(names)} classes")
    return names


def _caption(text: bytes, details: bytes) -> str:
    parsed = json.loads(details) if details and not text else {}
    return text.decode() if text else str(parsed.get("caption", "") if isinstance(parsed, dict) else "")


def _read_part(shard: Any, offset: int, size: int) -> bytes:
    if size < 0:
        return b""
    shard.seek(offset)
    return shard.read(size)
