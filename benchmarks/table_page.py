"""The page and the picture of table.py: what the stages of all systems have left, side by side."""

from __future__ import annotations

import csv
import json
import math
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from stages import Stages

from vistok.checkpoint import export_info, load_autoencoder, load_generator
from vistok.eval.protocol import EvalProtocol, load_result
from vistok.eval.report import conditions
from vistok.files import write_atomically
from vistok.tokens import TokenSpec

MEASURED = ("reconstruction", "generation", "geneval", "speed")
"""Stages that leave a file of their name with figures by the number of tokens."""

COLUMNS = {
    "PSNR, dB": ("reconstruction", "psnr_db", "{:.2f}"),
    "rFID": ("reconstruction", "rFID", "{:.2f}"),
    "gFID": ("generation", "gFID", "{:.2f}"),
    "class accuracy": ("generation", "class_accuracy", "{:.1%}"),
    "GenEval": ("geneval", "overall", "{:.3f}"),
    "sampling, images/s": ("speed", "images_per_s", "{:.4g}"),
}
"""Where a figure is measured, how its name begins there, and how it is shown.

A FID goes by its whole name, with the number of images and the feature network: nothing is called plain FID.
"""

PANELS = {
    "PSNR from tokens": ("PSNR, dB", "tokens", "linear"),
    "PSNR from bits": ("PSNR, dB", "bits", "linear"),
    "gFID from tokens": ("gFID", "tokens", "log"),
    "gFID in sampling time": ("gFID", "ms per image", "log"),
}
"""Figure, what it is drawn against, and the scale of its axis."""

MARKERS = "osD^vPX*<>phd8"

NONE = "-"


@dataclass
class Outcome:
    """What is known of one system.

    Args:
        title: its name.
        spec: of its tokens; None if they were not made.
        parameters: of tokenizer and generator.
        training: images a second of tokenizer and generator.
        rows: figures of each of :data:`MEASURED`, by the number of tokens.
        protocols: of those that have one.
        real: figures of real held-out images, and how many they are, by the stage that has measured them.
    """

    title: str
    spec: TokenSpec | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    protocols: dict[str, EvalProtocol] = field(default_factory=dict)
    real: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)

    def figure(self, column: str, tokens: int) -> float | None:
        """A figure of :data:`COLUMNS`."""
        task, start, _ = COLUMNS[column]
        return beginning(start, self.rows.get(task, {}).get(tokens, {}))

    def points(self, column: str) -> dict[int, float]:
        """A figure by the number of tokens."""
        found = {tokens: self.figure(column, tokens) for tokens in sorted(self.rows.get(COLUMNS[column][0], {}))}
        return {tokens: value for tokens, value in found.items() if value is not None}

    def bits(self, tokens: int) -> float | None:
        """What so many tokens can say; None if they are not discrete."""
        sizes = self.spec.vocab_sizes if self.spec else ()
        return tokens * sum(map(math.log2, sizes)) if sizes else None


def read_outcome(title: str, folder: Path, trained: dict[str, Path], succeeded: set[str]) -> Outcome:
    """What a system's stages have left.

    Args:
        title: its name.
        folder: of its stages.
        trained: run folders of its tokenizer (the continuous one, if it was made discrete) and of its generator.
        succeeded: stages that did.
    """
    found = Outcome(title)
    for part, load in (("tokenizer", load_autoencoder), ("generator", load_generator)):
        if part in succeeded:
            found.parameters[part] = sum(parameter.numel() for parameter in load(trained[part]).parameters())
            found.training[part] = training_speed(trained[part] / "metrics.csv")
            found.spec = found.spec or export_info(folder / part)["spec"]
    for task in succeeded.intersection(MEASURED):
        path = folder / f"{task}.json"
        metrics = json.loads(path.read_text())
        if task != "speed":
            found.protocols[task], metrics, _ = load_result(path)
        found.rows[task] = {int(tokens): row for tokens, row in metrics["tokens"].items()}
        if "held_out" in metrics:
            found.real[task] = metrics["held_out"], metrics["counts"]["held_out"]
    return found


def beginning(start: str, row: dict[str, float]) -> float | None:
    """The first figure of a row whose name begins so."""
    return next((value for name, value in row.items() if name.startswith(start)), None)


def training_speed(path: Path) -> float:
    """Images a second of a ``metrics.csv``: the median, so that what disturbed a part of the run does not count."""
    with path.open(newline="") as file:
        speeds = [row["train/images_per_s"] for row in csv.DictReader(file)]
    return statistics.median(float(speed) for speed in speeds if speed)


def page(groups: dict[str, list[Outcome]], budgets: dict[str, str], stages: Stages, picture: str, how: str) -> str:
    """The whole page, in Markdown.

    Args:
        groups: systems by data set.
        budgets: of each data set, in words.
        stages: which have been run.
        picture: address of the plot.
        how: they were run.
    """
    records = [record for stage in stages.stages if (record := stages.record(stage.name)).get("ended")]
    commits = sorted({commit for record in records for commit in record["commits"]})
    dates = sorted({time.strftime("%Y-%m-%d", time.localtime(record["ended"])) for record in records})
    wall, processor = (sum(record[key] for record in records) / 60 for key in ("seconds", "processor_seconds"))
    lines = [
        "# Every system at equal budget",
        "",
        f"`{shlex.join(['python', *sys.argv])}`, commit {', '.join(commits)}, "
        f"{' to '.join(dates[:1] + dates[1:][-1:])}, {machine()}; {how} (sampling speed: one alone). "
        f"{len(records)} of {len(stages.stages)} stages finished, {wall:.0f} minutes one after the other, "
        f"{processor:.0f} of processor time.",
        "",
        "The budget is equal in images seen. Bits: the logarithm of how many codes the tokens can be. Samples are made "
        "in batches from a class or a caption, decoding included. Training speeds are medians over the run, "
        "without validation, pictures and checkpoints.",
        "",
        f"![quality against tokens, bits and sampling time]({picture})",
        "",
    ]
    for name, outcomes in groups.items():
        lines += [f"## {name}", "", budgets[name], "", *tables(outcomes), *protocols(outcomes)]
    if stages.failed:
        lines += ["## Not finished", "", *(f"- {name}: {reason}" for name, reason in stages.failed.items()), ""]
    lines += ["## Commands", "", "<details><summary>of all stages</summary>", "", "```"]
    return "\n".join([*lines, *(stage.words for stage in stages.stages), "```", "", "</details>", ""])


def tables(outcomes: list[Outcome]) -> list[str]:
    """All systems of one data set from all tokens; and by tokens those whose first tokens are an image already."""
    parts, rows, by_tokens = ("tokenizer", "generator"), [], []
    used = [column for column in COLUMNS if any(one.points(column) for one in outcomes)]
    for one in outcomes:

        def measured(tokens: int, one: Outcome = one) -> list[str]:
            figures = [shown(COLUMNS[column][2], one.figure(column, tokens)) for column in used]
            return [shown("{:.0f}", one.bits(tokens)), *figures]

        speeds = [shown("{:,.0f}", one.training.get(part)) for part in parts]
        sizes = [shown("{:,}", one.parameters.get(part)) for part in parts]
        rows.append([one.title, positions(one.spec), *measured(one.spec.num_positions if one.spec else 0)])
        rows[-1] += [*speeds, *sizes]
        lengths = sorted({tokens for column in used for tokens in one.points(column)})
        by_tokens += [[one.title, str(tokens), *measured(tokens)] for tokens in lengths if len(lengths) > 1]
    for task in MEASURED:
        for real, count in [one.real[task] for one in outcomes if task in one.real][:1]:
            words = f"{count:,} real held-out images" + " of other prompts" * (task == "geneval")
            columns = [COLUMNS[column] for column in used]
            figures = [shown(how, beginning(start, real) if where == task else None) for where, start, how in columns]
            rows.append([words, NONE, NONE, *figures, *[NONE] * 4])
    columns = ["system", "tokens", "bits", *(heading(column, outcomes) for column in used)]
    more = [f"{what}, {part}" for what in ("training images/s", "parameters") for part in parts]
    lines = markdown([*columns, *more], rows)
    if by_tokens:
        lines += ["Those whose first tokens are an image already:", "", *markdown(columns, by_tokens)]
    return lines


def heading(column: str, outcomes: list[Outcome]) -> str:
    """The name of a column; of a FID the one under which it was measured."""
    task, start, _ = COLUMNS[column]
    rows = [row for one in outcomes for row in one.rows.get(task, {}).values()]
    return next((name for row in rows for name in row if name.startswith(start)), column) if start == column else column


def protocols(outcomes: list[Outcome]) -> list[str]:
    """Under which conditions each figure was measured, and in what they differ between systems."""
    lines = []
    for task in MEASURED:
        measured = [one for one in outcomes if task in one.protocols]
        for first in measured[:1]:
            names = sorted({name for one in measured for row in one.rows[task].values() for name in row})
            protocol = first.protocols[task]
            lines += [f"**{task.capitalize()}** ({', '.join(names)}), protocol `{protocol.fingerprint}`: "]
            lines[-1] += f"{conditions(protocol)}."
        for one in measured[1:]:
            differences = one.protocols[task].differences(first.protocols[task])
            # What a kind of system has no choice in: how many tokens, which options its decoder and sampler have.
            same = all(line.startswith("settings / ") for line in differences)
            lines.append(f"- {one.title}, `{one.protocols[task].fingerprint}`: {'; '.join(differences) or 'the same'}")
            lines[-1] += "" if same else " **(not comparable)**"
        lines += [""] if measured else []
    return lines


def positions(spec: TokenSpec | None) -> str:
    """How many tokens, and how many codes or channels each has, where there are several."""
    if spec is None:
        return NONE
    if not spec.vocab_sizes:
        return f"{spec.num_positions} of {spec.latent_dim} floats"
    return f"{spec.num_positions}" + f" of {spec.num_slots} codes" * (spec.num_slots > 1)


def shown(how: str, value: float | None) -> str:
    """A figure as the table shows it."""
    return NONE if value is None else how.format(value)


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table whose first column is words."""
    cells = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]


def plot(groups: dict[str, list[Outcome]], path: Path) -> None:
    """Quality against tokens, bits and sampling time: a row for each data set, all of its systems in each panel."""
    titles = dict.fromkeys(one.title for outcomes in groups.values() for one in outcomes)
    looks = {
        title: {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)]} for number, title in enumerate(titles)
    }
    figure = Figure(figsize=(4 * len(PANELS) + 3, 4 * len(groups)), layout="constrained")
    for (name, outcomes), panels in zip(groups.items(), figure.subplots(len(groups), len(PANELS), squeeze=False)):
        for axes, (title, (column, against, scale)) in zip(panels, PANELS.items()):
            for one in outcomes:
                points = []
                for tokens, value in one.points(column).items():
                    speed = one.figure("sampling, images/s", tokens)
                    place = {"tokens": tokens, "bits": one.bits(tokens), "ms per image": speed and 1000 / speed}[
                        against
                    ]
                    points += [(place, value)] if place else []
                if points:
                    axes.plot(*zip(*points), **looks[one.title], markersize=7, alpha=0.8)
            axes.set(title=f"{name}: {title}", xlabel=against, ylabel=heading(column, outcomes), yscale=scale)
            axes.set_xscale("log", base=2)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if scale == "log" else NullFormatter())
            axes.grid(alpha=0.3, which="both")
    lines = [Line2D([], [], label=title, **look) for title, look in looks.items()]
    figure.legend(handles=lines, loc="outside right upper")
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def machine() -> str:
    """Processor, accelerator and version of torch."""
    try:
        described = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        described = []
    names = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([names[0] if names else platform.machine(), *gpu, f"torch {version('torch')}"])
