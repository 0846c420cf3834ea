"""Curves as PNG files: losses against updates, metrics against the number of tokens or steps."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from vistok.eval.protocol import of_figure
from vistok.files import write_atomically


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
    _save(figure, path)


def plot_by_tokens(
    rows: dict[str, dict[str, float]], path: Path, real: dict[str, float] | None = None, axis: str = "tokens"
) -> None:
    """One panel for each metric, against the number of tokens, or of steps, on a logarithmic axis.

    Args:
        rows: metrics by name, by the number of tokens.
        path: the file.
        real: the same metrics of real images, as a dashed line; None without them.
        axis: what the numbers count.
    """
    counts = [int(count) for count in rows]
    names = list(rows[str(counts[0])])
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names):
        axes.plot(counts, [row[name] for row in rows.values()], marker="o", markersize=4)
        if real is not None and (value := of_figure(real, name)) is not None:
            axes.axhline(value, color="gray", linestyle="--", label="real held-out images")
            axes.legend(fontsize="x-small")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    _save(figure, path)


def curve_of(result: Path, axis: str = "tokens") -> Path:
    """Where the curve of a result file lies: beside it."""
    return result.with_name(f"{result.stem}_by_{axis}.png")


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
