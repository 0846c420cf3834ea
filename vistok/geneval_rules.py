"""GenEval's rules (Ghosh et al., 2023): whether the objects found in an image are those that its prompt asks for.

An entry, one line of the benchmark's metadata, has a ``prompt``, a ``tag`` (one of six tasks), a list ``include`` and
perhaps a list ``exclude`` of clauses ``{class, count, color?, position?}``. An image is right if every clause holds:

- ``include``: there are ``count`` objects of the class. The likeliest ``count`` are looked at: all of them have the
  ``color``, and all stand in the ``position`` ``[relation, index of a clause]`` to all objects of that clause.
- ``exclude``: there are fewer than ``count`` objects of the class.

Where the objects come from, a learned detector or the pixels of a procedural world, makes no difference here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool

T = TypeVar("T")

TASKS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
"""Prompts of each task in the benchmark, 553 in all."""

RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; x to the right, y down, in any unit."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """Which detections count. The defaults are GenEval's, for its Mask2Former; scores of other detectors differ.

    Args:
        min_score: detections must score more.
        min_counting_score: the same for the task ``counting``.
        max_objects: of one class, the likeliest.
        nms_iou: a detection that overlaps a likelier one of its class by so much is the same object; 1 never.
        position_margin: share of the two widths (heights) by which an offset must exceed nothing.
    """

    min_score: float = 0.3
    min_counting_score: float = 0.9
    max_objects: int = 16
    nms_iou: float = 1.0
    position_margin: float = 0.1


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    Args:
        name: its class.
        score: confidence in [0, 1].
        box: in pixels.
        color: where the detector tells it.
        mask: its pixels, where the detector tells them.
    """

    name: str
    score: float
    box: Box
    color: str = ""
    mask: Bool[np.ndarray, "H W"] | None = None


Colors = Callable[[list[Detection]], list[str]]
"""Names the colours of objects of one class."""


def faults(detections: Iterable[Detection], entry: Entry, rules: Rules, colors: Colors) -> list[str]:
    """What is wrong with an image, one line for each clause that does not hold; an image without faults is right.

    Args:
        detections: all objects found in the image, in any order.
        entry: see the module.
        rules: see :class:`Rules`.
        colors: called only for clauses with a colour, since it may cost more than the detection.
    """
    objects = counted(detections, entry["tag"], rules)
    lines: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in entry["include"]:
        group = objects.get(clause["class"], [])[: clause["count"]]
        line = _missing(group, clause, groups, rules, colors)
        groups.append(None if line else group)
        lines += [line] * bool(line)
    for clause in entry.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            lines.append(f"{clause['class']}: fewer than {clause['count']} wanted, {found} found")
    return lines


def counted(detections: Iterable[Detection], task: str, rules: Rules) -> dict[str, list[Detection]]:
    """The detections that count in ``task``, by class, likeliest first."""
    least = rules.min_counting_score if task == "counting" else rules.min_score
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        group = objects.setdefault(detection.name, [])
        if detection.score > least and len(group) < rules.max_objects:
            group.append(detection)
    return {name: _without_doubles(group, rules.nms_iou) for name, group in objects.items()}


def relations(box: Box, other: Box, margin: float = Rules.position_margin) -> list[str]:
    """Where ``box`` stands from ``other``: no relation, one, or on a diagonal two.

    The offset of the centres is shortened along each axis by ``margin`` times the sum of both sizes. Divided by the
    length of the full offset, it must exceed 0.5.
    """
    a, b = (np.array(box, dtype=np.float64).reshape(2, 2) for box in (box, other))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = abs(a[1] - a[0]) + abs(b[1] - b[0])
    shortened = np.sign(offset) * np.maximum(abs(offset) - margin * sizes, 0)
    if (abs(shortened) < 1e-3).all():
        return []
    x, y = shortened / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return [relation for relation, true in zip(RELATIONS, holds) if true]


def spread(items: list[T], count: int) -> list[T]:
    """``count`` of ``items`` in order: evenly spaced, or each as often as the others give or take one."""
    return [items[index * len(items) // count] for index in range(count)]


def _missing(
    group: list[Detection], clause: Entry, groups: list[list[Detection] | None], rules: Rules, colors: Colors
) -> str:
    """What an ``include`` clause misses in the likeliest objects of its class; empty if nothing."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"{name}: {count} wanted, {len(group)} found"
    if "color" in clause:
        seen = colors(group)
        if seen.count(clause["color"]) < count:
            return f"{name}: {clause['color']} wanted, {' and '.join(seen)} found"
    if "position" in clause:
        relation, target = clause["position"]
        others = groups[target]
        if others is None:
            return f"{name}: nothing there that it could be {relation}"
        for a, b in itertools.product(group, others):
            found = relations(a.box, b.box, rules.position_margin)
            if relation not in found:
                return f"{name}: {relation} {b.name} wanted, {' and '.join(found) or 'neither side'} found"
    return ""


def _without_doubles(group: list[Detection], nms_iou: float) -> list[Detection]:
    kept: list[Detection] = []
    for detection in group:
        if nms_iou == 1 or all(_iou(detection.box, other.box) < nms_iou for other in kept):
            kept.append(detection)
    return kept


def _iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes whose last pixels belong to them, as GenEval counts."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1) for i in (0, 1))
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
