"""GenEval: how often a generator shows what a prompt asks for, task by task.

Every image is judged by :mod:`vistok.geneval_rules` from the objects that a detector finds in it. A task's score is the
share of its images that are right, the overall score the unweighted mean of the tasks. Files are those of the original:
a line of metadata for each prompt, a folder of samples for each prompt, a line of results for each image.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageColor
from torch import Tensor

from vistok.checkpoint import write_text
from vistok.data.datamodule import Dataset
from vistok.errors import UserError, first_line
from vistok.eval.detectors import Detector
from vistok.eval.processes import groups_of_all, own_share
from vistok.geneval_rules import RELATIONS, TASKS, Entry, faults, spread
from vistok.interfaces import Generator, SampleOptions, Tokenizer
from vistok.pictures import labelled_grid, save_png, to_pil, to_uint8
from vistok.pipeline import Prompts, sample_prefixes

METADATA = "metadata.jsonl"
DEFINITIONS = {
    "score": "share of a task's images of which every clause holds; overall: unweighted mean of the tasks",
    "prompts_right": "prompts of which any image is right",
}
_SHOWN_PER_TASK = 3
_MOST_CELL_PX = 160

Record = dict[str, Any]
"""One image as the original's results have it: ``filename, tag, prompt, correct, reason, metadata`` (JSON text)."""

Sample = tuple[int, str, dict[str, UInt8[Tensor, "3 H W"]]]
"""Number of its prompt, file name, and an image in each series (such as: decoded from 4 tokens, from 16)."""


def judge(detector: Detector, image: UInt8[Tensor, "3 H W"], entry: Entry, filename: str) -> Record:
    """Whether ``image`` is right, and why not."""
    found = detector.detect(image, entry)
    lines = faults(found, entry, detector.rules, lambda group: detector.colors(image, group))
    return {
        "filename": filename,
        "tag": entry["tag"],
        "prompt": entry["prompt"],
        "correct": not lines,
        "reason": "; ".join(lines),
        "metadata": json.dumps(entry),
    }


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and who judges their images.

    Args:
        entries: the prompts.
        detector: finds objects; None where images are only made.
        data: where the prompts come from.
        world: data set that the prompts come from, if one does.
    """

    entries: list[Entry]
    detector: Detector | None
    data: dict[str, Any]
    world: Dataset | None = None

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the prompts."""
        digest = hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()
        return self.data | {"prompts": len(self.entries), "prompts_sha256": digest[:12]}


def measure_geneval(
    detector: Detector, entries: list[Entry], samples: Iterable[Sample], progress: Callable[[int], None] | None = None
) -> tuple[dict[str, list[Record]], Image.Image]:
    """Judge every image, and show some.

    Of several processes each judges its share of the samples and gets the records of all of them, in order.

    Args:
        detector: finds objects.
        entries: the prompts.
        samples: of each prompt in turn, at least one.
        progress: called with the number of samples judged since the last call.

    Returns:
        Records of each series of images, and :func:`picture` of the last series.
    """
    records: dict[str, list[Record]] = {}
    shown: dict[int, list[tuple[Record, Tensor]]] = {place: [] for place in some_of_each(entries, _SHOWN_PER_TASK)}
    for number, filename, images in samples:
        for series, image in images.items():
            record = judge(detector, image, entries[number], filename)
            records.setdefault(series, []).append(record)
        if number in shown:
            shown[number].append((record, image.clone()))  # not the whole batch that it is a view of
        if progress:
            progress(1)
    return groups_of_all(records), picture(list(groups_of_all(shown).values()))


def by_task(records: list[Record]) -> dict[str, dict[str, float]]:
    """``{"prompts", "images", "images_right", "prompts_right"}`` of each task; prompts are told apart by folders."""
    tasks: dict[str, dict[str, float]] = {}
    for tag in sorted({record["tag"] for record in records}, key=[*TASKS].index):
        of_task = [record for record in records if record["tag"] == tag]
        prompts: dict[Path, list[bool]] = {}
        for record in of_task:
            prompts.setdefault(Path(record["filename"]).parent, []).append(record["correct"])
        tasks[tag] = {
            "prompts": len(prompts),
            "images": len(of_task),
            "images_right": sum(record["correct"] for record in of_task) / len(of_task),
            "prompts_right": sum(map(any, prompts.values())) / len(prompts),
        }
    return tasks


def scores(records: list[Record]) -> dict[str, float]:
    """The score of each task that there are images of, and ``overall``."""
    row = {tag: task["images_right"] for tag, task in by_task(records).items()}
    return row | {"overall": sum(row.values()) / len(row)}


def generated_samples(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Prompts,
    per_prompt: int,
    options: SampleOptions,
    lengths: list[int],
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any],
) -> Iterator[Sample]:
    """Sample an image for each of ``prompts``, which name each prompt ``per_prompt`` times; a series for each length.

    Image ``i`` of all depends on ``seed`` and ``i`` alone. One batch is in memory at a time. Of several processes each
    samples its share.
    """
    for first in own_share(range(0, len(prompts), batch_size)):
        rows = prompts[first : first + batch_size]
        decoded = sample_prefixes(
            generator, tokenizer, rows, options, lengths, seed, batch_size, decode_options, first=first
        )
        for row in range(len(rows)):
            images = {str(length): series[row] for length, series in decoded.items()}
            number, index = divmod(first + row, per_prompt)
            yield number, sample_name(number, index), images


def real_samples(dataset: Dataset, prompts: int, per_prompt: int) -> Iterator[Sample]:
    """Images of ``dataset`` in order, which know nothing of the prompts that they stand for: what chance gives.

    Of several processes each gets its share.
    """
    for place in own_share(range(prompts * per_prompt)):
        number, index = divmod(place, per_prompt)
        image = to_uint8(dataset.get(place % len(dataset))["image"])
        yield number, sample_name(number, index), {"real": image}


def stored_samples(files: list[list[Path]]) -> Iterator[Sample]:
    """The image files of each prompt; of several processes, the share of this one."""
    for number, file in own_share([(number, file) for number, of_prompt in enumerate(files) for file in of_prompt]):
        yield number, str(file), {"unknown": read_image(file)}


def kept_samples(samples: Iterable[Sample], folder: Path, entries: list[Entry]) -> Iterator[Sample]:
    """``samples``, of which the last series is written to ``folder`` as the original's evaluator reads it."""
    for number, name, images in samples:
        *_, image = images.values()
        save_png(to_pil(image), folder / name)
        if name == sample_name(number, 0):
            write_text((folder / name).parents[1] / METADATA, json.dumps(entries[number]) + "\n")
        yield number, name, images


def some_of_each(entries: list[Entry], most: int) -> list[int]:
    """Places of at most ``most`` entries of each task, evenly spaced, in order."""
    tasks: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        tasks.setdefault(entry["tag"], []).append(place)
    return sorted(place for places in tasks.values() for place in spread(places, min(most, len(places))))


def picture(rows: list[list[tuple[Record, UInt8[Tensor, "3 H W"]]]]) -> Image.Image:
    """A row for each prompt: its images, framed green where right and red where wrong."""
    columns = max(map(len, rows))
    cells = [[_framed(image, record["correct"]) for record, image in row] for row in rows]
    blank = torch.full_like(cells[0][0], 255)
    grid = torch.stack([torch.stack(row + [blank] * (columns - len(row))) for row in cells])
    labels = [f"{row[0][0]['tag']}: {row[0][0]['prompt']}" for row in rows]
    return labelled_grid(grid, labels, [""] * columns)


def _framed(image: UInt8[Tensor, "3 H W"], right: bool) -> UInt8[Tensor, "3 h w"]:
    side_px = min(image.shape[-1], _MOST_CELL_PX)
    small = F.interpolate(image[None].float(), (side_px, side_px), mode="area")[0].round().to(torch.uint8)
    width_px = max(1, side_px // 20)
    color = torch.tensor(ImageColor.getrgb("limegreen" if right else "crimson"), dtype=torch.uint8)
    frame = color[:, None, None].repeat(1, side_px + 2 * width_px, side_px + 2 * width_px)
    frame[:, width_px:-width_px, width_px:-width_px] = small
    return frame


# ---- files -----------------------------------------------------------------------------------------------------


def read_metadata(path: Path) -> list[Entry]:
    """The entries of a ``.jsonl`` file, one in each line.

    Raises:
        UserError: if the file is missing or a line is no entry.
    """
    entries = _read_lines(path)
    if not entries:
        raise UserError(f"{path} holds no prompts")
    for number, entry in enumerate(entries, start=1):
        if trouble := _trouble(entry):
            raise UserError(f"{path}, line {number}: {trouble}")
    return entries


def read_results(path: Path) -> list[Record]:
    """The images of a results file, of this program or of the original.

    Raises:
        UserError: if the file is missing or a line is no result.
    """
    records = _read_lines(path)
    if not records:
        raise UserError(f"{path} holds no results")
    for number, record in enumerate(records, start=1):
        if missing := [key for key in ("filename", "tag", "correct") if key not in record]:
            raise UserError(f"{path}, line {number}: no {missing[0]!r}: that is no result of GenEval")
        if record["tag"] not in TASKS:
            raise UserError(f"{path}, line {number}: no task {record['tag']!r} (valid: {', '.join(TASKS)})")
    return records


def save_results(path: Path, records: list[Record]) -> None:
    """Write one line for each image; ``path`` is whole or absent."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def sample_name(number: int, index: int) -> str:
    """Where image ``index`` of prompt ``number`` lies in a folder of samples."""
    return f"{number:05d}/samples/{index:04d}.png"


def read_samples(folder: Path, entries: list[Entry] | None = None) -> tuple[list[Entry], list[list[Path]]]:
    """The entry and the image files of each prompt of a folder of samples.

    Args:
        folder: of :func:`kept_samples`, or of any sampler that keeps to the original's layout.
        entries: what must have been sampled; by default whatever the folder says.

    Raises:
        UserError: if a prompt has no images, or is not the one that ``entries`` names.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    folders = {int(path.name): path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()}
    files = {
        number: sorted(
            (file for file in (path / "samples").glob("*.png") if re.fullmatch(r"\d+", file.stem)),
            key=lambda file: int(file.stem),
        )
        for number, path in folders.items()
        if (path / METADATA).is_file()
    }
    wanted = range(len(entries) if entries is not None else max(folders, default=0) + 1)
    if missing := [number for number in wanted if not files.get(number)]:
        few = ", ".join(f"{number:05d}" for number in missing[:5]) + ", ..." * (len(missing) > 5)
        raise UserError(
            f"{folder} lacks the images of {len(missing)} of {len(wanted)} prompts: {few} "
            f"(each is a folder with {METADATA} and samples/0000.png ...)"
        )
    found = [read_metadata(folders[number] / METADATA)[0] for number in wanted]
    for number, (entry, want) in enumerate(zip(found, entries or found)):
        if entry != want:
            raise UserError(f"{folders[number]} was made for {entry['prompt']!r}, not for {want['prompt']!r}")
    return found, [files[number] for number in wanted]


def read_image(path: Path) -> UInt8[Tensor, "3 H W"]:
    """An image file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not one JSON object in each line: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path} is not one JSON object in each line")
    return lines


def _trouble(entry: Entry) -> str:
    """Why ``entry`` is none; empty if it is one."""
    for key, kind in (("tag", str), ("prompt", str), ("include", list)):
        if not isinstance(entry.get(key), kind):
            return f"no {key!r} ({kind.__name__})"
    if entry["tag"] not in TASKS:
        return f"no task {entry['tag']!r} (valid: {', '.join(TASKS)})"
    for place, clause in enumerate(entry["include"] + entry.get("exclude", [])):
        if not isinstance(clause.get("class"), str) or not isinstance(clause.get("count"), int):
            return f"a clause needs a class and a count, got {clause}"
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or not 0 <= target < place:
                return f"position must be one of {', '.join(RELATIONS)} to an earlier clause, got {clause['position']}"
    return ""
