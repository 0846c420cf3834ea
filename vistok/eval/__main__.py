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
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vistok.checkpoint import export_hash, export_info, load_autoencoder
from vistok.cli import ArgumentParser, add_data_flags, flag_for, main, positive_int, token_counts, usable_device
from vistok.config import parse_overrides
from vistok.data.datamodule import CheckableDataset, load_images
from vistok.errors import UserError
from vistok.eval import generation, probe, reconstruction
from vistok.eval.codebook import describe
from vistok.eval.curves import curve_of, plot_by_tokens
from vistok.eval.features import SMALL_NETWORKS, WEIGHTS_FOLDER, FeatureNetwork, load_features
from vistok.eval.fid import fid_notes
from vistok.eval.images import image_batches
from vistok.eval.protocol import EvalProtocol, compare, load_result, number, save_result, table_by_tokens
from vistok.eval.report import write_report
from vistok.eval.train_features import train_features
from vistok.eval.train_teacher import NAME, TEACHERS, train_teacher
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions
from vistok.pictures import labelled_grid, rows_by_label, save_npz, save_png
from vistok.pipeline import (
    decode_prefixes,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_feature_options,
    read_sample_options,
    sample_tokens,
)

console = Console()

EXAMPLES = """examples:
  python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data digits
  python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data DIR --features none
  python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --count 500 --cfg-scale 2
  python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --tokens 1,2,4,8,16
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
    options = SampleOptions(
        cfg_scale=args.cfg_scale,
        guided_tokens=args.guided_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    generator, tokenizer, tokenizer_path = load_models(args.checkpoint, args.tokenizer, args.device)
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
    # A shorter code is a prefix of the longest one.
    condition, longest = ClassCondition(class_ids), replace(options, num_tokens=lengths[-1])
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
        settings={"tokens": lengths, "sampling": _sampling(options), "decode": decode, "classes": "balanced"},
        seed=args.seed,
        features=_identity(network),
        reference={"images": "train", "count": metrics["counts"]["reference"], "data": reference.description},
        definitions=generation.DEFINITIONS,
        models={"generator": export_hash(args.checkpoint), "tokenizer": export_hash(tokenizer_path)},
    )
    save_npz(args.out / "samples.npz", samples)
    names = reference.class_names or [str(index) for index in range(generator.num_classes)]
    labels = [names[index] if index != NULL_CLASS else "" for index in class_ids.tolist()]
    save_png(labelled_grid(*rows_by_label(samples, labels)), args.out / "generation.png")
    notes = fid_notes(network, args.count, metrics["counts"]["reference"])
    _save(args, started, protocol, metrics, notes)


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
    two.add_argument("--tokenizer", type=Path, metavar="DIR", help="its tokenizer (default: the one it was trained on)")
    two.add_argument(
        "--count", type=positive_int, default=500, help="samples, spread evenly over classes (default: 500)"
    )
    two.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none (default: 1)")
    two.add_argument("--guided-tokens", type=positive_int, help="guide only the first positions (default: all)")
    two.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest code (default: 1)")
    two.add_argument("--top-k", type=int, default=0, help="keep the k likeliest codes; 0 keeps all (default: 0)")
    two.add_argument("--top-p", type=float, default=1.0, help="keep this much probability; 1 keeps all (default: 1)")
    two.add_argument(
        "--sampling", nargs="*", default=[], metavar="key=value", help="of this kind of generator, such as steps=64"
    )
    two.add_argument(
        "--no-copies", dest="copies", action="store_false", help="skip the share of copies (slow on big data)"
    )
    two.add_argument(
        "--tokens",
        type=token_counts,
        metavar="K,K,...",
        help="prefixes to decode, each with its own metrics (default: all tokens only)",
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
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run or export folder")
    add_data_flags(parser)
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
    parser.add_argument("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8")
    parser.add_argument("--seed", type=int, default=0, help="names all noise (default: 0)")


def _features(args: argparse.Namespace) -> FeatureNetwork:
    if not args.features and args.data not in SMALL_NETWORKS:
        needed = "give --features inception:PATH (reconstruction also takes none)"
        raise UserError(f"no feature network comes with --data {args.data}: {needed}")
    return load_features(args.features or args.data, args.device)


def _identity(network: FeatureNetwork | None) -> dict[str, str]:
    return {} if network is None else {"name": network.name, "sha256": network.sha256}


def _sampling(options: SampleOptions) -> dict[str, Any]:
    """The options that change samples, without the number of tokens."""
    values = {name: value for name, value in asdict(options).items() if name not in ("num_tokens", "use_cache")}
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
    args: argparse.Namespace, started: float, protocol: EvalProtocol, metrics: dict[str, Any], notes: list[str]
) -> None:
    """Write the result file, and a curve of several numbers of tokens; print the table."""
    path = args.out / f"{protocol.task}.json"
    save_result(path, protocol, metrics, _run_details(args, started))
    if len(metrics["tokens"]) > 1:
        plot_by_tokens(metrics["tokens"], curve_of(path), metrics.get("held_out"))
    columns, rows = table_by_tokens(metrics)
    title = f"{protocol.task} · {args.data} · N={protocol.count} · {protocol.image_size_px} px"
    table = Table(title=f"{title} · protocol {protocol.fingerprint}", title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    _print(table, notes, path)


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
