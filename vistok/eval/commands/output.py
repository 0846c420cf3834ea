"""What every command prints and writes: tables, notes, the result file, a curve."""

from __future__ import annotations

import argparse
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from tqdm import tqdm

from vistok.eval.curves import curve_of, plot_by_tokens
from vistok.eval.processes import is_first, num_processes
from vistok.eval.protocol import EvalProtocol, save_result, table_by_tokens

console = Console()


def progress_bar(what: str, total: int | None = None, whole: bool = False) -> tqdm:
    """Progress over ``total`` images: that of the first process, over its share unless it takes the ``whole``."""
    if total and not whole:
        total = math.ceil(total / num_processes())
    return tqdm(total=total, desc=what, unit="img", leave=False, disable=not is_first())


def save(
    args: argparse.Namespace,
    started: float,
    protocol: EvalProtocol,
    metrics: dict[str, Any],
    notes: list[str],
) -> None:
    """Write the result file, and a curve of several numbers of tokens; print the table."""
    path = write(args, args.out, started, protocol, metrics)
    columns, rows = table_by_tokens(metrics)
    subject = args.data or args.reference
    title = f"{protocol.task} · {subject} · N={protocol.count} · {protocol.image_size_px} px"
    show(new_table(f"{title} · protocol {protocol.fingerprint}", columns, rows), notes, path)


def write(
    args: argparse.Namespace,
    out: Path,
    started: float,
    protocol: EvalProtocol,
    metrics: dict[str, Any],
    said: dict[str, str] | None = None,
) -> Path:
    """Write the result file, with what else was ``said`` about the run, and a curve of several numbers of tokens."""
    path = out / f"{protocol.task}.json"
    save_result(path, protocol, metrics, run_details(args, started) | (said or {}))
    if len(metrics["tokens"]) > 1:
        plot_by_tokens(metrics["tokens"], curve_of(path), metrics.get("held_out"))
    return path


def new_table(title: str, columns: list[str], rows: Iterable[Iterable[str]] = ()) -> Table:
    """A table whose first column is words and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        longest_word = max(map(len, column.split()))
        table.add_column(column, justify="right" if index else "left", no_wrap=not index, min_width=longest_word)
    for row in rows:
        table.add_row(*row)
    return table


def show(table: Table, notes: list[str], path: Path | None = None) -> None:
    """Print a table, notes below it and where the figures were saved."""
    # Wider than the terminal rather than with digits cut off.
    least = Measurement.get(console, console.options.update(width=1000), table).minimum
    table.width = least if least > console.width else None
    console.print(table, crop=False)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    if path:
        console.print(f"saved: {path}", highlight=False, soft_wrap=True)


def run_details(args: argparse.Namespace, started: float) -> dict[str, Any]:
    """Circumstances that do not change the numbers; ``started`` is a time of ``time.perf_counter``."""
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        "command": f"python -m vistok.eval {shlex.join(sys.argv[1:])}",
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e6),
        "device": args.device,
        "processes": num_processes(),
        "versions": {name: version(name) for name in ("torch", "torchmetrics", "vistok")},
    }
