"""``report``: one page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.eval.commands.output import console
from vistok.eval.report import write_report

HELP = "loss curves and report.md of a run with a tokenizer/ and a generator/"
EXAMPLES = ("python -m vistok.eval report --run runs/demo",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("--run", dest="run_folder", type=Path, required=True, metavar="DIR", help="e.g. runs/demo")


def run(args: argparse.Namespace) -> None:
    """Write a run's report."""
    console.print(f"report: {write_report(args.run_folder)}", highlight=False)
