"""``geneval``: score a generator, images of a folder or a results file on the six tasks of GenEval."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from vistok.cli import flag_for, positive_int
from vistok.config import parse_overrides
from vistok.data.datamodule import Dataset, PromptedDataset, load_images
from vistok.errors import UserError
from vistok.eval import geneval
from vistok.eval.commands.output import console, new_table, progress_bar, show, write
from vistok.eval.commands.prompted import (
    PromptedGenerator,
    add_prompted_flags,
    only_keep,
    prompted_protocol,
    show_overview,
)
from vistok.eval.detectors import Detector, LearnedDetector, WorldDetector, self_test
from vistok.eval.processes import is_first
from vistok.eval.protocol import EvalProtocol, table_by_tokens
from vistok.geneval_rules import TASKS, Entry, spread
from vistok.pictures import save_png

HELP = "share of images that show what a prompt asks for, in GenEval's six tasks"
EXAMPLES = (
    "python -m vistok.eval geneval --checkpoint runs/shapes/gpt_text --data shapes --cfg-scale 1,2,4",
    "python -m vistok.eval geneval --images DIR --metadata evaluation_metadata.jsonl --detector DIR --color-model DIR",
    "python -m vistok.eval geneval --results results.jsonl",
)

THRESHOLDS = {
    "min_score": "objects must be surer than that (default: that of the detector; Mask2Former 0.3)",
    "min_counting_score": "the same where they are counted (default: that of the detector; Mask2Former 0.9)",
    "nms_iou": "overlap from which on two objects of a class are one; 1 never (default: 1)",
}
"""Fields of :class:`~vistok.geneval_rules.Rules` that have a flag."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="run or export folder of a generator")
    source.add_argument("--images", type=Path, metavar="DIR", help="samples that exist: DIR/00000/samples/0000.png ...")
    source.add_argument("--results", type=Path, metavar="FILE", help="only add up a results.jsonl")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--data", help="shapes: the prompts and the detector of a procedural world")
    prompts.add_argument(
        "--metadata", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl, or prompts of its form"
    )
    parser.add_argument(
        "--detector",
        metavar="DIR",
        help="for photographs: folder or hub repository of a Mask2Former (as in the original, without mmdet), DETR, "
        "OWLv2 or Grounding DINO of transformers",
    )
    parser.add_argument(
        "--color-model",
        metavar="DIR",
        help="folder or hub repository of a CLIP (original: openai/clip-vit-large-patch14)",
    )
    for name, text in THRESHOLDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="P", help=text)
    parser.add_argument("--data-args", nargs="*", default=[], metavar="key=value", help="as data.args of train.py")
    parser.add_argument(
        "--split",
        default="val",
        choices=("train", "val"),
        help="colours asked for: held-out pairs or not (default: val)",
    )
    parser.add_argument(
        "--most-per-task", type=positive_int, metavar="N", help="of each task only so many prompts, for a quick look"
    )
    add_prompted_flags(parser, per_prompt=4, layout="geneval_images/00000/samples/0000.png")


@flag_for("data.args.", "--data-args ")
def run(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on GenEval's six tasks."""
    if args.results:
        show(_task_table(str(args.results), geneval.read_results(args.results)), [])
    elif args.images:
        _score_folder(args)
    else:
        _score_generator(args)


def _score_generator(args: argparse.Namespace) -> None:
    source = PromptedGenerator(args, "geneval")
    if not (args.data or args.metadata):
        raise UserError("--checkpoint needs prompts: --data shapes, or --metadata FILE")
    benchmark = _benchmark(args, source.image_size_px, [])
    prompts = source.read([entry["prompt"] for entry in benchmark.entries])
    chance = _chance(benchmark, args.count_per_prompt)
    overview = {}
    for option, out, folder in source.runs:
        started = time.perf_counter()
        samples = source.samples(prompts, option)
        if folder:
            samples = geneval.kept_samples(samples, folder, benchmark.entries)
        if benchmark.detector is None:
            only_keep(samples, len(prompts), folder, "--detector")
            continue
        with progress_bar("sample and judge", len(prompts)) as bar:
            records, picture = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
        settings = source.settings(option)
        protocol = _protocol(
            args, benchmark, benchmark.detector, len(prompts), source.image_size_px, settings, source.parts
        )
        overview[f"{option.cfg_scale:g}"] = _save_scores(args, out, started, protocol, records, picture, chance)
    show_overview("GenEval", overview)


def _score_folder(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    stored, files = geneval.read_samples(args.images)
    size = geneval.read_image(files[0][0]).shape[-1]
    benchmark = _benchmark(args, size, stored)
    _, files = geneval.read_samples(args.images, benchmark.entries)
    if benchmark.detector is None:
        raise UserError("--images needs who judges them: --data shapes, or --detector DIR for photographs")
    count = sum(map(len, files))
    with progress_bar("judge", count) as bar:
        samples = geneval.stored_samples(files)
        records, picture = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
    protocol = _protocol(args, benchmark, benchmark.detector, count, size, {}, {})
    _save_scores(args, args.out or args.images, started, protocol, records, picture, {})


def _benchmark(args: argparse.Namespace, image_size_px: int, stored: list[Entry]) -> geneval.Benchmark:
    """The prompts that the command line names, or else ``stored``, and who judges their images."""
    thresholds = {name: getattr(args, name) for name in THRESHOLDS if getattr(args, name) is not None}
    world: Dataset | None = None
    detector: Detector | None = None
    if args.data:
        if args.detector:
            raise UserError(f"--detector is for photographs: --data {args.data} reads its own images")
        world = load_images(args.data, args.split, image_size_px, parse_overrides(args.data_args))
        if not isinstance(world, PromptedDataset):
            raise UserError(f"--data {args.data} knows no prompts of GenEval's tasks (shapes does)")
        detector = WorldDetector(world, thresholds)
        tasks, data = world.geneval_prompts(), world.description
        entries = [entry for task, count in TASKS.items() for entry in spread(tasks[task], count)]
    else:
        entries = geneval.read_metadata(args.metadata) if args.metadata else stored
        data = {"name": "metadata", "split": "all"}
        if args.detector:
            detector = learned = LearnedDetector(args.detector, args.color_model, args.device, thresholds)
            learned.check(entries)
            console.print(self_test(learned), highlight=False, soft_wrap=True)
        elif args.checkpoint and not args.save_images:
            raise UserError(
                "--metadata needs who judges the images: --detector DIR, such as a copy of "
                "facebook/mask2former-swin-small-coco-instance; or only keep them with --save-images"
            )
    if args.most_per_task:
        if not (args.data or args.metadata):
            raise UserError(f"--most-per-task is for --data and --metadata: {args.images} has its own prompts")
        entries = [entries[place] for place in geneval.some_of_each(entries, args.most_per_task)]
    return geneval.Benchmark(entries, detector, data, world)


def _chance(benchmark: geneval.Benchmark, per_prompt: int) -> dict[str, float]:
    """Scores of real images that were not made for the prompts, where the data set of the prompts has images."""
    if benchmark.world is None or benchmark.detector is None:
        return {}
    samples = geneval.real_samples(benchmark.world, len(benchmark.entries), per_prompt)
    with progress_bar("judge real images", len(benchmark.entries) * per_prompt) as bar:
        records, _ = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
    return geneval.scores(*records.values())


def _protocol(
    args: argparse.Namespace,
    benchmark: geneval.Benchmark,
    detector: Detector,
    count: int,
    image_size_px: int,
    settings: dict[str, Any],
    parts: dict[str, Path],
) -> EvalProtocol:
    definitions = geneval.DEFINITIONS | {"rules": asdict(detector.rules)}
    data = benchmark.description
    return prompted_protocol(
        args, "geneval", data, count, image_size_px, detector.identity, definitions, settings, parts
    )


def _save_scores(
    args: argparse.Namespace,
    out: Path,
    started: float,
    protocol: EvalProtocol,
    records: dict[str, list[geneval.Record]],
    picture: Image.Image,
    chance: dict[str, float],
) -> dict[str, float]:
    """Write and print everything about one set of samples; its scores."""
    *_, last = records.values()
    scores = {series: geneval.scores(rows) for series, rows in records.items()}
    counts = {"prompts": protocol.data["prompts"], "samples": len(last)}
    metrics = {"tokens": scores, "tasks": geneval.by_task(last), "counts": counts}
    if chance:
        metrics |= {"held_out": chance, "counts": counts | {"held_out": len(last)}}
    if not is_first():
        return geneval.scores(last)
    geneval.save_results(out / "geneval_results.jsonl", last)
    save_png(picture, out / "geneval.png")
    path = write(args, out, started, protocol, metrics)
    title = f"GenEval by the {protocol.features['name']} · N={protocol.count} · {protocol.image_size_px} px"
    show(_task_table(f"{title} · protocol {protocol.fingerprint}", last, chance), [], path)
    if len(records) > 1:
        columns, rows = table_by_tokens(metrics)
        table = new_table("GenEval by number of tokens", columns)
        for row in rows:
            table.add_row(*row)
        show(table, [])
    return geneval.scores(last)


def _task_table(title: str, records: list[geneval.Record], chance: dict[str, float] | None = None) -> Table:
    by_chance = ["real images of other prompts"] * bool(chance)
    table = new_table(title, ["task", "prompts", "images", "images right", "prompts with one right", *by_chance])

    def add(name: str, values: list[str], score: float, task: str) -> None:
        table.add_row(name, *values[:2], f"{score:.3f}", *values[2:], *([f"{chance[task]:.3f}"] if chance else []))

    for task, row in geneval.by_task(records).items():
        numbers = [str(row["prompts"]), str(row["images"]), f"{row['prompts_right']:.3f}"]
        add(task, numbers, row["images_right"], task)
    table.add_section()
    add("overall, the mean", ["", "", ""], geneval.scores(records)["overall"], "overall")
    return table
