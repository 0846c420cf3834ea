"""``train-teacher``: train a small vision transformer on toy images."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.cli import positive_int
from vistok.eval.commands.output import console
from vistok.eval.train_teacher import NAME, TEACHERS, train_teacher

HELP = "train a small vision transformer on toy images, to distil it"
EXAMPLES = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("name", choices=sorted(TEACHERS))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--epochs", type=positive_int, default=80, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Train a small vision transformer on toy images."""
    sizes = TEACHERS[args.name]
    accuracy = train_teacher(args.name, args.out, sizes, args.epochs, args.seed)
    console.print(f"{args.out}: timm's {NAME} with {sizes}", highlight=False, soft_wrap=True)
    console.print(f"right on held-out images: {accuracy:.2%}", highlight=False)
