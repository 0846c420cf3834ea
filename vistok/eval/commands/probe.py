"""``probe``: fit a linear classifier to a tokenizer's features."""

from __future__ import annotations

import argparse
import time

from vistok.checkpoint import export_hash, export_info, load_autoencoder
from vistok.cli import flag_for
from vistok.config import parse_overrides
from vistok.data.datamodule import load_images
from vistok.eval import probe
from vistok.eval.commands.flags import add_source_flags
from vistok.eval.commands.output import progress_bar, save
from vistok.eval.images import PixelHash, image_batches, unaugmented
from vistok.eval.processes import is_first
from vistok.eval.protocol import EvalProtocol
from vistok.pipeline import read_feature_options

HELP = "accuracy of a linear classifier on a tokenizer's features"
EXAMPLES = ("python -m vistok.eval probe --checkpoint runs/digits/tokenflow --data digits --features branch=semantic",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_source_flags(parser)
    parser.add_argument(
        "--features", nargs="*", default=[], metavar="key=value", help="options of its features, such as branch=pixel"
    )
    parser.add_argument(
        "--pool", default="mean", choices=("mean", "flatten"), help="what is done with positions (default: mean)"
    )


@flag_for("data.args.", "--data-args ")
def run(args: argparse.Namespace) -> None:
    """Fit a linear classifier to a tokenizer's features."""
    started = time.perf_counter()
    model = load_autoencoder(args.checkpoint, args.device)
    options = read_feature_options(model, args.features)
    size, data_args = model.spec.image_size_px, parse_overrides(args.data_args)
    train, held_out = (load_images(args.data, split, size, data_args) for split in ("train", "val"))
    pixels = PixelHash(), PixelHash()
    with progress_bar("features", len(train) + len(held_out)) as bar:
        read, known = (
            probe.pooled_features(
                model,
                image_batches(dataset, args.batch_size, args.workers, pixels=seen),
                args.pool,
                options,
                args.device,
                bar.update,
            )
            for dataset, seen in zip((train, held_out), pixels)
        )
    reference, held_out_sha256 = pixels[0].reference("train"), pixels[1].hexdigest()
    if not is_first():
        return
    counts = {"train": len(read[1]), "held_out": len(known[1])}
    protocol = EvalProtocol(
        task="probe",
        data=held_out.description | {"pixels_sha256": held_out_sha256},
        split="val",
        count=counts["held_out"],
        image_size_px=size,
        quantised=False,
        weights={"tokenizer": export_info(args.checkpoint).get("weights", "unknown")},
        settings={"features": options, "pool": args.pool},
        seed=0,
        features={},
        reference=reference | {"data": unaugmented(train)},
        definitions=probe.DEFINITIONS,
        models={"tokenizer": export_hash(args.checkpoint)},
    )
    metrics = {"tokens": {str(model.spec.num_positions): probe.linear_probe(read, known)}, "counts": counts}
    save(args, started, protocol, metrics, [f"features: {read[0].shape[1]} values of an image, {args.pool} pooled"])
