"""Grids of images with labelled rows and columns, for people to look at."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vistok.checkpoint import write_atomically

_GAP_PX = 2
_FONT_PX = 14


def labelled_grid(
    images: UInt8[Tensor, "R K 3 H W"],
    rows: list[str],
    columns: list[str],
    cell_px: int = 64,
) -> Image.Image:
    """A picture of ``R x K`` images.

    Args:
        images: the cells.
        rows: one label per row, left of it; empty strings take no room.
        columns: one label per column, above it; empty strings take no room.
        cell_px: smallest side of a cell; smaller images are enlarged by a whole factor without smoothing, so that
            every pixel stays visible.
    """
    side_y, side_x = images.shape[-2:]
    factor = max(1, -(-cell_px // max(side_y, side_x)))
    height, width = side_y * factor, side_x * factor
    font = ImageFont.load_default(_FONT_PX)
    left = max((int(font.getlength(label)) + 8 for label in rows if label), default=0)
    top = _FONT_PX + 8 if any(columns) else 0

    size = (left + len(columns) * (width + _GAP_PX), top + len(rows) * (height + _GAP_PX))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        centre = left + column * (width + _GAP_PX) + width // 2
        draw.text((centre, 4), label, "black", font, anchor="mt")
    for row, label in enumerate(rows):
        y = top + row * (height + _GAP_PX)
        draw.text((4, y + height // 2), label, "black", font, anchor="lm")
        for column in range(len(columns)):
            cell = to_pil(images[row, column]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + column * (width + _GAP_PX), y))
    return canvas


def rows_by_label(
    images: UInt8[Tensor, "N 3 H W"], labels: list[str], columns: int = 10
) -> tuple[UInt8[Tensor, "R K 3 H W"], list[str], list[str]]:
    """The first arguments of :func:`labelled_grid`: images of one label side by side, white where a row is not full.

    Args:
        images: in any order.
        labels: one for each image.
        columns: images per row, at most; a label with more takes several rows.
    """
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    columns = min(columns, max(map(len, groups.values())))
    rows = [(label, group[i : i + columns]) for label, group in groups.items() for i in range(0, len(group), columns)]
    cells = images.new_full((len(rows), columns, *images.shape[1:]), 255)
    for row, (_, group) in enumerate(rows):
        cells[row, : len(group)] = images[group]
    return cells, [label for label, _ in rows], [""] * columns


def to_pil(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """One image as PIL knows it."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; ``path`` is whole or absent."""
    write_atomically(path, lambda partial: image.save(partial, format="PNG"))
