"""``python -m vistok.eval``: measure tokenizers and generators, compare measurements, write a run's report."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vistok.checkpoint import export_hash, export_info, load_autoencoder, load_text_encoder
from vistok.cli import (
    ArgumentParser,
    add_data_flags,
    add_sampling_flags,
    flag_for,
    main,
    positive_int,
    sampling_flags,
    token_counts,
    usable_device,
)
from vistok.config import parse_overrides
from vistok.data.datamodule import CheckableDataset, Dataset, PromptedDataset, load_images
from vistok.errors import UserError
from vistok.eval import generation, geneval, probe, reconstruction
from vistok.eval.codebook import describe
from vistok.eval.curves import curve_of, plot_by_tokens
from vistok.eval.detectors import Detector, LearnedDetector, WorldDetector, self_test
from vistok.eval.features import SMALL_NETWORKS, WEIGHTS_FOLDER, FeatureNetwork, load_features
from vistok.eval.fid import fid_notes
from vistok.eval.images import image_batches
from vistok.eval.protocol import EvalProtocol, compare, load_result, number, save_result, table_by_tokens
from vistok.eval.report import write_report
from vistok.eval.train_features import train_features
from vistok.eval.train_teacher import NAME, TEACHERS, train_teacher
from vistok.geneval_rules import TASKS, Entry, spread
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions
from vistok.pictures import labelled_grid, rows_by_label, save_npz, save_png
from vistok.pipeline import (
    Prompts,
    check_guidance,
    decode_prefixes,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_feature_options,
    read_sample_options,
    sample_tokens,
)

console = Console()

THRESHOLDS = {
    "min_score": "objects must be surer than that (default: that of the detector; Mask2Former 0.3)",
    "min_counting_score": "the same where they are counted (default: that of the detector; Mask2Former 0.9)",
    "nms_iou": "overlap from which on two objects of a class are one; 1 never (default: 1)",
}
"""Fields of :class:`~vistok.geneval_rules.Rules` that have a flag."""

EXAMPLES = """examples:
  python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data digits
  python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data DIR --features none
  python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --count 500 --cfg-scale 2
  python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --tokens 1,2,4,8,16
  python -m vistok.eval geneval --checkpoint runs/shapes/gpt_text --data shapes --cfg-scale 1,2,4
  python -m vistok.eval geneval --images DIR --metadata evaluation_metadata.jsonl --detector DIR --color-model DIR
  python -m vistok.eval geneval --results results.jsonl
  python -m vistok.eval probe --checkpoint runs/digits/tokenflow --data digits --features branch=semantic
  python -m vistok.eval compare a.json b.json
  python -m vistok.eval report --run runs/demo
"""


@flag_for("data.args.", "--data-args ")
def run_reconstruction(args: argparse.Namespace) -> None:
    """Measure a tokenizer on real images."""
    started = time.perf_counter()
    tokenizer = load_autoencoder(args.checkpoint, args.device)
    lengths = prefix_lengths(tokenizer.spec, args.tokens)
    decode = read_decode_options(tokenizer, args.decode)
    # All images of a folder without train/ and val/: here nothing needs to be held out.
    held_out = {"val": 1.0, "train": 0.0}[args.split]
    data_args = parse_overrides(args.data_args)
    dataset = load_images(args.data, args.split, tokenizer.spec.image_size_px, data_args, val_fraction=held_out)
    network = None if args.features == "none" else _features(args)
    count = min(args.count or len(dataset), len(dataset))
    agreement, definitions = None, reconstruction.DEFINITIONS
    if isinstance(dataset, CheckableDataset):
        agreement, definitions = dataset.agreement, definitions | dataset.agreement_definitions

    batches = image_batches(dataset, args.batch_size, args.workers, count)
    with tqdm(total=count * len(lengths), desc="reconstruct", unit="img", leave=False) as bar:
        metrics = reconstruction.measure_reconstruction(
            tokenizer, batches, network, lengths, args.seed, decode, args.device, agreement, bar.update
        )
    shown = {sample["key"]: sample for sample in map(dataset.get, range(min(10, count)))}
    picture = reconstruction.picture_reconstruction(tokenizer, list(shown.values()), lengths, args.seed, decode)

    protocol = EvalProtocol(
        task="reconstruction",
        data=dataset.description,
        split=dataset.description["split"],
        count=metrics["counts"]["images"],
        image_size_px=tokenizer.spec.image_size_px,
        quantised=True,
        weights={"tokenizer": export_info(args.checkpoint).get("weights", "unknown")},
        settings={"tokens": lengths, "decode": decode},
        seed=args.seed,
        features=_identity(network),
        reference={"images": "the originals", "count": metrics["counts"]["images"]},
        definitions=definitions,
        models={"tokenizer": export_hash(args.checkpoint)},
    )
    save_png(picture, args.out / "reconstruction.png")
    notes = fid_notes(network, protocol.count, protocol.count) if network else []
    _save(args, started, protocol, metrics, describe(metrics["codebook"]) + notes)


@flag_for("data.args.", "--data-args ")
def run_generation(args: argparse.Namespace) -> None:
    """Measure a generator against real images."""
    started = time.perf_counter()
    options = _sample_options(args, args.cfg_scale)
    generator, tokenizer, tokenizer_path = load_models(args.checkpoint, args.tokenizer, args.device)
    check_guidance(args.checkpoint, args.cfg_scale)
    lengths = prefix_lengths(tokenizer.spec, args.tokens or [tokenizer.spec.num_positions])
    size = tokenizer.spec.image_size_px
    decode = read_decode_options(tokenizer, args.decode)
    options = replace(options, extra=read_sample_options(generator, args.sampling))
    data_args = parse_overrides(args.data_args)
    reference, held_out = (load_images(args.data, split, size, data_args) for split in ("train", "val"))
    if generator.num_classes and reference.num_classes not in (0, generator.num_classes):
        raise UserError(
            f"{args.checkpoint} knows {generator.num_classes} classes, --data {args.data} has {reference.num_classes}: "
            "that is not the data it was trained on"
        )
    network = _features(args)
    class_ids = generation.balanced_classes(args.count, generator.num_classes)
    names = reference.class_names or [str(index) for index in range(generator.num_classes)]
    labels = [names[index] if index != NULL_CLASS else "" for index in class_ids.tolist()]
    condition: ClassCondition | Prompts = ClassCondition(class_ids)
    if generator.text_width:
        labels = generation.captions(held_out, args.count)
        condition = Prompts(load_text_encoder(args.checkpoint, args.text_encoder, args.device), labels)
    # A shorter code is a prefix of the longest one.
    longest = replace(options, num_tokens=lengths[-1])
    with tqdm(total=args.count, desc="sample", unit="img", leave=False) as bar:
        tokens = sample_tokens(generator, condition, longest, args.seed, args.batch_size, bar.update)

    def decoded(length: int) -> Tensor:
        with tqdm(total=args.count, desc="decode", unit="img", leave=False) as bar:
            return decode_prefixes(tokenizer, tokens, [length], args.seed, args.batch_size, decode, bar.update)[length]

    samples = decoded(lengths[-1])
    shorter = ((length, decoded(length)) for length in lengths[:-1])
    with tqdm(total=len(reference), desc="compare", unit="img", leave=False) as bar:
        metrics = generation.measure_generation(
            chain(shorter, [(lengths[-1], samples)]),
            class_ids,
            reference,
            held_out,
            network,
            seed=args.seed,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            copies=args.copies,
            progress=bar.update,
        )

    protocol = EvalProtocol(
        task="generation",
        data=held_out.description,
        split="val",
        count=args.count,
        image_size_px=size,
        quantised=True,
        weights={
            "generator": export_info(args.checkpoint).get("weights", "unknown"),
            "tokenizer": export_info(tokenizer_path).get("weights", "unknown"),
        },
        settings={
            "tokens": lengths,
            "sampling": _sampling(options),
            "decode": decode,
            **({"captions": "val in order"} if generator.text_width else {"classes": "balanced"}),
        },
        seed=args.seed,
        features=_identity(network),
        reference={"images": "train", "count": metrics["counts"]["reference"], "data": reference.description},
        definitions=generation.DEFINITIONS,
        models={"generator": export_hash(args.checkpoint), "tokenizer": export_hash(tokenizer_path)},
    )
    save_npz(args.out / "samples.npz", samples)
    save_png(labelled_grid(*rows_by_label(samples, labels)), args.out / "generation.png")
    notes = fid_notes(network, args.count, metrics["counts"]["reference"])
    _save(args, started, protocol, metrics, notes)


@flag_for("data.args.", "--data-args ")
def run_geneval(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on GenEval's six tasks."""
    if args.results:
        _print(_task_table(str(args.results), geneval.read_results(args.results)), [])
    elif args.images:
        _score_folder(args)
    else:
        _score_generator(args)


def _score_generator(args: argparse.Namespace) -> None:
    # Refuses bad values before anything is loaded.
    options = [_sample_options(args, scale) for scale in args.cfg_scale]
    generator, tokenizer, tokenizer_path = load_models(args.checkpoint, args.tokenizer, args.device)
    if not generator.text_width:
        raise UserError(f"the generator in {args.checkpoint} is conditioned on classes: GenEval asks in words")
    check_guidance(args.checkpoint, *args.cfg_scale)
    lengths = prefix_lengths(tokenizer.spec, args.tokens or [tokenizer.spec.num_positions])
    size, decode = tokenizer.spec.image_size_px, read_decode_options(tokenizer, args.decode)
    extra = read_sample_options(generator, args.sampling)
    outs = [args.out / f"cfg_{scale:g}" if len(options) > 1 else args.out for scale in args.cfg_scale]
    folders = [out / "geneval_images" if args.save_images else None for out in outs]
    if there := [folder for folder in folders if folder and folder.exists()]:
        raise UserError(f"{there[0]} exists: remove it or give another --out")
    if not (args.data or args.metadata):
        raise UserError("--checkpoint needs prompts: --data shapes, or --metadata FILE")
    benchmark = _benchmark(args, size, [])
    encoder = load_text_encoder(args.checkpoint, args.text_encoder, args.device)
    prompts = Prompts(encoder, [entry["prompt"] for entry in benchmark.entries for _ in range(args.count_per_prompt)])
    chance = _chance(benchmark, args.count_per_prompt)
    overview = {}
    for option, out, folder in zip(options, outs, folders):
        started = time.perf_counter()
        option = replace(option, extra=extra)
        samples = geneval.generated_samples(
            generator, tokenizer, prompts, args.count_per_prompt, option, lengths, args.seed, args.batch_size, decode
        )
        if folder:
            samples = geneval.kept_samples(samples, folder, benchmark.entries)
        if benchmark.detector is None:
            for _ in tqdm(samples, total=len(prompts), desc="sample", unit="img", leave=False):
                pass
            console.print(f"{len(prompts)} samples, not judged without --detector: {folder}", soft_wrap=True)
            continue
        with tqdm(total=len(prompts), desc="sample and judge", unit="img", leave=False) as bar:
            records, picture = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
        settings = {"tokens": lengths, "sampling": _sampling(option), "decode": decode}
        settings["count_per_prompt"] = args.count_per_prompt
        parts = {"generator": args.checkpoint, "tokenizer": tokenizer_path}
        protocol = _geneval_protocol(args, benchmark, benchmark.detector, len(prompts), size, settings, parts)
        overview[f"{option.cfg_scale:g}"] = _save_geneval(args, out, started, protocol, records, picture, chance)
    if len(overview) > 1:
        table = _table("GenEval by guidance scale", ["cfg-scale", *next(iter(overview.values()))])
        for scale, row in overview.items():
            table.add_row(scale, *map(number, row.values()))
        _print(table, [])


def _score_folder(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    stored, files = geneval.read_samples(args.images)
    size = geneval.read_image(files[0][0]).shape[-1]
    benchmark = _benchmark(args, size, stored)
    _, files = geneval.read_samples(args.images, benchmark.entries)
    if benchmark.detector is None:
        raise UserError("--images needs who judges them: --data shapes, or --detector DIR for photographs")
    count = sum(map(len, files))
    with tqdm(total=count, desc="judge", unit="img", leave=False) as bar:
        samples = geneval.stored_samples(files)
        records, picture = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
    protocol = _geneval_protocol(args, benchmark, benchmark.detector, count, size, {}, {})
    _save_geneval(args, args.out or args.images, started, protocol, records, picture, {})


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
    with tqdm(total=len(benchmark.entries) * per_prompt, desc="judge real images", unit="img", leave=False) as bar:
        records, _ = geneval.measure_geneval(benchmark.detector, benchmark.entries, samples, bar.update)
    return geneval.scores(*records.values())


def _geneval_protocol(
    args: argparse.Namespace,
    benchmark: geneval.Benchmark,
    detector: Detector,
    count: int,
    image_size_px: int,
    settings: dict[str, Any],
    parts: dict[str, Path],
) -> EvalProtocol:
    return EvalProtocol(
        task="geneval",
        data=benchmark.description,
        split=benchmark.description["split"],
        count=count,
        image_size_px=image_size_px,
        quantised=True,
        weights={name: export_info(path).get("weights", "unknown") for name, path in parts.items()},
        settings=settings,
        seed=args.seed,
        features=detector.identity,
        reference={},
        definitions=geneval.DEFINITIONS | {"rules": asdict(detector.rules)},
        models={name: export_hash(path) for name, path in parts.items()},
    )


def _save_geneval(
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
    geneval.save_results(out / "geneval_results.jsonl", last)
    save_png(picture, out / "geneval.png")
    path = _write(args, out, started, protocol, metrics)
    title = f"GenEval by the {protocol.features['name']} · N={protocol.count} · {protocol.image_size_px} px"
    _print(_task_table(f"{title} · protocol {protocol.fingerprint}", last, chance), [], path)
    if len(records) > 1:
        columns, rows = table_by_tokens(metrics)
        table = _table("GenEval by number of tokens", columns)
        for row in rows:
            table.add_row(*row)
        _print(table, [])
    return geneval.scores(last)


def _task_table(title: str, records: list[geneval.Record], chance: dict[str, float] | None = None) -> Table:
    by_chance = ["real images of other prompts"] * bool(chance)
    table = _table(title, ["task", "prompts", "images", "images right", "prompts with one right", *by_chance])

    def add(name: str, values: list[str], score: float, task: str) -> None:
        table.add_row(name, *values[:2], f"{score:.3f}", *values[2:], *([f"{chance[task]:.3f}"] if chance else []))

    for task, row in geneval.by_task(records).items():
        numbers = [str(row["prompts"]), str(row["images"]), f"{row['prompts_right']:.3f}"]
        add(task, numbers, row["images_right"], task)
    table.add_section()
    add("overall, the mean", ["", "", ""], geneval.scores(records)["overall"], "overall")
    return table


@flag_for("data.args.", "--data-args ")
def run_probe(args: argparse.Namespace) -> None:
    """Fit a linear classifier to a tokenizer's features."""
    started = time.perf_counter()
    model = load_autoencoder(args.checkpoint, args.device)
    options = read_feature_options(model, args.features)
    size, data_args = model.spec.image_size_px, parse_overrides(args.data_args)
    train, held_out = (load_images(args.data, split, size, data_args) for split in ("train", "val"))
    with tqdm(total=len(train) + len(held_out), desc="features", unit="img", leave=False) as bar:
        read, known = (
            probe.pooled_features(
                model,
                image_batches(dataset, args.batch_size, args.workers),
                args.pool,
                options,
                args.device,
                bar.update,
            )
            for dataset in (train, held_out)
        )
    counts = {"train": len(read[1]), "held_out": len(known[1])}
    protocol = EvalProtocol(
        task="probe",
        data=held_out.description,
        split="val",
        count=counts["held_out"],
        image_size_px=size,
        quantised=False,
        weights={"tokenizer": export_info(args.checkpoint).get("weights", "unknown")},
        settings={"features": options, "pool": args.pool},
        seed=0,
        features={},
        reference={"images": "train", "count": counts["train"], "data": train.description},
        definitions=probe.DEFINITIONS,
        models={"tokenizer": export_hash(args.checkpoint)},
    )
    metrics = {"tokens": {str(model.spec.num_positions): probe.linear_probe(read, known)}, "counts": counts}
    _save(args, started, protocol, metrics, [f"features: {read[0].shape[1]} values of an image, {args.pool} pooled"])


def run_compare(args: argparse.Namespace) -> None:
    """Put two results side by side."""
    values = compare(args.first, args.second, args.force)
    (first, *_), (second, *_) = load_result(args.first), load_result(args.second)
    table = Table(title=f"{first.task}", title_justify="left")
    for column in (
        "metric",
        f"{args.first} ({first.fingerprint})",
        f"{args.second} ({second.fingerprint})",
        "second - first",
    ):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, (a, b) in values.items():
        difference = "" if a is None or b is None else f"{b - a:+.4g}"
        table.add_row(name, *("-" if value is None else number(value) for value in (a, b)), difference)
    _print(table, [f"DIFFERENT PROTOCOLS: {line}" for line in first.differences(second)])


def run_report(args: argparse.Namespace) -> None:
    """Write a run's report."""
    console.print(f"report: {write_report(args.run_folder)}", highlight=False)


def run_train_features(args: argparse.Namespace) -> None:
    """Train a shipped feature network again."""
    path = args.out or WEIGHTS_FOLDER / f"{args.name}.safetensors"
    accuracy = train_features(args.name, path, args.seed)
    answers = ", ".join(f"{head} {value:.2%}" for head, value in accuracy.items())
    console.print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, right on held-out images: {answers}", highlight=False)


def run_train_teacher(args: argparse.Namespace) -> None:
    """Train a small vision transformer on toy images."""
    sizes = TEACHERS[args.name]
    accuracy = train_teacher(args.name, args.out, sizes, args.epochs, args.seed)
    console.print(f"{args.out}: timm's {NAME} with {sizes}", highlight=False, soft_wrap=True)
    console.print(f"right on held-out images: {accuracy:.2%}", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """All commands of this module."""
    parser = ArgumentParser(
        prog="python -m vistok.eval",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    one = add("reconstruction", run_reconstruction, "PSNR, SSIM, rFID and codebook usage of a tokenizer")
    _add_common(one, ("none",))
    one.add_argument("--split", default="val", choices=("train", "val"), help="images to reconstruct (default: val)")
    one.add_argument("--count", type=positive_int, help="how many of them (default: all)")
    one.add_argument(
        "--tokens", type=token_counts, metavar="K,K,...", help="prefixes to decode (default: powers of two up to all)"
    )

    two = add("generation", run_generation, "gFID, precision, recall, class accuracy and copies of a generator")
    _add_common(two)
    two.add_argument(
        "--count",
        type=positive_int,
        default=500,
        help="samples, of all classes or of val's captions in turn (default: 500)",
    )
    two.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none (default: 1)")
    _add_sampling(two)
    two.add_argument(
        "--no-copies", dest="copies", action="store_false", help="skip the share of copies (slow on big data)"
    )

    three = add("compare", run_compare, "two result files side by side; refused if their protocols differ")
    three.add_argument("first", type=Path, metavar="a.json")
    three.add_argument("second", type=Path, metavar="b.json")
    three.add_argument("--force", action="store_true", help="compare in spite of different protocols")

    four = add("report", run_report, "loss curves and report.md of a run with a tokenizer/ and a generator/")
    four.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR", help="e.g. runs/demo")

    five = add("train-features", run_train_features, "train a shipped feature network again (training split only)")
    five.add_argument("name", choices=sorted(SMALL_NETWORKS))
    five.add_argument("--out", type=Path, metavar="FILE", help="default: the file inside the package")
    five.add_argument("--seed", type=int, default=0)

    six = add("probe", run_probe, "accuracy of a linear classifier on a tokenizer's features")
    _add_source(six)
    six.add_argument(
        "--features", nargs="*", default=[], metavar="key=value", help="options of its features, such as branch=pixel"
    )
    six.add_argument(
        "--pool", default="mean", choices=("mean", "flatten"), help="what is done with positions (default: mean)"
    )

    seven = add("train-teacher", run_train_teacher, "train a small vision transformer on toy images, to distil it")
    seven.add_argument("name", choices=sorted(TEACHERS))
    seven.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    seven.add_argument("--epochs", type=positive_int, default=80, help="default: %(default)s")
    seven.add_argument("--seed", type=int, default=0)

    eight = add("geneval", run_geneval, "share of images that show what a prompt asks for, in GenEval's six tasks")
    source = eight.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="run or export folder of a generator")
    source.add_argument("--images", type=Path, metavar="DIR", help="samples that exist: DIR/00000/samples/0000.png ...")
    source.add_argument("--results", type=Path, metavar="FILE", help="only add up a results.jsonl")
    prompts = eight.add_mutually_exclusive_group()
    prompts.add_argument("--data", help="shapes: the prompts and the detector of a procedural world")
    prompts.add_argument(
        "--metadata", type=Path, metavar="FILE", help="GenEval's evaluation_metadata.jsonl, or prompts of its form"
    )
    eight.add_argument(
        "--detector",
        metavar="DIR",
        help="for photographs: folder or hub repository of a Mask2Former (as in the original, without mmdet), DETR, "
        "OWLv2 or Grounding DINO of transformers",
    )
    eight.add_argument(
        "--color-model",
        metavar="DIR",
        help="folder or hub repository of a CLIP (original: openai/clip-vit-large-patch14)",
    )
    for name, text in THRESHOLDS.items():
        eight.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="P", help=text)
    eight.add_argument("--data-args", nargs="*", default=[], metavar="key=value", help="as data.args of train.py")
    eight.add_argument(
        "--split",
        default="val",
        choices=("train", "val"),
        help="colours asked for: held-out pairs or not (default: val)",
    )
    eight.add_argument("--count-per-prompt", type=positive_int, default=4, metavar="N", help="images (default: 4)")
    eight.add_argument(
        "--most-per-task", type=positive_int, metavar="N", help="of each task only so many prompts, for a quick look"
    )
    eight.add_argument(
        "--cfg-scale", type=scales, default=[1.0], metavar="S[,S...]", help="guidance scales; 1 is none (default: 1)"
    )
    _add_sampling(eight)
    _add_noise(eight)
    _add_place(eight)
    eight.add_argument("--save-images", action="store_true", help="also as OUT/geneval_images/00000/samples/0000.png")
    return parser


def scales(text: str) -> list[float]:
    """Numbers between commas, as a ``type`` for argparse."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,2.5, got {text!r}") from None


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """How to sample, for commands that take a generator."""
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="its tokenizer (default: the one it was trained on)"
    )
    parser.add_argument(
        "--text-encoder", type=Path, metavar="DIR", help="its text encoder (default: the one it was trained with)"
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--sampling", nargs="*", default=[], metavar="key=value", help="of this kind of generator, such as steps=64"
    )
    parser.add_argument(
        "--tokens",
        type=token_counts,
        metavar="K,K,...",
        help="prefixes to decode, each with its own metrics (default: all tokens only)",
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run or export folder")
    add_data_flags(parser)
    _add_place(parser)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: CHECKPOINT/eval)")
    parser.add_argument("--batch-size", type=positive_int, default=100, help="images at a time (default: 100)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, type=usable_device, help="default: %(default)s")


def _add_common(parser: argparse.ArgumentParser, more_features: tuple[str, ...] = ()) -> None:
    _add_source(parser)
    parser.add_argument(
        "--features",
        metavar="NAME",
        help=f"feature network: {', '.join((*SMALL_NETWORKS, 'inception:PATH', *more_features))} "
        "(default: that of --data)",
    )
    _add_noise(parser)


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8")
    parser.add_argument("--seed", type=int, default=0, help="names all noise (default: 0)")


def _features(args: argparse.Namespace) -> FeatureNetwork:
    if not args.features and args.data not in SMALL_NETWORKS:
        needed = "give --features inception:PATH (reconstruction also takes none)"
        raise UserError(f"no feature network comes with --data {args.data}: {needed}")
    return load_features(args.features or args.data, args.device)


def _identity(network: FeatureNetwork | None) -> dict[str, str]:
    return {} if network is None else {"name": network.name, "sha256": network.sha256}


def _sample_options(args: argparse.Namespace, cfg_scale: float) -> SampleOptions:
    return SampleOptions(cfg_scale=cfg_scale, **sampling_flags(args))


def _sampling(options: SampleOptions) -> dict[str, Any]:
    """The options that change samples, without the number of tokens."""
    how = ("num_tokens", "use_cache", "compile")
    values = {name: value for name, value in asdict(options).items() if name not in how}
    return values | values.pop("extra")


def _run_details(args: argparse.Namespace, started: float) -> dict[str, Any]:
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        "command": f"python -m vistok.eval {shlex.join(sys.argv[1:])}",
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e6),
        "device": args.device,
        "versions": {name: version(name) for name in ("torch", "torchmetrics", "vistok")},
    }


def _save(
    args: argparse.Namespace,
    started: float,
    protocol: EvalProtocol,
    metrics: dict[str, Any],
    notes: list[str],
) -> None:
    """Write the result file, and a curve of several numbers of tokens; print the table."""
    path = _write(args, args.out, started, protocol, metrics)
    columns, rows = table_by_tokens(metrics)
    title = f"{protocol.task} · {args.data} · N={protocol.count} · {protocol.image_size_px} px"
    table = _table(f"{title} · protocol {protocol.fingerprint}", columns)
    for row in rows:
        table.add_row(*row)
    _print(table, notes, path)


def _write(
    args: argparse.Namespace, out: Path, started: float, protocol: EvalProtocol, metrics: dict[str, Any]
) -> Path:
    """Write the result file, and a curve of several numbers of tokens."""
    path = out / f"{protocol.task}.json"
    save_result(path, protocol, metrics, _run_details(args, started))
    if len(metrics["tokens"]) > 1:
        plot_by_tokens(metrics["tokens"], curve_of(path), metrics.get("held_out"))
    return path


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        longest_word = max(map(len, column.split()))
        table.add_column(column, justify="right" if index else "left", no_wrap=not index, min_width=longest_word)
    return table


def _print(table: Table, notes: list[str], path: Path | None = None) -> None:
    # Wider than the terminal rather than with digits cut off.
    least = Measurement.get(console, console.options.update(width=1000), table).minimum
    table.width = least if least > console.width else None
    console.print(table, crop=False)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    if path:
        console.print(f"saved: {path}", highlight=False, soft_wrap=True)


def run() -> None:
    """Parse the command line and do what it says."""
    args = build_parser().parse_args()
    if getattr(args, "checkpoint", None) and args.out is None:
        args.out = args.checkpoint / "eval"
    args.run(args)


if __name__ == "__main__":
    main(run)
