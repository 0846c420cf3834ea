"""``reference``: statistics of real images in a file, to measure samples against."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vistok.cli import add_data_flags, flag_for
from vistok.config import parse_overrides
from vistok.data.datamodule import load_images
from vistok.eval.commands.flags import add_batch_flags, add_features_flag, adm_protocol, features_of
from vistok.eval.commands.output import console, progress_bar
from vistok.eval.fid import rank_notes
from vistok.eval.processes import is_first
from vistok.eval.reference import ImageFile, measure_reference, save_reference

HELP = "statistics of real images as an .npz with ADM's keys, for generation --reference"
EXAMPLES = ("python -m vistok.eval reference --data DIR --protocol adm256 --features inception:PATH --out stats.npz",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_data_flags(parser)
    parser.add_argument("--split", default="train", choices=("train", "val"), help="of --data (default: train)")
    parser.add_argument(
        "--protocol",
        type=adm_protocol,
        required=True,
        metavar="admSIZE",
        help="how images are cropped and resized: as ADM does, to this side in pixels, e.g. adm256",
    )
    add_features_flag(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="an .npz")
    parser.add_argument("--seed", type=int, default=0, help="names the images that are kept, of more than 10,000")
    add_batch_flags(parser)


@flag_for("data.args.", "--data-args ")
def run(args: argparse.Namespace) -> None:
    """Measure real images and write the file."""
    # Without train/ and val/ all images of a folder are the reference.
    held_out = {"val": 1.0, "train": 0.0}[args.split]
    dataset = load_images(args.data, args.split, args.protocol, parse_overrides(args.data_args), val_fraction=held_out)
    network = features_of(args)
    images = ImageFile(args.out.parent, args.protocol)
    with progress_bar("reference", len(dataset)) as bar:
        reference = measure_reference(
            dataset, network, args.seed, args.batch_size, args.workers, args.device, images.write, bar.update
        )
    images.gather()
    if not is_first():
        return
    save_reference(args.out, reference, network, images)
    what = f"{reference.count} images of {args.protocol} px, {network.name} ({network.sha256[:8]})"
    console.print(f"saved: {args.out}: {what}", highlight=False, soft_wrap=True)
    console.print(json.dumps(reference.description), highlight=False, soft_wrap=True)
    assert reference.count is not None
    for note in rank_notes(network, reference.count):
        console.print(note, highlight=False, soft_wrap=True)
