"""``gallery``: one HTML page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.eval.commands.output import console
from vistok.eval.gallery import write_gallery

HELP = "one HTML file with the pictures, curves and figures of several runs; opens without a server"
EXAMPLES = ("python -m vistok.eval gallery --runs runs/demo runs/digits/flextok --out gallery.html",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="folders with results")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as gallery.html")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    path = write_gallery(args.runs, args.out)
    console.print(f"gallery: {path} ({path.stat().st_size / 1e6:.1f} MB)", highlight=False, soft_wrap=True)
