"""Images as people and evaluators want them: uint8, labelled grids, PNG files, ``samples.npz``."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vistok.files import write_atomically

_GAP_PX = 2
_FONT_PX = 14
_LINE_PX, _LINE_CHARACTERS = 18, 32
_ROWS, _MOST_ROWS = 10, 100


def to_uint8(images: Float[Tensor, "*B 3 H W"]) -> UInt8[Tensor, "*B 3 H W"]:
    """Images in [-1, 1] as 0..255, rounded to the nearest level; values outside the range are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def labelled_grid(
    images: UInt8[Tensor, "R K 3 H W"],
    rows: list[str],
    columns: list[str],
    cell_px: int = 64,
) -> Image.Image:
    """A picture of ``R x K`` images.

    Args:
        images: the cells.
        rows: one label per row, left of it, long ones in as many lines as there is room for; empty strings take no
            room.
        columns: one label per column, above it; empty strings take no room.
        cell_px: smallest side of a cell; smaller images are enlarged by a whole factor without smoothing, so that
            every pixel stays visible.
    """
    side_y, side_x = images.shape[-2:]
    factor = max(1, -(-cell_px // max(side_y, side_x)))
    height, width = side_y * factor, side_x * factor
    font = ImageFont.load_default(_FONT_PX)
    rows = [_wrapped(label, max(1, height // _LINE_PX)) for label in rows]
    left = max((int(font.getlength(line)) + 8 for label in rows for line in label.splitlines()), default=0)
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


def _wrapped(label: str, lines: int) -> str:
    return "\n".join(wrap(label, _LINE_CHARACTERS, max_lines=lines, placeholder=" ..."))


def rows_by_label(
    images: UInt8[Tensor, "N 3 H W"], labels: list[str], columns: int = 10
) -> tuple[UInt8[Tensor, "R K 3 H W"], list[str], list[str]]:
    """The first arguments of :func:`labelled_grid`: images of one label side by side, white where a row is not full.

    A picture of about ten rows, whatever the number of images: few labels take several rows each; many take one each,
    the first 100 of them.

    Args:
        images: in any order.
        labels: one for each image.
        columns: images per row, at most.
    """
    rows = places_by_label(labels, columns)
    cells = images.new_full((len(rows), max(len(places) for _, places in rows), *images.shape[1:]), 255)
    for row, (_, places) in enumerate(rows):
        cells[row, : len(places)] = images[places]
    return cells, [label for label, _ in rows], [""] * cells.shape[1]


def places_by_label(labels: list[str], columns: int = 10) -> list[tuple[str, list[int]]]:
    """The label of each row of :func:`rows_by_label`, and which of all images are in it."""
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    columns = min(columns, max(map(len, groups.values())))
    most = columns * max(1, _ROWS // len(groups))
    return [
        (label, group[start : start + columns])
        for label, group in list(groups.items())[:_MOST_ROWS]
        for start in range(0, min(most, len(group)), columns)
    ]


def to_pil(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """One image as PIL knows it."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def prefix_grid(
    originals: UInt8[Tensor, "N 3 H W"] | None, decoded: dict[int, UInt8[Tensor, "N 3 H W"]], rows: list[str]
) -> Image.Image:
    """Rows are images (the first 100), columns the original and what was decoded from each number of tokens.

    Args:
        originals: what was encoded; None for samples, which have no such column.
        decoded: the images by the number of tokens they were decoded from.
        rows: one label per image, as in :func:`labelled_grid`.
    """
    columns = {f"{length} token{'s' * (length > 1)}": images for length, images in decoded.items()}
    if originals is not None:
        columns = {"original": originals} | columns
    cells = torch.stack([images[:_MOST_ROWS] for images in columns.values()], dim=1)
    return labelled_grid(cells, rows[:_MOST_ROWS], list(columns), cell_px=72)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; ``path`` is whole or absent."""
    write_atomically(path, lambda partial: image.save(partial, format="PNG"))


def save_npz(path: Path, images: UInt8[Tensor, "N 3 H W"]) -> None:
    """Write images as ``arr_0``, uint8 ``(N, H, W, 3)``; ``path`` is whole or absent."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())

    write_atomically(path, write)


def save_images(folder: Path, images: UInt8[Tensor, "N 3 H W"], labels: list[str], first: int = 0) -> None:
    """Write ``samples.npz`` (the field's format for FID), ``grid.png``, ``00000.png`` and so on into ``folder``.

    Args:
        folder: made if missing.
        images: at least one.
        labels: one for each image; a row of the grid holds images of one label, see :func:`rows_by_label`.
        first: number of the first image.
    """
    folder = Path(folder)
    # First what took the time to make and what evaluators read.
    save_npz(folder / "samples.npz", images)
    save_png(labelled_grid(*rows_by_label(images, labels)), folder / "grid.png")
    for index, image in enumerate(images, first):
        save_png(to_pil(image), folder / f"{index:05d}.png")
