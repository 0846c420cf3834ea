"""GenEval: how often a generator shows what a prompt asks for, task by task.

Every image is judged by :mod:`vistok.geneval_rules` from the objects that a detector finds in it. A task's score is the
share of its images that are right, the overall score the unweighted mean of the tasks. Files are those of the original:
a line of metadata for each prompt, a folder of samples for each prompt, a line of results for each image.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageColor
from torch import Tensor

from vistok.data.datamodule import Dataset
from vistok.errors import UserError, first_line
from vistok.eval.detectors import Detector
from vistok.eval.images import stored_images
from vistok.eval.processes import groups_of_all, own_share
from vistok.files import write_text
from vistok.geneval_rules import RELATIONS, TASKS, Detection, Entry, Rules, counted, faults, spread
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
"""One image as the original's results have it: ``filename, tag, prompt, correct, reason, metadata, details``.

The last two are JSON text: the entry, and ``{class: [[left, top, right, bottom, score], ...]}`` of what counts.
"""

Sample = tuple[int, str, dict[str, UInt8[Tensor, "3 H W"]]]
"""Number of its prompt, file name, and an image in each series (such as: decoded from 4 tokens, from 16)."""


def judge(detector: Detector, image: UInt8[Tensor, "3 H W"], entry: Entry, filename: str) -> Record:
    """Whether ``image`` is right, and why not."""
    found = detector.detect(image, entry)
    lines = faults(found, entry, detector.rules, lambda group: detector.colors(image, group))
    objects = counted(found, entry["tag"], detector.rules)
    boxes = {name: [[*map(float, (*one.box, one.score))] for one in group] for name, group in objects.items() if group}
    return {
        "filename": filename,
        "tag": entry["tag"],
        "prompt": entry["prompt"],
        "correct": not lines,
        "reason": "; ".join(lines),
        "metadata": json.dumps(entry),
        "details": json.dumps(boxes),
    }


def verdict(record: Record, rules: Rules) -> bool | None:
    """Whether an image is right by its boxes in a record; None if there are none, or for a colour, which no box tells.

    Args:
        record: of :func:`read_results`.
        rules: the boxes are those that counted when the record was made; other rules may leave out more of them.
    """
    entry, boxes = _json_of(record, "metadata"), _json_of(record, "details")
    if entry is None or boxes is None or any("color" in clause for clause in entry["include"]):
        return None
    found = [Detection(name, score, tuple(box)) for name, rows in boxes.items() for *box, score in rows]
    return not faults(found, entry, rules, lambda group: [])


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and who judges their images.

    Args:
        entries: the prompts, by their number.
        detector: finds objects; None where images are only made.
        data: where the prompts come from.
        world: data set that the prompts come from, if one does.
        said: lines about the detector for whoever reads the scores, by name.
    """

    entries: dict[int, Entry]
    detector: Detector | None
    data: dict[str, Any]
    world: Dataset | None = None
    said: dict[str, str] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, Any]:
        """What identifies the prompts."""
        digest = hashlib.sha256(json.dumps([*self.entries.values()]).encode()).hexdigest()
        return self.data | {"prompts": len(self.entries), "prompts_sha256": digest[:12]}


def measure_geneval(
    detector: Detector,
    entries: dict[int, Entry],
    samples: Iterable[Sample],
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, list[Record]], Image.Image]:
    """Judge every image, and show some.

    Of several processes each judges its share of the samples and gets the records of all of them, in order.

    Args:
        detector: finds objects.
        entries: the prompts, by their number.
        samples: of each prompt in turn, at least one.
        progress: called with the number of samples judged since the last call.

    Returns:
        Records of each series of images, and :func:`picture` of the last series.
    """
    records: dict[str, list[Record]] = {}
    shown: dict[int, list[tuple[Record, Tensor]]] = {number: [] for number in some_of_each(entries, _SHOWN_PER_TASK)}
    for number, filename, images in samples:
        for series, image in images.items():
            record = judge(detector, image, entries[number], filename)
            records.setdefault(series, []).append(record)
        if number in shown:
            shown[number].append((record, image.clone()))  # not the whole batch that it is a view of
        if progress:
            progress(1)
    return groups_of_all(records), picture(list(groups_of_all(shown).values()))


def tally(records: list[Record]) -> dict[str, float]:
    """``{"prompts", "images", "images_right", "prompts_right"}``; prompts are told apart by folders."""
    prompts: dict[Path, list[bool]] = {}
    for record in records:
        prompts.setdefault(Path(record["filename"]).parent, []).append(record["correct"])
    return {
        "prompts": len(prompts),
        "images": len(records),
        "images_right": sum(record["correct"] for record in records) / len(records),
        "prompts_right": sum(map(any, prompts.values())) / len(prompts),
    }


def by_task(records: list[Record]) -> dict[str, dict[str, float]]:
    """The :func:`tally` of each task that there are images of."""
    tasks = {tag: [record for record in records if record["tag"] == tag] for tag in TASKS}
    return {tag: tally(of_task) for tag, of_task in tasks.items() if of_task}


def shortfall(records: list[Record]) -> str:
    """What the records lack of the whole benchmark, in a line; empty if nothing."""
    tasks, prompts = len(by_task(records)), tally(records)["prompts"]
    if tasks == len(TASKS) and prompts >= sum(TASKS.values()):
        return ""
    return (
        f"{tasks} of {len(TASKS)} tasks and {prompts} of {sum(TASKS.values())} prompts were scored: "
        "this is no score of the whole benchmark"
    )


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
    numbers: Sequence[int] | None = None,
) -> Iterator[Sample]:
    """Sample an image for each of ``prompts``, which name each prompt ``per_prompt`` times; a series for each length.

    Prompts are numbered in order, or by ``numbers``, one for each. Image ``i`` of all depends on ``seed`` and ``i``
    alone. One batch is in memory at a time. Of several processes each samples its share.
    """
    for first in own_share(range(0, len(prompts), batch_size)):
        rows = prompts[first : first + batch_size]
        decoded = sample_prefixes(
            generator, tokenizer, rows, options, lengths, seed, batch_size, decode_options, first=first
        )
        for row in range(len(rows)):
            images = {str(length): series[row] for length, series in decoded.items()}
            place, index = divmod(first + row, per_prompt)
            number = numbers[place] if numbers else place
            yield number, sample_name(number, index), images


def real_samples(dataset: Dataset, numbers: Sequence[int], per_prompt: int) -> Iterator[Sample]:
    """Images of ``dataset`` in order, which know nothing of the prompts that they stand for: what chance gives.

    Of several processes each gets its share.
    """
    for place in own_share(range(len(numbers) * per_prompt)):
        prompt, index = divmod(place, per_prompt)
        image = to_uint8(dataset.get(place % len(dataset))["image"])
        yield numbers[prompt], sample_name(numbers[prompt], index), {"real": image}


def stored_samples(files: dict[int, list[Path]]) -> Iterator[Sample]:
    """The image files of each prompt, by :func:`~vistok.eval.images.stored_images`."""
    for number, file, image in stored_images(files):
        yield number, str(file), {"unknown": image}


def kept_samples(samples: Iterable[Sample], folder: Path, entries: dict[int, Entry]) -> Iterator[Sample]:
    """``samples``, of which the last series is written to ``folder`` as the original's evaluator reads it."""
    for number, name, images in samples:
        *_, image = images.values()
        save_png(to_pil(image), folder / name)
        if name == sample_name(number, 0):
            write_text((folder / name).parents[1] / METADATA, json.dumps(entries[number]) + "\n")
        yield number, name, images


def some_of_each(entries: dict[int, Entry], most: int) -> dict[int, Entry]:
    """At most ``most`` entries of each task, evenly spaced, in order and with the numbers that they have."""
    tasks: dict[str, list[int]] = {}
    for number, entry in entries.items():
        tasks.setdefault(entry["tag"], []).append(number)
    return {n: entries[n] for n in sorted(n for of in tasks.values() for n in spread(of, min(most, len(of))))}


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
    return _read_lines(path, "prompts", _trouble)


def read_results(path: Path) -> list[Record]:
    """The images of a results file, of this program or of the original.

    Raises:
        UserError: if the file is missing or a line is no result.
    """
    return _read_lines(path, "results", _trouble_of_result)


def save_results(path: Path, records: list[Record]) -> None:
    """Write one line for each image; ``path`` is whole or absent."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def sample_name(number: int, index: int) -> str:
    """Where image ``index`` of prompt ``number`` lies in a folder of samples."""
    return f"{number:05d}/samples/{index:04d}.png"


def find_samples(folder: Path) -> dict[int, list[Path]]:
    """The image files of each prompt of a folder of samples, by its number; none where its metadata are missing.

    Raises:
        UserError: if there are no images at all.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    files: dict[int, list[Path]] = {}
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    for path in sorted(folders, key=lambda path: int(path.name)):
        images = [file for file in (path / "samples").glob("*.png") if re.fullmatch(r"\d+", file.stem)]
        of_prompt = sorted(images, key=lambda file: int(file.stem))
        files[int(path.name)] = of_prompt if (path / METADATA).is_file() else []
    if not any(files.values()):
        raise UserError(f"{folder} holds no images of prompts, such as 00000/samples/0000.png beside 00000/{METADATA}")
    return files


def read_samples(
    folder: Path, entries: dict[int, Entry] | None = None
) -> tuple[dict[int, Entry], dict[int, list[Path]]]:
    """The entry and the image files of each prompt of a folder of samples, by its number.

    Args:
        folder: of :func:`kept_samples`, or of any sampler that keeps to the original's layout.
        entries: what must have been sampled; by default whatever the folder says.

    Raises:
        UserError: if a prompt has no images, or is not the one that ``entries`` names.
    """
    files = find_samples(folder)
    wanted = range(max(files) + 1) if entries is None else list(entries)
    if missing := [number for number in wanted if not files.get(number)]:
        few = ", ".join(f"{number:05d}" for number in missing[:5]) + ", ..." * (len(missing) > 5)
        raise UserError(
            f"{folder} lacks the images of {len(missing)} of {len(wanted)} prompts: {few} "
            f"(each is a folder with {METADATA} and samples/0000.png ...; some of each task were made with "
            "--most-per-task: give it and the prompts again)"
        )
    folders = {number: files[number][0].parents[1] for number in wanted}
    found = {number: read_metadata(path / METADATA)[0] for number, path in folders.items()}
    for number, want in (entries or {}).items():
        if found[number] != want:
            raise UserError(f"{folders[number]} was made for {found[number]['prompt']!r}, not for {want['prompt']!r}")
    return found, {number: files[number] for number in wanted}


def _read_lines(path: Path, what: str, trouble: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The JSON object in each line, of which none has ``trouble``; ``what`` names them in messages."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from None
        if said := trouble(found[-1]) if isinstance(found[-1], dict) else "no JSON object":
            raise UserError(f"{path}, line {number}: {said}")
    if not found:
        raise UserError(f"{path} holds no {what}")
    return found


def _trouble(entry: Any) -> str:
    """Why ``entry`` is none; empty if it is one."""
    match entry:
        case {"tag": str(tag)} if tag not in TASKS:
            return f"no task {tag!r} (valid: {', '.join(TASKS)})"
        case {"tag": str(), "prompt": str(), "include": [*clauses]} if isinstance(entry.get("exclude", []), list):
            clauses += entry.get("exclude", [])
        case _:
            return "needed are 'tag' and 'prompt' (text), 'include' and, if there, 'exclude' (lists)"
    for place, clause in enumerate(clauses):
        match clause:
            case {"color": color} if not isinstance(color, str):
                return f"a color is text, got {color}"
            case {"class": str(), "count": int(count)} if count > 0:
                pass
            case _:
                return f"a clause needs a class and a count, got {clause}"
        match clause:
            case {"position": [str(relation), int(target)]} if relation in RELATIONS and 0 <= target < place:
                pass
            case {"position": other}:
                return f"position must be one of {', '.join(RELATIONS)} to an earlier clause, got {other}"
    return ""


def _trouble_of_result(record: Any) -> str:
    """Why ``record`` is none; empty if it is one."""
    match record:
        case {"tag": str(tag)} if tag not in TASKS:
            return f"no task {tag!r} (valid: {', '.join(TASKS)})"
        case {"filename": str(), "tag": str(), "correct": bool()}:
            pass
        case _:
            return "a result of GenEval has 'filename' and 'tag' (text) and 'correct' (true or false)"
    try:
        entry, boxes = (_json_of(record, key) for key in ("metadata", "details"))
    except (TypeError, ValueError):
        return "'metadata' and 'details' must be JSON text"
    if entry is not None and (said := _trouble(entry)):
        return f"metadata: {said}"
    match boxes:
        case None:
            return ""
        case dict() if all(isinstance(rows, list) and all(map(_is_box, rows)) for rows in boxes.values()):
            return ""
    return "'details' must be boxes of classes, {class: [[left, top, right, bottom, score], ...]}"


def _is_box(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 5 and all(isinstance(value, int | float) for value in row)


def _json_of(record: Record, key: str) -> Any:
    """What the JSON text ``key`` of a record says; None if there is none."""
    return json.loads(record[key]) if key in record else None
