"""One HTML file to look at: reconstructions under a slider, samples, curves and every figure with its protocol.

Pictures are inside the file, nothing is fetched: it opens from a disk, without a server. This module gathers what the
other commands have written and puts it as JSON into ``gallery.html``, whose script draws the page.
"""

from __future__ import annotations

import base64
import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from vistok.errors import UserError
from vistok.eval.images import open_rgb
from vistok.eval.protocol import EvalProtocol, number, of_figure
from vistok.eval.reconstruction import strips_of
from vistok.eval.report import PARTS, Result, conditions, read_losses, read_results
from vistok.files import write_text

SERIES = ("tokens", "steps")
PLACE = "{{data}}"
MOST_POINTS = 300
"""Of a loss curve: more than a chart has pixels only make the file bigger."""


def write_gallery(runs: list[Path], out: Path) -> Path:
    """Write the page about ``runs``.

    A picture that a result lacks is left out with a warning.

    Args:
        runs: folders with results of ``python -m vistok.eval`` somewhere below, and ``metrics.csv`` of training.
        out: the HTML file.

    Returns:
        ``out``.

    Raises:
        UserError: if a folder is missing or has no results, or a result or picture is damaged.
    """
    found = {run: _results(run) for run in runs}
    base = Path(os.path.commonpath([run.resolve().parent for run in runs]))
    page: dict[str, list[Any]] = {"reconstructions": [], "samples": [], "charts": [], "losses": []}
    results: list[tuple[str, Path, EvalProtocol, dict[str, Any]]] = []
    for run, of_run in found.items():
        for path, protocol, metrics, _ in of_run:
            place = run / path
            folder = place.parent.parent if place.parent.name == "eval" else place.parent
            results.append((os.path.relpath(folder.resolve(), base), place, protocol, metrics))
        for folder in (run, *(run / part for part in PARTS)):
            if losses := read_losses(folder / "metrics.csv"):
                page["losses"].append(_loss_chart(os.path.relpath(folder.resolve(), base), losses))
    for label, place, protocol, metrics in results:
        source = {"run": label, "protocol": protocol.fingerprint}
        if protocol.task == "reconstruction" and (slider := _slider(place, metrics)):
            page["reconstructions"].append(source | slider)
        elif protocol.task != "probe" and (picture := _picture(place.with_suffix(".png"))):
            page["samples"].append(source | {"task": protocol.task, "picture": picture})
    page["charts"] = _charts(results)
    page["tables"] = _tables(results)
    page["protocols"] = _protocols(protocol for _, _, protocol, _ in results)
    page["runs"] = sorted({label for label, *_ in results})
    template = files("vistok.eval").joinpath("gallery.html").read_text()
    # No "<" may end the script element that holds the data; a JSON string may spell it otherwise.
    write_text(out, template.replace(PLACE, json.dumps(page, allow_nan=False).replace("<", "\\u003c")))
    return out


def _results(run: Path) -> list[Result]:
    if not run.is_dir():
        raise UserError(f"--runs: no such folder: {run}")
    results = read_results(run)
    if not results:
        raise UserError(
            f"--runs: {run} holds no results: measure first, such as "
            f"python -m vistok.eval reconstruction --checkpoint {run} --data DATA"
        )
    return results


def _picture(path: Path) -> dict[str, Any] | None:
    """A PNG file as its address inside the page and its size; None, with a warning, if there is none."""
    if not path.is_file():
        warnings.warn(f"{path} is missing: the page goes without it", stacklevel=2)
        return None
    data = path.read_bytes()
    width, height = open_rgb(data, str(path)).size
    address = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"source": address, "width": width, "height": height}


def _slider(result: Path, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The examples of a reconstruction by series and count; None where there are no strips of all."""
    folder = strips_of(result)
    if not folder.is_dir():
        warnings.warn(f"{folder} is missing: no slider for {result}, measure again", stacklevel=2)
        return None
    original = _picture(folder / "original.png")
    series = {}
    for name in SERIES:
        frames = [
            {"count": int(count), "figures": _numbers(row), "picture": _picture(folder / f"{name}_{count}.png")}
            for count, row in metrics.get(name, {}).items()
        ]
        if frames := [frame for frame in frames if frame["picture"]]:
            series[name] = frames
    if original is None or not series:
        return None
    return {"original": original, "series": series}


def _charts(results: list[tuple[str, Path, EvalProtocol, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A chart for each metric, of all runs that were measured at several counts."""
    charts: dict[tuple[str, str, str], dict[str, Any]] = {}
    for label, _, protocol, metrics in results:
        for axis in SERIES:
            rows = metrics.get(axis, {})
            if len(rows) < 2:
                continue
            for name in next(iter(rows.values())):
                chart = charts.setdefault(
                    (protocol.task, axis, name), {"title": name, "task": protocol.task, "axis": axis, "lines": []}
                )
                points = [[int(count), row[name]] for count, row in rows.items() if math.isfinite(row[name])]
                chart["lines"].append({"run": label, "protocol": protocol.fingerprint, "points": points})
                if axis == "tokens" and (real := of_figure(metrics.get("held_out", {}), name)) is not None:
                    chart["real"] = real
    return list(charts.values())


def _loss_chart(label: str, losses: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    lines = []
    for name, (updates, values) in sorted(losses.items()):
        points = [[update, value] for update, value in zip(updates, values) if math.isfinite(value)]
        lines.append({"run": name, "points": points[:: math.ceil(len(points) / MOST_POINTS) or 1]})
    return {"title": label, "axis": "updates", "lines": lines}


def _tables(results: list[tuple[str, Path, EvalProtocol, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A table for each task, and one of codebooks."""
    tables: dict[str, dict[str, Any]] = {}

    def add(title: str, label: str, protocol: EvalProtocol, what: str, row: dict[str, float]) -> None:
        table = tables.setdefault(title, {"title": title, "columns": [], "rows": []})
        table["columns"] += [name for name in row if name not in table["columns"]]
        cells = _numbers(row)
        table["rows"].append({"run": label, "protocol": protocol.fingerprint, "what": what, "cells": cells})

    for label, _, protocol, metrics in results:
        for axis in SERIES:
            for count, row in metrics.get(axis, {}).items():
                add(protocol.task, label, protocol, _counted(axis, count), row)
        if "held_out" in metrics:
            named = {name: of_figure(metrics["held_out"], name) for name in next(iter(metrics["tokens"].values()))}
            real = {name: value for name, value in named.items() if value is not None}
            add(protocol.task, label, protocol, f"{metrics['counts']['held_out']} real images", real)
    for label, _, protocol, metrics in results:
        parts: dict[str, dict[str, float]] = {}
        for name, value in metrics.get("codebook", {}).items():
            part, _, figure = name.rpartition("/")
            parts.setdefault(part.replace("_", " ") or "all codes", {})[figure] = value
        for part, row in parts.items():
            add("codebook", label, protocol, part, row)
    return list(tables.values())


def _protocols(protocols: Iterable[EvalProtocol]) -> list[dict[str, Any]]:
    """Each protocol once, with what sets it apart from the first of its task."""
    first: dict[str, EvalProtocol] = {}
    known: dict[str, dict[str, Any]] = {}
    for protocol in protocols:
        other = first.setdefault(protocol.task, protocol)
        known[protocol.fingerprint] = {
            "fingerprint": protocol.fingerprint,
            "task": protocol.task,
            "conditions": conditions(protocol),
            "differences": [f"{line} there" for line in protocol.differences(other)],
            "first": other.fingerprint,
            "whole": json.dumps(asdict(protocol), indent=2),
        }
    return list(known.values())


def _counted(axis: str, count: str) -> str:
    return f"{count} {axis.removesuffix('s') if count == '1' else axis}"


def _numbers(row: dict[str, float]) -> dict[str, str]:
    return {name: number(value) for name, value in row.items()}
