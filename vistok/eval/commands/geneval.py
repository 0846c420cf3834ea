"""``geneval``: score a generator, images of a folder or a results file on the six tasks of GenEval."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from vistok.cli import flag_for, positive_int
from vistok.config import parse_overrides
from vistok.data.datamodule import Dataset, PromptedDataset, load_images
from vistok.errors import UserError
from vistok.eval import geneval
from vistok.eval.commands.flags import refuse_given
from vistok.eval.commands.output import console, new_table, progress_bar, show, write
from vistok.eval.commands.prompted import (
    PromptedGenerator,
    add_prompted_flags,
    only_keep,
    prompted_protocol,
    show_by_tokens,
    show_overview,
)
from vistok.eval.detectors import Detector, LearnedDetector, WorldDetector, self_test
from vistok.eval.features import sha256_of
from vistok.eval.images import read_rgb
from vistok.eval.processes import is_first
from vistok.eval.protocol import EvalProtocol
from vistok.geneval_rules import TASKS, Rules, spread
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
    source.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="results.jsonl, also of the original: its boxes are judged again, verdicts on colours stay",
    )
    prompts = parser.add_mutually_exclusive_group()
    add = parser.add_argument
    judging = [
        prompts.add_argument("--data", help="shapes: the prompts and the detector of a procedural world"),
        prompts.add_argument(
            "--metadata", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl, or prompts of its form"
        ),
        add(
            "--detector",
            metavar="DIR",
            help="for photographs: folder or hub repository of a Mask2Former (as in the original, without mmdet), "
            "DETR, OWLv2 or Grounding DINO of transformers",
        ),
        add(
            "--color-model",
            metavar="DIR",
            help="folder or hub repository of a CLIP (original: openai/clip-vit-large-patch14)",
        ),
        add("--data-args", nargs="*", default=[], metavar="key=value", help="as data.args of train.py"),
        add(
            "--split",
            default="val",
            choices=("train", "val"),
            help="colours asked for: held-out pairs or not (default: val)",
        ),
        add("--most-per-task", type=positive_int, metavar="N", help="of each task only so many, for a quick look"),
    ]
    for name, text in THRESHOLDS.items():
        add(f"--{name.replace('_', '-')}", type=float, metavar="P", help=text)
    drawing = add_prompted_flags(parser, per_prompt=4, layout="geneval_images/00000/samples/0000.png")
    parser.set_defaults(judging=judging, drawing=drawing)


@flag_for("data.args.", "--data-args ")
@flag_for("on_long=", "--long-prompts ")
def run(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on GenEval's six tasks."""
    if args.results:
        refuse_given(args, args.judging + args.drawing, "--results")
        _score_results(args)
    elif args.images:
        refuse_given(args, args.drawing, "--images")
        _score_folder(args)
    else:
        _score_generator(args)


def _score_generator(args: argparse.Namespace) -> None:
    source = PromptedGenerator(args, "geneval")
    if not (args.data or args.metadata):
        raise UserError("--checkpoint needs prompts: --data shapes, or --metadata FILE")
    benchmark = _benchmark(args, source.image_size_px)
    prompts = source.read([entry["prompt"] for entry in benchmark.entries.values()])
    chance = _chance(benchmark, args.count_per_prompt)
    overview = {}
    for option, out, folder in source.runs:
        started = time.perf_counter()
        samples = source.samples(prompts, option, list(benchmark.entries))
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
        scores = _save_scores(args, out, started, protocol, records, benchmark.said, picture, chance)
        overview[f"{option.cfg_scale:g}"] = scores
    show_overview("GenEval", overview)


def _score_folder(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    first = next(file for of_prompt in geneval.find_samples(args.images).values() for file in of_prompt)
    size = read_rgb(first).shape[-1]
    benchmark = _benchmark(args, size)
    _, files = geneval.read_samples(args.images, benchmark.entries)
    if benchmark.detector is None:
        raise UserError("--images needs who judges them: --data shapes, or --detector DIR for photographs")
    count = sum(map(len, files.values()))
    with progress_bar("judge", count) as bar:
        samples = geneval.stored_samples(files)
        records, picture = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
    protocol = _protocol(args, benchmark, benchmark.detector, count, size, {}, {})
    _save_scores(args, args.out or args.images, started, protocol, records, benchmark.said, picture)


def _score_results(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    records = geneval.read_results(args.results)
    # The boxes in a file are those that counted: by default none is left out again.
    rules = replace(Rules(0.0, 0.0), **_thresholds(args))  # type: ignore[arg-type]
    verdicts = [geneval.verdict(record, rules) for record in records]
    same = [record["correct"] == verdict for record, verdict in zip(records, verdicts) if verdict is not None]
    said = {
        "verdicts": f"{sum(same)} of {len(same)} stored verdicts are what these rules give on the stored boxes; "
        f"as stored, since a colour is asked for or no boxes are there: {len(records) - len(same)}"
    }
    judged = [
        record if verdict is None else record | {"correct": verdict} for record, verdict in zip(records, verdicts)
    ]
    prompts = geneval.tally(records)["prompts"]
    data = {"name": "results file", "split": "all", "prompts": prompts, "sha256": sha256_of(args.results)}
    definitions = geneval.DEFINITIONS | {"rules": asdict(rules)}
    protocol = prompted_protocol(
        args, "geneval", data, len(records), 0, {"name": "unknown detector"}, definitions, {}, {}
    )
    out = args.out or Path(f"{args.results.with_suffix('')}_eval")
    _save_scores(args, out, started, protocol, {"unknown": judged}, said)


def _thresholds(args: argparse.Namespace) -> dict[str, float]:
    return {name: getattr(args, name) for name in THRESHOLDS if getattr(args, name) is not None}


def _benchmark(args: argparse.Namespace, image_size_px: int) -> geneval.Benchmark:
    """The prompts that the command line names, or else those of its images, and who judges these."""
    thresholds = _thresholds(args)
    said = {}
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
        listed = [entry for task, count in TASKS.items() for entry in spread(tasks[task], count)]
    else:
        stored = args.metadata is None
        listed = [*geneval.read_samples(args.images)[0].values()] if stored else geneval.read_metadata(args.metadata)
        data = {"name": "metadata", "split": "all"}
        if args.detector:
            detector = learned = LearnedDetector(args.detector, args.color_model, args.device, thresholds)
            learned.check(listed)
            said["self_test"] = self_test(learned)
            console.print(said["self_test"], highlight=False, soft_wrap=True)
        elif args.checkpoint and not args.save_images:
            raise UserError(
                "--metadata needs who judges the images: --detector DIR, such as a copy of "
                "facebook/mask2former-swin-small-coco-instance; or only keep them with --save-images"
            )
    entries = dict(enumerate(listed))
    if args.most_per_task:
        if not (args.data or args.metadata):
            raise UserError(f"--most-per-task is for --data and --metadata: {args.images} has its own prompts")
        entries = geneval.some_of_each(entries, args.most_per_task)
    return geneval.Benchmark(entries, detector, data, world, said)


def _chance(benchmark: geneval.Benchmark, per_prompt: int) -> dict[str, float]:
    """Scores of real images that were not made for the prompts, where the data set of the prompts has images."""
    if benchmark.world is None or benchmark.detector is None:
        return {}
    samples = geneval.real_samples(benchmark.world, list(benchmark.entries), per_prompt)
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
    said: dict[str, str],
    picture: Image.Image | None = None,
    chance: dict[str, float] | None = None,
) -> dict[str, float]:
    """Write and print everything about one set of samples; its scores.

    Without a ``picture`` the records exist already, and are not written.
    """
    *_, last = records.values()
    scores = {series: geneval.scores(rows) for series, rows in records.items()}
    counts = {"prompts": protocol.data["prompts"], "samples": len(last)}
    metrics = {"tokens": scores, "tasks": geneval.by_task(last), "all": geneval.tally(last), "counts": counts}
    if chance:
        metrics |= {"held_out": chance, "counts": counts | {"held_out": len(last)}}
    if not is_first():
        return geneval.scores(last)
    if picture:
        geneval.save_results(out / "geneval_results.jsonl", last)
        save_png(picture, out / "geneval.png")
    if lacking := geneval.shortfall(last):
        said = said | {"shortfall": lacking}
    path = write(args, out, started, protocol, metrics, said)
    size = f" · {protocol.image_size_px} px" * bool(protocol.image_size_px)
    title = f"GenEval by the {protocol.features['name']} · N={protocol.count}{size}"
    show(_task_table(f"{title} · protocol {protocol.fingerprint}", last, chance), [*said.values()], path)
    show_by_tokens("GenEval", metrics)
    return geneval.scores(last)


def _task_table(title: str, records: list[geneval.Record], chance: dict[str, float] | None) -> Table:
    by_chance = {"real images of other prompts": chance} if chance else {}
    table = new_table(title, ["task", "prompts", "images", "images right", "prompts with one right", *by_chance])

    def add(name: str, row: dict[str, float], task: str = "") -> None:
        shares = (f"{row[key]:.3f}" if key in row else "" for key in ("images_right", "prompts_right"))
        given = (f"{scores[task]:.3f}" if task else "" for scores in by_chance.values())
        table.add_row(name, *(str(row.get(key, "")) for key in ("prompts", "images")), *shares, *given)

    for task, row in geneval.by_task(records).items():
        add(task, row, task)
    table.add_section()
    add("overall, mean of tasks", {"images_right": geneval.scores(records)["overall"]}, "overall")
    add("all images and prompts", geneval.tally(records))
    return table
