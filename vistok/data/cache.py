"""What caches of codes and of latents have in common: passes over a data set, and samples without their images.

Pass 0 holds the images as they are, each further pass of the training split augments them anew.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vistok.data.datamodule import Dataset, make_loader, ordered_batches
from vistok.errors import UserError
from vistok.rng import derive_seed

T = TypeVar("T")


class Cache(ABC):
    """One split of a cache.

    Args:
        header: what :func:`read_header` says.
        split: ``train`` or ``val``.
        folder: for messages.

    Raises:
        UserError: if the cache lacks the split.
    """

    passes: int
    labels: Tensor

    def __init__(self, header: dict[str, Any], split: str, folder: Path) -> None:
        if split not in header["splits"]:
            raise UserError(f"{folder} has no split {split!r} ({', '.join(header['splits'])})")
        self.part = header["splits"][split]
        self.keys, self.texts = self.part["keys"], self.part["texts"]
        self.class_names: list[str] = header["class_names"]
        self.num_classes = len(self.class_names)

    @abstractmethod
    def stored(self, number: int, index: int) -> dict[str, Any]:
        """What pass ``number`` holds instead of image ``index``, under its name in a sample."""

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Sample ``index`` of a pass drawn from ``rng``; of pass 0, the image as it is, if that is None."""
        number = 0 if rng is None else int(torch.randint(self.passes, (), generator=rng))
        return {
            **self.stored(number, index),
            "label": int(self.labels[index]),
            "text": self.texts[index] if self.texts else "",
            "key": self.keys[index],
        }


class Table:
    """The array in a ``.npy`` file; it stays on the disk.

    Args:
        path: the file.
        what: it holds, for the message.

    Raises:
        UserError: if the file is missing, truncated or something else.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        try:
            self.array  # noqa: B018 (mapped here to see whether it can be)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no complete table of {what}: {error}") from None

    @cached_property
    def array(self) -> np.ndarray:
        """What reads the rows that it is asked for."""
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file pickles as all that is in it: loader processes map it anew.
        return {"path": self.path}


def read_header(path: Path, keys: tuple[str, ...], what: str, command: str) -> dict[str, Any]:
    """The JSON file of a cache; it has at least ``keys``, ``class_names`` and ``splits``.

    Raises:
        UserError: if it is no such file, naming the ``command`` of ``vistok.data`` that makes one.
    """
    try:
        header = json.loads(path.read_text())
        if absent := [key for key in (*keys, "class_names", "splits") if key not in header]:
            raise ValueError(f"it lacks {', '.join(absent)}")
        return header
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path.parent} is no {what} ({path.name}: {error}); make one with python -m vistok.data {command}"
        ) from None


def write_header(path: Path, datasets: dict[str, Dataset], splits: dict[str, Any], **values: Any) -> None:
    """Write what :func:`read_header` reads."""
    class_names = next(iter(datasets.values())).class_names
    path.write_text(json.dumps({**values, "class_names": class_names, "splits": splits}) + "\n")


def passes_of(split: str, passes: int) -> int:
    """Only the training split has more than one."""
    return passes if split == "train" else 1


def go_through(
    dataset: Dataset,
    passes: int,
    encode: Callable[[Float[Tensor, "B 3 H W"]], T],
    store: Callable[[T], object],
    batch_size: int,
    seed: int,
    workers: int,
    progress: Callable[[int], None],
) -> tuple[dict[str, Any], Tensor]:
    """Store what ``encode`` makes of the images of every pass, in order.

    Args:
        dataset: one split.
        passes: over it.
        encode: is given the next images.
        store: is given what ``encode`` returns.
        batch_size: images at once.
        seed: pass p > 0 augments image i by a stream that (seed, p, i) names.
        workers: loader processes.
        progress: called with the number of images done since the last call.

    Returns:
        What the data are, with keys and texts of all samples, for ``splits`` of the header; and their labels.

    Raises:
        UserError: if a number is out of range.
    """
    if passes < 1 or batch_size < 1 or workers < 0:
        raise UserError(
            f"passes and batch_size must be at least 1 and workers at least 0, got {passes}, {batch_size} and {workers}"
        )
    for number in range(passes):
        augment_seed = derive_seed("pass", seed, number) if number else None
        batches = []
        for batch in make_loader(dataset, ordered_batches(len(dataset), batch_size), workers, augment_seed):
            store(encode(batch.pop("image")))
            batches.append(batch)
            progress(len(batch["label"]))
    # Labels, captions and keys are the same in every pass.
    keys, texts = ([item for batch in batches for item in batch[name]] for name in ("key", "text"))
    part = {"data": dataset.description, "keys": keys, "texts": texts if any(texts) else []}
    return part, torch.cat([batch["label"] for batch in batches])
