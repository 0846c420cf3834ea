"""Benchmarks that ask a judge about the images of prompts: what DPG-Bench, GenAI-Bench and T2I-CompBench share.

An item is a prompt with questions about its images. Images of an item lie in a folder as ``NAME.png`` (or another
suffix), or several as ``NAME/0000.png`` and so on, or as ``NAME_000000.png`` and so on (a full stop before the number
is no part of the name); ``NAME.png`` may also hold four of them, as a grid of 2 x 2.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxtyping import UInt8
from torch import Tensor

from vistok.data.images import IMAGE_SUFFIXES
from vistok.errors import UserError
from vistok.eval.geneval import Sample
from vistok.eval.images import stored_images
from vistok.eval.judges import Judge
from vistok.eval.processes import groups_of_all
from vistok.geneval_rules import spread
from vistok.pictures import save_png, to_pil

Key = TypeVar("Key")


class Item(Protocol):
    """A prompt, as a frozen dataclass."""

    @property
    def name(self) -> str:
        """Of its images, without a suffix."""

    @property
    def text(self) -> str:
        """The prompt."""

    @property
    def asked(self) -> Sequence[str]:
        """Questions for the judge about each of its images."""

    def score(self, yes: Sequence[float]) -> float:
        """What an image is worth, in [0, 1], by the probability that the answer to each question is yes."""


@dataclass(frozen=True)
class Record:
    """What a judge said of one image.

    Args:
        filename: of the image, or that it would have.
        item: what the image was made for.
        yes: the probability that the answer to each of the item's questions is yes.
    """

    filename: str
    item: Any
    yes: tuple[float, ...]

    @property
    def score(self) -> float:
        """What the image is worth, in [0, 1]."""
        worth: float = self.item.score(self.yes)
        return worth


class Benchmark(Protocol):
    """Prompts, and how the answers become scores.

    Attributes:
        task: name of the command and of the result files.
        title: the benchmark's own name.
        definitions: which variant of each score is computed.
        counted: what :meth:`parts` counts.
    """

    task: str
    title: str
    definitions: dict[str, str]
    counted: str

    @property
    def items(self) -> Sequence[Item]:
        """The prompts."""

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The figures that papers print, of one series of images."""

    def parts(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """``{counted, "score"}`` of each category."""

    def agreement(self, records: Sequence[Record]) -> dict[str, float]:
        """How far people say the same; empty where they were not asked."""


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """What identifies the prompts and their questions."""
    digest = hashlib.sha256("\n".join(map(repr, benchmark.items)).encode()).hexdigest()
    return {"name": benchmark.task, "prompts": len(benchmark.items), "prompts_sha256": digest[:12]}


def measure(
    judge: Judge, items: Sequence[Item], samples: Iterable[Sample], progress: Callable[[int], None] | None = None
) -> dict[str, list[Record]]:
    """Ask about every image.

    Of several processes each asks about its share of the samples and gets the records of all of them, in order.

    Args:
        judge: answers.
        items: the prompts.
        samples: images of the items, by their place.
        progress: called with the number of samples judged since the last call.

    Returns:
        Records of each series of images.
    """
    records: dict[str, list[Record]] = {}
    for number, filename, images in samples:
        item = items[number]
        for series, image in images.items():
            yes = judge(to_pil(image), item.asked).tolist()
            records.setdefault(series, []).append(Record(filename, item, tuple(yes)))
        if progress:
            progress(1)
    return groups_of_all(records)


def grouped(pairs: Iterable[tuple[Key, float]]) -> dict[Key, list[float]]:
    """The values of each key, in the order of their first appearance."""
    groups: dict[Key, list[float]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def at_most(items: list[Key], count: int | None) -> list[Key]:
    """At most ``count`` of ``items``, evenly spaced; all for None."""
    return items if count is None else spread(items, min(count, len(items)))


def find_images(folder: Path, items: Sequence[Item]) -> list[list[Path]]:
    """The image files of each item.

    Raises:
        UserError: if there is no such folder, or an item has no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    names = {item.name for item in items}
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            files.setdefault(path.name, []).extend(inside)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            name = path.stem if path.stem in names else re.sub(r"\.?_\d+$", "", path.stem)
            files.setdefault(name, []).append(path)
    if missing := [item.name for item in items if not files.get(item.name)]:
        few = ", ".join(missing[:5]) + ", ..." * (len(missing) > 5)
        raise UserError(
            f"{folder} lacks the images of {len(missing)} of {len(items)} prompts: {few} "
            f"(each is {missing[0]}.png, or {missing[0]}/0000.png or {missing[0]}_000000.png and so on)"
        )
    return [files[item.name] for item in items]


def stored_samples(files: list[list[Path]], cell_px: int | None = None) -> Iterator[Sample]:
    """The images of each item, by :func:`~vistok.eval.images.stored_images`.

    Args:
        files: of each item.
        cell_px: every file is a grid of 2 x 2 images of this side; None: every file is an image.

    Raises:
        UserError: also if a file is no such grid.
    """
    for number, file, image in stored_images(dict(enumerate(files))):
        if cell_px is None:
            yield number, str(file), {"unknown": image}
            continue
        if image.shape[1:] != (2 * cell_px, 2 * cell_px):
            height, width = image.shape[1:]
            raise UserError(f"{file} is no grid of 2 x 2 images of {cell_px} px: it has {width} x {height} px")
        for index, cell in enumerate(cells(image, cell_px)):
            yield number, f"{file}#{index}", {"unknown": cell}


def cells(grid: UInt8[Tensor, "3 H W"], cell_px: int) -> list[UInt8[Tensor, "3 h w"]]:
    """The images of a grid, row by row."""
    return [cell for row in grid.split(cell_px, dim=1) for cell in row.split(cell_px, dim=2)]


def kept_samples(samples: Iterable[Sample], folder: Path, items: Sequence[Item]) -> Iterator[Sample]:
    """``samples``, of which the last series is written to ``folder`` as :func:`find_images` finds it."""
    for number, filename, images in samples:
        *_, image = images.values()
        name = f"{items[number].name}/{Path(filename).name}"
        save_png(to_pil(image), folder / name)
        yield number, name, images


def result_line(record: Record) -> str:
    """One image as a line of JSON: ``filename, name, prompt, score, questions, yes``."""
    item = record.item
    line = {"filename": record.filename, "name": item.name, "prompt": item.text, "score": record.score}
    return json.dumps(line | {"questions": list(item.asked), "yes": list(record.yes)})
