"""One page about a run: its figures with the commands that measured them, its loss curves and its settings."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vistok.checkpoint import SPEC, write_atomically
from vistok.errors import UserError
from vistok.eval.generation import side_by_side
from vistok.eval.protocol import EvalProtocol, flatten, load_result, write_text

PARTS = ("tokenizer", "generator")
CURVES = "loss_curves.png"
REPORT = "report.md"


def write_report(folder: Path) -> Path:
    """Write ``loss_curves.png`` and ``report.md`` into a run with a ``tokenizer/`` and a ``generator/``.

    Read, where they are there: ``{tokenizer,generator}/metrics.csv``, ``spec.json`` and ``run.yaml``, and every result
    file of ``python -m vistok.eval`` with the picture beside it.

    Args:
        folder: the run.

    Returns:
        Path of the page.

    Raises:
        UserError: if there is nothing to report on.
    """
    folder = Path(folder)
    curves = {part: read_losses(folder / part / "metrics.csv") for part in PARTS}
    results = [(path, *load_result(path)) for path in sorted(folder.rglob("*.json")) if _is_result(path)]
    if not any(curves.values()) and not results:
        raise UserError(f"{folder}: nothing to report on (no metrics.csv in tokenizer/ or generator/, no results)")
    page = [f"# {folder.resolve().name}", ""]
    for path, protocol, metrics, run in sorted(results, key=lambda result: result[1].task, reverse=True):
        page += _result_section(path.relative_to(folder), protocol, metrics, run)
        picture = path.with_suffix(".png")
        if picture.is_file():
            page += [f"![{protocol.task}]({picture.relative_to(folder)})", ""]
    if any(curves.values()):
        plot_losses(curves, folder / CURVES)
        page += ["## Training", "", f"![loss curves]({CURVES})", ""]
    page += _time_section(folder, [(protocol.task, run) for _, protocol, _, run in results])
    for part in PARTS:
        settings = folder / part / "run.yaml"
        if settings.is_file():
            page += [f"## Settings of the {part}", "", "```yaml", settings.read_text().strip(), "```", ""]
    write_text(folder / REPORT, "\n".join(page))
    return folder / REPORT


def read_losses(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Updates and values of every column of a ``metrics.csv`` that begins with ``train/loss`` or ``val/loss``.

    Args:
        path: rows of updates with an ``update`` column; cells may be empty. A missing file has no columns.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name and value and name.startswith(("train/loss", "val/loss")):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(float(row["update"]))
                    values.append(float(value))
    for split in ("train", "val"):
        terms = [name for name in curves if name.startswith(f"{split}/loss_")]
        if len(terms) == 1:  # a single term is the loss itself
            del curves[terms[0]]
    return curves


def plot_losses(curves: dict[str, dict[str, tuple[list[float], list[float]]]], path: Path) -> None:
    """One panel for each part that has curves."""
    parts = [part for part in curves if curves[part]]
    figure = Figure(figsize=(5.5 * len(parts), 3.6), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for name, (steps, values) in sorted(curves[part].items()):
            axes.plot(steps, values, label=name, marker="o" if name.startswith("val/") else None, markersize=3)
        axes.set(title=part, xlabel="update", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def _is_result(path: Path) -> bool:
    return '"fingerprint"' in path.read_text()


def _result_section(name: Path, protocol: EvalProtocol, metrics: dict[str, Any], run: dict[str, Any]) -> list[str]:
    lines = [f"## {protocol.task.capitalize()}", ""]
    if protocol.task == "generation":
        rows = [[metric, _number(ours), _number(real)] for metric, ours, real in side_by_side(metrics)]
        lines += _table(["metric", "samples", "real held-out images"], rows)
    else:
        columns = list(next(iter(metrics["tokens"].values())))
        rows = [[length, *(_number(row[column]) for column in columns)] for length, row in metrics["tokens"].items()]
        lines += _table(["tokens", *columns], rows)
        lines += [", ".join(f"codebook {metric} {_number(value)}" for metric, value in metrics["codebook"].items()), ""]
    if "command" in run:
        spent = f"{run['seconds']:g} s, peak memory {run['peak_memory_mb']} MB, {run['device']}"
        lines += ["Measured by", "", "```", run["command"], "```", "", f"in {spent}.", ""]
    lines += [f"Result file [{name}]({name}); protocol `{protocol.fingerprint}`: {_summary(protocol)}.", ""]
    lines += ["<details><summary>the whole protocol</summary>", "", "```json"]
    return [*lines, json.dumps(asdict(protocol), indent=2), "```", "", "</details>", ""]


def _summary(protocol: EvalProtocol) -> str:
    weights = ", ".join(f"{part} {which}" for part, which in protocol.weights.items())
    settings = ", ".join(f"{name} {value}" for name, value in flatten(protocol.settings).items())
    return (
        f"{protocol.count} images of {protocol.image_size_px} px, {protocol.split} split of "
        f"{protocol.data.get('name', 'the data')}, weights: {weights}, features: "
        f"{protocol.features.get('name', 'none')}, seed {protocol.seed}, {settings}"
    )


def _time_section(folder: Path, measured: list[tuple[str, dict[str, Any]]]) -> list[str]:
    spent = []
    for part in PARTS:
        if (folder / part / SPEC).is_file():
            spec = json.loads((folder / part / SPEC).read_text())
            spent.append((f"training the {part}", spec.get("seconds")))
    spent += [(f"measuring {task}", run.get("seconds")) for task, run in measured]
    rows = [[stage, f"{seconds:.0f}"] for stage, seconds in spent if seconds is not None]
    if not rows:
        return []
    total = sum(int(row[1]) for row in rows)
    return ["## Time", "", *_table(["stage", "seconds"], [*rows, ["sum (starting Python not counted)", str(total)]])]


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    cells = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]


def _number(value: float) -> str:
    return f"{value:.4g}"
