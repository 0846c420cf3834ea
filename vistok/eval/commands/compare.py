"""``compare``: two result files side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from vistok.eval.commands.output import show
from vistok.eval.protocol import compare, number

HELP = "two result files side by side; refused if their protocols differ"
EXAMPLES = ("python -m vistok.eval compare a.json b.json",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.add_argument("first", type=Path, metavar="a.json")
    parser.add_argument("second", type=Path, metavar="b.json")
    parser.add_argument("--force", action="store_true", help="compare in spite of different protocols")


def run(args: argparse.Namespace) -> None:
    """Put two results side by side."""
    first, second, values = compare(args.first, args.second, args.force)
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
    show(table, [f"DIFFERENT PROTOCOLS: {line}" for line in first.differences(second)])
