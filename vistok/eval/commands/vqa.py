"""What ``dpg``, ``genai`` and ``compbench`` share: a judge is asked about images of a folder or of a generator."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vistok.cli import flag_for, positive_int
from vistok.errors import UserError
from vistok.eval import vqa
from vistok.eval.commands.flags import refuse_given
from vistok.eval.commands.output import new_table, progress_bar, show, write
from vistok.eval.commands.prompted import (
    PromptedGenerator,
    add_prompted_flags,
    only_keep,
    prompted_protocol,
    show_by_tokens,
    show_overview,
)
from vistok.eval.geneval import Sample
from vistok.eval.images import read_rgb
from vistok.eval.judges import Judge, load_judge
from vistok.eval.processes import is_first
from vistok.eval.protocol import EvalProtocol, number
from vistok.files import write_text


def add_vqa_flags(parser: argparse.ArgumentParser, task: str, per_prompt: int, published: str) -> None:
    """Where images come from and who judges them.

    Args:
        parser: of the command.
        task: of the command: names the folder of saved images.
        per_prompt: images of each prompt.
        published: the benchmark's own judge.
    """
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="run or export folder of a generator")
    source.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="samples that exist: DIR/NAME.png, DIR/NAME/0000.png ... or DIR/NAME_000000.png ...",
    )
    parser.add_argument(
        "--judge",
        metavar="DIR",
        help="folder or hub repository of a model of transformers that answers questions about images: BLIP-VQA, "
        f"BLIP-2, InstructBLIP, LLaVA, Qwen2.5-VL and so on (original: {published})",
    )
    parser.add_argument(
        "--most-prompts", type=positive_int, metavar="N", help="only so many prompts, evenly spaced, for a quick look"
    )
    parser.set_defaults(drawing=add_prompted_flags(parser, per_prompt, f"{task}_images/NAME/0000.png"))


def ask(args: argparse.Namespace, benchmark: vqa.Benchmark, cell_px: int | None = None) -> None:
    """Judge the images that the command line names, or makes, and write and print the scores.

    Args:
        args: the command line.
        benchmark: prompts and questions.
        cell_px: the files of ``--images`` are grids of 2 x 2 images of this side.
    """
    if not args.judge and not (args.checkpoint and args.save_images):
        instead = "; or only keep the images with --save-images" if args.checkpoint else ""
        raise UserError(f"who judges the images? Give --judge DIR, such as a copy of Salesforce/blip-vqa-base{instead}")
    if args.images:
        refuse_given(args, args.drawing, "--images")
        _ask_about_folder(args, benchmark, cell_px)
    else:
        _ask_about_generator(args, benchmark)


def _ask_about_folder(args: argparse.Namespace, benchmark: vqa.Benchmark, cell_px: int | None) -> None:
    started = time.perf_counter()
    files = vqa.find_images(args.images, benchmark.items)
    samples = vqa.stored_samples(files, cell_px)
    judge = load_judge(args.judge, args.device)
    size_px = cell_px or read_rgb(files[0][0]).shape[-1]
    records = _judged(judge, benchmark, samples, sum(map(len, files)) * (4 if cell_px else 1))
    count = len(records["unknown"])
    protocol = _protocol(args, benchmark, count, size_px, judge, {}, {})
    _save_scores(args, args.out or args.images, started, protocol, benchmark, records)


@flag_for("on_long=", "--long-prompts ")
def _ask_about_generator(args: argparse.Namespace, benchmark: vqa.Benchmark) -> None:
    source = PromptedGenerator(args, benchmark.task)
    prompts = source.read([item.text for item in benchmark.items])
    judge = load_judge(args.judge, args.device) if args.judge else None
    overview = {}
    for option, out, folder in source.runs:
        started = time.perf_counter()
        samples = source.samples(prompts, option)
        if folder:
            samples = vqa.kept_samples(samples, folder, benchmark.items)
        if judge is None:
            only_keep(samples, len(prompts), folder, "--judge")
            continue
        records = _judged(judge, benchmark, samples, len(prompts))
        settings = source.settings(option)
        protocol = _protocol(args, benchmark, len(prompts), source.image_size_px, judge, settings, source.parts)
        overview[f"{option.cfg_scale:g}"] = _save_scores(args, out, started, protocol, benchmark, records)
    show_overview(benchmark.title, overview)


def _judged(
    judge: Judge, benchmark: vqa.Benchmark, samples: Iterable[Sample], count: int
) -> dict[str, list[vqa.Record]]:
    with progress_bar("judge", count) as bar:
        return vqa.measure(judge, benchmark.items, samples, bar.update)


def _protocol(
    args: argparse.Namespace,
    benchmark: vqa.Benchmark,
    count: int,
    image_size_px: int,
    judge: Judge,
    settings: dict[str, Any],
    parts: dict[str, Path],
) -> EvalProtocol:
    data, definitions = vqa.describe(benchmark), benchmark.definitions
    more = (judge.identity, definitions, settings, parts)
    return prompted_protocol(args, benchmark.task, data, count, image_size_px, *more)


def _save_scores(
    args: argparse.Namespace,
    out: Path,
    started: float,
    protocol: EvalProtocol,
    benchmark: vqa.Benchmark,
    records: dict[str, list[vqa.Record]],
) -> dict[str, float]:
    """Write and print everything about one set of samples; its scores."""
    *_, last = records.values()
    scores = {series: benchmark.scores(rows) for series, rows in records.items()}
    *_, of_last = scores.values()
    if not is_first():
        return of_last
    counts = {"prompts": len(benchmark.items), "samples": len(last)}
    metrics: dict[str, Any] = {"tokens": scores, "parts": benchmark.parts(last), "counts": counts}
    notes = []
    if agreement := benchmark.agreement(last):
        metrics["agreement"] = agreement
        notes = [f"agreement with people: {', '.join(f'{name} {number(value)}' for name, value in agreement.items())}"]
    write_text(out / f"{benchmark.task}_results.jsonl", "".join(vqa.result_line(record) + "\n" for record in last))
    path = write(args, out, started, protocol, metrics)
    title = f"{benchmark.title} by the judge {protocol.features['name']} · N={protocol.count}"
    table = new_table(
        f"{title} · {protocol.image_size_px} px · protocol {protocol.fingerprint}",
        [benchmark.title, benchmark.counted, "score"],
        [(name, str(part[benchmark.counted]), number(part["score"])) for name, part in metrics["parts"].items()],
    )
    table.add_section()
    table.add_row("overall", "", number(of_last["overall"]))
    show(table, notes, path)
    show_by_tokens(benchmark.title, metrics)
    return of_last
