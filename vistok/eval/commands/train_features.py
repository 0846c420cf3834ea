"""``train-features``: train a shipped feature network again."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.eval.commands.output import console
from vistok.eval.features import SMALL_NETWORKS, WEIGHTS_FOLDER
from vistok.eval.train_features import train_features

HELP = "train a shipped feature network again (training split only)"
EXAMPLES = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("name", choices=sorted(SMALL_NETWORKS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the file inside the package")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train a shipped feature network again."""
    path = args.out or WEIGHTS_FOLDER / f"{args.name}.safetensors"
    accuracy = train_features(args.name, path, args.seed)
    answers = ", ".join(f"{head} {value:.2%}" for head, value in accuracy.items())
    console.print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, right on held-out images: {answers}", highlight=False)
