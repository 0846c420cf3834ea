"""One page about a run: its figures with the commands that measured them, its loss curves and its settings."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistok.checkpoint import SPEC
from vistok.errors import UserError
from vistok.eval.codebook import describe
from vistok.eval.curves import curve_of, plot_losses
from vistok.eval.protocol import EvalProtocol, flatten, load_result, number, of_figure, table_by_tokens
from vistok.eval.reconstruction import table_by_steps
from vistok.files import write_text

Result = tuple[Path, EvalProtocol, dict[str, Any], dict[str, Any]]
"""Path below the run, protocol, metrics and circumstances of one result file."""

PARTS = ("tokenizer", "generator")
TASKS = ("reconstruction", "generation", "geneval", "dpg", "genai", "compbench", "object-binding", "probe")
"""Names of the files that the commands of ``python -m vistok.eval`` write."""
ASKED = {
    "dpg": "DPG-Bench",
    "genai": "GenAI-Bench",
    "compbench": "T2I-CompBench",
    "object-binding": "Object binding",
}
HEADLINES = ("class_accuracy", "recall", "copies_share", "gFID")
LOSSES = "loss_curves.png"
REPORT = "report.md"


def write_report(folder: Path) -> Path:
    """Write ``loss_curves.png`` and ``report.md`` into a run with a ``tokenizer/`` and a ``generator/``.

    Read, where they are there: ``{tokenizer,generator}/metrics.csv``, ``spec.json`` and ``run.yaml``, and every result
    file of ``python -m vistok.eval`` with the pictures beside it.

    Args:
        folder: the run.

    Returns:
        Path of the page.

    Raises:
        UserError: if there is nothing to report on, or a result file is damaged or of another version.
    """
    folder = Path(folder)
    curves = {part: read_losses(folder / part / "metrics.csv") for part in PARTS}
    results = read_results(folder)
    if not any(curves.values()) and not results:
        raise UserError(f"{folder}: nothing to report on (no metrics.csv in tokenizer/ or generator/, no results)")
    stages = _stages(folder, results)
    page = [f"# {folder.resolve().name}", "", *_summary(results, stages)]
    for result in results:
        page += _result_section(folder, *result)
    if any(curves.values()):
        plot_losses(curves, folder / LOSSES)
        page += ["## Training", "", f"![loss curves]({LOSSES})", ""]
    if stages:
        rows = [[stage, f"{seconds:.0f}"] for stage, seconds in stages]
        page += ["## Time", "", *_table(["stage", "seconds"], rows)]
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


def read_results(folder: Path) -> list[Result]:
    """The results below a run, reconstruction first, then generation.

    Raises:
        UserError: naming a file that is damaged, or of another version.
    """
    files = [path for path in sorted(folder.rglob("*.json")) if _is_result(path)]
    results = [(path.relative_to(folder), *load_result(path)) for path in files]
    for path, _, metrics, _ in results:
        if not {"tokens", "counts"} <= metrics.keys():
            raise UserError(f"{folder / path} was written by another version of vistok: measure again or remove it")
    return sorted(results, key=lambda result: result[1].task, reverse=True)


def _is_result(path: Path) -> bool:
    """By its name, which a damaged one keeps, or by what it says."""
    return path.stem in TASKS or '"fingerprint"' in path.read_text(errors="replace")


def _summary(results: list[Result], stages: list[tuple[str, float]]) -> list[str]:
    rows = []
    for path, protocol, metrics, _ in results:
        # A run may have been measured more than once.
        of = f" ({path})" if sum(other.task == protocol.task for _, other, _, _ in results) > 1 else ""
        if protocol.task == "reconstruction":
            rows.append([f"reconstruction{of}: images measured", str(metrics["counts"]["images"]), ""])
            rows += [
                [f"reconstruction{of}: PSNR from {_tokens(length)}", f"{row['psnr_db']:.2f} dB", ""]
                for length, row in metrics["tokens"].items()
            ]
        elif protocol.task == "probe":
            (row,) = metrics["tokens"].values()
            rows.append(
                [f"probe{of}: held-out images of which a linear classifier finds the class", f"{row['top1']:.2%}", ""]
            )
        elif protocol.task == "geneval":
            chance = metrics.get("held_out", {})
            rows += [
                [f"GenEval{of}: {task}, share of images right", number(value), number(chance[task]) if chance else ""]
                for task, value in list(metrics["tokens"].values())[-1].items()
            ]
        elif protocol.task in ASKED:
            title = f"{ASKED[protocol.task]}{of} by the judge {protocol.features['name']}"
            rows += [
                [f"{title}: {name}", number(value), ""] for name, value in list(metrics["tokens"].values())[-1].items()
            ]
        else:
            counts = metrics["counts"]
            rows.append([f"samples{of}: images measured", str(counts["samples"]), str(counts.get("held_out", ""))])
            longest, row = list(metrics["tokens"].items())[-1]
            rows += [
                [f"samples{of}: {name} from {_tokens(longest)}", number(value), _of_real(metrics, name)]
                for name, value in row.items()
                if name.startswith(HEADLINES)
            ]
    if stages:
        total = sum(seconds for _, seconds in stages)
        rows.append(["training and measuring (starting Python not counted)", f"{total:.0f} s", ""])
    return _table(["figure", "value", "of real held-out images"], rows)


def _result_section(
    folder: Path, path: Path, protocol: EvalProtocol, metrics: dict[str, Any], run: dict[str, Any]
) -> list[str]:
    lines = [f"## {protocol.task.capitalize()} of {protocol.count} images", "", *_table(*table_by_tokens(metrics))]
    if "steps" in metrics:
        lines += _table(*table_by_steps(metrics))
    if metrics.get("codebook"):
        lines += [*(f"- {line}" for line in describe(metrics["codebook"])), ""]
    pictures = {protocol.task: path.with_suffix(".png")}
    if len(metrics["tokens"]) > 1:  # an older curve may lie beside a single count
        pictures[f"{protocol.task} by tokens"] = curve_of(path)
    if "steps" in metrics:
        pictures[f"{protocol.task} by steps"] = curve_of(path, "steps")
    for name, picture in pictures.items():
        if (folder / picture).is_file():
            lines += [f"![{name}]({picture})", ""]
    if "command" in run:
        spent = f"{run['seconds']:g} s, peak memory {run['peak_memory_mb']} MB, {run['device']}"
        lines += ["Measured by", "", "```", run["command"], "```", "", f"in {spent}.", ""]
    lines += [f"Result file [{path}]({path}); protocol `{protocol.fingerprint}`: {conditions(protocol)}.", ""]
    lines += ["<details><summary>the whole protocol</summary>", "", "```json"]
    return [*lines, json.dumps(asdict(protocol), indent=2), "```", "", "</details>", ""]


def conditions(protocol: EvalProtocol) -> str:
    """The most important ones, in a line."""
    weights = ", ".join(f"{part} {which}" for part, which in protocol.weights.items())
    settings = ", ".join(f"{name} {value}" for name, value in flatten(protocol.settings).items() if value is not None)
    return (
        f"{protocol.count} images of {protocol.image_size_px} px, {protocol.split} split of "
        f"{protocol.data.get('name', 'the data')}, weights: {weights}, features: "
        f"{protocol.features.get('name', 'none')}, seed {protocol.seed}, {settings}"
    )


def _of_real(metrics: dict[str, Any], name: str) -> str:
    value = of_figure(metrics.get("held_out", {}), name)
    return "" if value is None else number(value)


def _tokens(length: str) -> str:
    return f"{length} token{'s' * (length != '1')}"


def _stages(folder: Path, results: list[Result]) -> list[tuple[str, float]]:
    """What took how many seconds, as far as it is known."""
    spent = []
    for part in PARTS:
        if (folder / part / SPEC).is_file():
            spent.append((f"training the {part}", json.loads((folder / part / SPEC).read_text()).get("seconds")))
    spent += [(f"measuring {protocol.task}", run.get("seconds")) for _, protocol, _, run in results]
    return [(stage, seconds) for stage, seconds in spent if seconds is not None]


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    cells = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]
