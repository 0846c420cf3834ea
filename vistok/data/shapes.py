"""``shapes``: a procedural, captioned world that can be read back exactly.

One to three objects (6 shapes x 8 colours x 2 sizes) stand apart on a plain dark background. Sample i depends on
(seed, split, i) alone. Some pairs of shape and colour never occur in training; the validation split has them all.

An image holds enough to recover its scene, so models can be scored without a learned detector: :func:`detect` reads
the objects, :func:`agreement` says how much of a scene a reconstruction keeps, and :func:`detections` gives the objects
to GenEval's rules, for the prompts of :func:`geneval_prompts` (Ghosh et al., 2023).

Coordinates are fractions of the image side, x to the right and y down; radii are those of the bounding circle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from vistok.errors import UserError
from vistok.geneval_rules import RELATIONS, Box, Detection, Entry, Rules, relations
from vistok.rng import derive_seed

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLORS = {
    "red": (0.93, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.15, 0.35, 1.00),
    "purple": (0.60, 0.15, 0.80),
    "pink": (1.00, 0.55, 0.80),
    "white": (1.00, 1.00, 1.00),
}
RADII = {"small": 0.12, "large": 0.19}
HELD_OUT = frozenset((shape, list(COLORS)[(3 * i + 1) % len(COLORS)]) for i, shape in enumerate(SHAPES))
"""Pairs of shape and colour that never occur in the training split."""

_GAP = 0.04
_SUPERSAMPLES = 4
_MIN_SHARE = 0.4  # a small triangle under a blur of a sixteenth of the image side keeps a little more
_MIN_OVERLAP = 0.65
_NEAR = 1 / 32
_COLOR_NAMES = tuple(COLORS)
_RGB = np.array(list(COLORS.values()), dtype=np.float32)
_KINDS = tuple(itertools.product(SHAPES, RADII))
_NUMBERS = {2: "two", 3: "three"}


@dataclass
class Config:
    """Size of the world.

    Args:
        train_count: training images.
        val_count: validation images.
        max_objects: objects in one image, 1 to 3.
        seed: names the world.
    """

    train_count: int = 20_000
    val_count: int = 1_000
    max_objects: int = 3
    seed: int = 0


@dataclass(frozen=True)
class SceneObject:
    """One object, as drawn or as detected; ``x`` and ``y`` are its centre."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Bounding radius as a fraction of the image side."""
        return RADII[self.size]

    @property
    def box(self) -> Box:
        """Around the bounding circle, in fractions of the image side."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Scene:
    """What one image shows; ``background`` is a grey level in [0, 1]."""

    objects: tuple[SceneObject, ...]
    background: float
    caption: str


class Shapes:
    """Images of the world with captions; the label is the shape of the first object.

    Args:
        config: size of the world.
        split: ``train`` or ``val``.
        image_size_px: side of the images, at least 24 (smaller, the shapes cannot be told apart).

    Raises:
        UserError: if ``image_size_px``, a count or ``max_objects`` is out of range.
    """

    num_classes = len(SHAPES)
    # Soft overlaps are no probabilities: one threshold, the detector's own, serves all tasks.
    geneval_rules = Rules(min_score=_MIN_OVERLAP, min_counting_score=_MIN_OVERLAP)

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        self.count = config.train_count if split == "train" else config.val_count
        if image_size_px < 24:
            raise UserError(f"shapes: image_size_px must be at least 24, got {image_size_px}")
        if self.count < 1 or not 1 <= config.max_objects <= 3:
            raise UserError(
                f"shapes: need a count above 0 and max_objects 1 to 3, got {self.count}, {config.max_objects}"
            )
        self.config, self.split, self.image_size_px = config, split, image_size_px
        self.class_names, self.agreement_definitions = list(SHAPES), AGREEMENT
        self.description = {
            "name": "shapes",
            "split": split,
            "count": self.count,
            "image_size_px": image_size_px,
            "max_objects": config.max_objects,
            "seed": config.seed,
        }

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """What image ``index`` shows."""
        rng = np.random.default_rng(derive_seed("shapes", self.config.seed, self.split, index))
        return _draw_scene(rng, self.config.max_objects, held_out=self.split == "val")

    def get(self, index: int, rng: torch.Generator | None = None) -> dict:
        """Sample ``index``; there is nothing to augment, ``rng`` is not used."""
        scene = self.scene(index)
        return {
            "image": render(scene, self.image_size_px),
            "label": SHAPES.index(scene.objects[0].shape),
            "text": scene.caption,
            "key": f"shapes/{self.split}/{index:06d}",
        }

    def agreement(self, index: int, image: Float[Tensor, "3 H W"]) -> dict[str, float]:
        """How much of image ``index`` a reconstruction shows: :func:`agreement` with its scene."""
        return agreement(self.scene(index), image)

    def geneval_prompts(self) -> dict[str, list[Entry]]:
        """Prompts about this split's pairs of shape and colour: :func:`geneval_prompts`."""
        return geneval_prompts(self.split)

    def detections(self, image: Float[Tensor, "3 H W"]) -> list[Detection]:
        """The objects of an image in the form of GenEval's rules: :func:`detections`."""
        return detections(image)


def build(config: Config, split: str, image_size_px: int) -> Shapes:
    """The world's images of ``split`` at ``image_size_px``."""
    return Shapes(config, split, image_size_px)


# ---- drawing ---------------------------------------------------------------------------------------------------


def render(scene: Scene, image_size_px: int) -> Float[Tensor, "3 H W"]:
    """The antialiased picture of ``scene``, in [-1, 1]."""
    canvas = np.full((image_size_px, image_size_px, 3), scene.background, dtype=np.float32)
    for thing in scene.objects:
        x, y, radius = (value * image_size_px for value in (thing.x, thing.y, thing.radius))
        left, top = int(x - radius), int(y - radius)
        cover = _coverage(thing.shape, x - left, y - top, radius, int(2 * radius) + 2)[..., None]
        window = canvas[top : top + len(cover), left : left + len(cover)]
        cover = cover[: window.shape[0], : window.shape[1]]
        window += cover * (_RGB[_COLOR_NAMES.index(thing.color)] - window)
    return torch.from_numpy(canvas * 2 - 1).permute(2, 0, 1).contiguous()


def _coverage(shape: str, x_px: float, y_px: float, radius_px: float, width_px: int) -> Float[np.ndarray, "W W"]:
    """Share of each pixel of a ``width_px`` square that the shape covers."""
    n = _SUPERSAMPLES
    points = (np.arange(width_px * n, dtype=np.float32) + 0.5) / n
    inside = _inside(shape, (points[None] - x_px) / radius_px, (points[:, None] - y_px) / radius_px)
    return inside.reshape(width_px, n, width_px, n).mean(axis=(1, 3), dtype=np.float32)


def _inside(shape: str, u: Float[np.ndarray, "1 W"], v: Float[np.ndarray, "H 1"]) -> Bool[np.ndarray, "H W"]:
    """Whether points lie in a shape of bounding radius 1 whose centroid is the origin."""
    if shape == "circle":
        return u * u + v * v <= 0.8**2
    if shape == "square":
        return (abs(u) <= 0.7) & (abs(v) <= 0.7)
    if shape == "triangle":
        return (v <= 0.5) & (3**0.5 * abs(u) - v <= 1)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "cross":
        return (abs(u) <= 0.32) & (abs(v) <= 0.94) | (abs(u) <= 0.94) & (abs(v) <= 0.32)
    # A star is ten mirror images of one triangle: fold the plane onto the half-wedge between a tip and a notch.
    angle, distance = np.arctan2(u, -v), np.hypot(u, v)
    wedge = np.pi / 5
    folded = abs((angle + wedge) % (2 * wedge) - wedge)
    notch_x, notch_y = 0.5 * np.cos(wedge), 0.5 * np.sin(wedge)
    return distance * (notch_y * np.cos(folded) + (1 - notch_x) * np.sin(folded)) <= notch_y


# ---- scenes ----------------------------------------------------------------------------------------------------


def _draw_scene(rng: np.random.Generator, max_objects: int, held_out: bool) -> Scene:
    count = int(rng.integers(1, max_objects + 1))
    alike = count > 1 and rng.random() < 0.4
    kinds = 1 if alike else count
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:kinds]]
    colors = [str(rng.choice(_colors_of(shape, held_out))) for shape in shapes]
    sizes = [tuple(RADII)[i] for i in rng.integers(len(RADII), size=kinds)]
    if alike:
        shapes, colors, sizes = shapes * count, colors * count, sizes * count
    centres = _place(rng, np.array([RADII[size] for size in sizes]))
    things = tuple(SceneObject(*kind, *centre) for *kind, centre in zip(shapes, colors, sizes, centres.tolist()))
    return Scene(things, float(rng.uniform(0.05, 0.25)), _caption(rng, things, alike))


@lru_cache
def _colors_of(shape: str, held_out: bool) -> list[str]:
    return [color for color in COLORS if held_out or (shape, color) not in HELD_OUT]


def _place(rng: np.random.Generator, radii: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Centres of discs that lie inside the image and apart from one another."""
    low = (radii + _GAP / 2)[:, None]
    first, second = np.triu_indices(len(radii), 1)
    while True:
        tries = rng.uniform(low, 1 - low, size=(16, len(radii), 2))
        distances = np.hypot(*np.moveaxis(tries[:, first] - tries[:, second], -1, 0))
        apart = (distances >= radii[first] + radii[second] + _GAP).all(axis=1)
        if apart.any():
            return tries[apart.argmax()]


def _caption(rng: np.random.Generator, things: tuple[SceneObject, ...], alike: bool) -> str:
    """A true sentence about the scene; it may leave out sizes, colours or the relation."""
    with_size, with_color, with_relation = rng.random(3) < (0.4, 0.6, 0.5)

    def describe(thing: SceneObject) -> str:
        words = [thing.size] * bool(with_size) + [thing.color] * bool(with_color) + [thing.shape]
        return " ".join(words)

    if alike:
        return f"{_NUMBERS[len(things)]} {_plural(describe(things[0]))}"
    names = [f"{_article(describe(thing))}" for thing in things]
    if len(things) == 2 and with_relation:
        relation = str(rng.choice(relations(things[0].box, things[1].box)))
        return f"{names[0]} {relation} {names[1]}"
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


# ---- reading an image back -------------------------------------------------------------------------------------


AGREEMENT = {
    "main_color": "images whose heaviest patch has the colour of a largest object; patch: connected pixels of one "
    f"colour at over {_MIN_SHARE:g} of its strength, together at least half the smallest object",
    "colors": "objects with a patch of their colour centred in their bounding circle, mean over images",
    "positions": f"objects with a patch centred within {_NEAR:g} of the image side of theirs, mean over images",
    "shapes": "objects with a detected object of their shape centred in their bounding circle, mean over images; "
    f"detected: a patch with a soft IoU of at least {_MIN_OVERLAP:g} with a picture of some shape and size",
    "sizes": "as shapes, for their size",
    "count": "images with as many detected objects as there are",
}
"""What each figure of :func:`agreement` is the share of."""


@dataclass(frozen=True)
class _Patch:
    """Connected pixels of one colour: the share of each that it covers, their sum, and its centroid."""

    color: str
    cover: Float[np.ndarray, "H W"]
    mass: float
    x: float
    y: float


def detect(image: Float[Tensor, "3 H W"], min_overlap: float = _MIN_OVERLAP) -> list[SceneObject]:
    """The objects of an image, largest first, then from left to right.

    Each pixel is taken as a mixture of the background and one of the eight colours. Connected pixels of one colour
    make an object, which is compared with pictures of the twelve kinds (shape x size) drawn at its centroid.

    Args:
        image: values in [-1, 1].
        min_overlap: objects whose best picture has a lower soft intersection over union are dropped.
    """
    return _objects(_patches(image), min_overlap)


def detections(image: Float[Tensor, "3 H W"]) -> list[Detection]:
    """What every patch of colour in an image in [-1, 1] resembles most; the score is the overlap of :func:`detect`."""
    side_px = image.shape[-1]
    matches = map(_best_match, _patches(image))
    return [
        Detection(thing.shape, overlap, tuple(side_px * edge for edge in thing.box), thing.color)  # type: ignore[arg-type]
        for overlap, thing in matches
    ]


def agreement(scene: Scene, image: Float[Tensor, "3 H W"]) -> dict[str, float]:
    """How much of ``scene`` an image in [-1, 1] shows, each figure in [0, 1].

    ``main_color``, ``colors`` and ``positions`` look at patches of colour, so that a blurred object counts; ``shapes``,
    ``sizes`` and ``count`` at what :func:`detect` takes for an object. Bounding circles are disjoint: what lies in
    one belongs to its object. :data:`AGREEMENT` says what each figure is.
    """
    patches = _patches(image)
    found = _objects(patches, _MIN_OVERLAP)
    largest = max(thing.radius for thing in scene.objects)
    main_colors = {thing.color for thing in scene.objects if thing.radius == largest}

    def share(right: Callable[[SceneObject], bool]) -> float:
        return sum(map(right, scene.objects)) / len(scene.objects)

    return {
        "main_color": float(bool(patches) and patches[0].color in main_colors),
        "colors": share(lambda a: any(b.color == a.color and _distance(a, b) <= a.radius for b in patches)),
        "positions": share(lambda a: any(_distance(a, b) <= _NEAR for b in patches)),
        "shapes": share(lambda a: any(b.shape == a.shape and _distance(a, b) <= a.radius for b in found)),
        "sizes": share(lambda a: any(b.size == a.size and _distance(a, b) <= a.radius for b in found)),
        "count": float(len(found) == len(scene.objects)),
    }


def _distance(a: SceneObject, b: SceneObject | _Patch) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


def _patches(image: Float[Tensor, "3 H W"]) -> list[_Patch]:
    """The patches of an image with at least half the mass of the smallest object, heaviest first."""
    pixels = (image.detach().float().cpu().permute(1, 2, 0).numpy() + 1) / 2
    side_px = pixels.shape[0]
    background = np.median(pixels, axis=(0, 1))
    # Mixture share of each colour, and how far the pixel is from the best mixture.
    ray = _RGB - background
    length = np.maximum((ray**2).sum(axis=1), 1e-6)  # 0 for a background of exactly that colour
    share = ((pixels - background) @ ray.T / length).clip(0, 1)
    misfit = np.linalg.norm((pixels - background)[:, :, None] - share[..., None] * ray, axis=-1)
    color = misfit.argmin(axis=-1)
    core = np.take_along_axis(share, color[..., None], axis=-1)[..., 0] > _MIN_SHARE
    parts, colors = _components(color, core)
    if not colors:
        return []
    distance, nearest = ndimage.distance_transform_edt(parts == 0, return_indices=True)
    owner = np.where(distance <= 2 * side_px / 32, parts[tuple(nearest)], 0)
    smallest = _templates(side_px, 0, 0).sum(axis=(1, 2)).min()
    centre = (np.arange(side_px) + 0.5) / side_px
    found = []
    for part, color_index in enumerate(colors, start=1):
        cover = share[..., color_index] * (owner == part)
        mass = float(cover.sum())
        if mass >= 0.5 * smallest:
            x, y = (float((cover.sum(axis=axis) * centre).sum() / mass) for axis in (0, 1))
            found.append(_Patch(_COLOR_NAMES[color_index], cover, mass, x, y))
    return sorted(found, key=lambda patch: -patch.mass)


def _objects(patches: list[_Patch], min_overlap: float) -> list[SceneObject]:
    found = [thing for overlap, thing in map(_best_match, patches) if overlap >= min_overlap]
    return sorted(found, key=lambda thing: (-thing.radius, thing.x, thing.y))


def _components(color: np.ndarray, core: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Connected parts of one colour, numbered from 1, and the colour of each."""
    parts = np.zeros(color.shape, dtype=np.int64)
    colors: list[int] = []
    for index in np.unique(color[core]).tolist():
        labelled, count = ndimage.label(core & (color == index), structure=np.ones((3, 3)))
        parts = np.where(labelled > 0, labelled + len(colors), parts)
        colors += [index] * count
    return parts, colors


def _best_match(patch: _Patch) -> tuple[float, SceneObject]:
    """The object that a patch resembles most, and their soft intersection over union."""
    side_px = len(patch.cover)
    # Pictures are kept for centres at eighths of a pixel.
    eighth_x, eighth_y = round(8 * patch.x * side_px), round(8 * patch.y * side_px)
    templates = _templates(side_px, eighth_x % 8, eighth_y % 8)
    half = templates.shape[-1] // 2
    top, left = eighth_y // 8, eighth_x // 8
    window = np.pad(patch.cover, half)[top : top + 2 * half, left : left + 2 * half]
    outside = patch.mass - window.sum()
    overlap = np.minimum(templates, window).sum(axis=(1, 2)) / (
        np.maximum(templates, window).sum(axis=(1, 2)) + outside
    )
    best = int(overlap.argmax())
    shape, size = _KINDS[best % len(_KINDS)]
    return float(overlap[best]), SceneObject(shape, patch.color, size, patch.x, patch.y)


@lru_cache(maxsize=256)
def _templates(side_px: int, eighth_x: int, eighth_y: int) -> Float[np.ndarray, "2K W W"]:
    """The pictures of all kinds, sharp and then blurred, centred that many eighths of a pixel after the middle."""
    half = int(max(RADII.values()) * side_px) + 2
    x, y = half + eighth_x / 8, half + eighth_y / 8
    sharp = np.stack([_coverage(shape, x, y, RADII[size] * side_px, 2 * half) for shape, size in _KINDS])
    return np.concatenate([sharp, ndimage.gaussian_filter(sharp, (0, 0.8, 0.8))])


# ---- GenEval ---------------------------------------------------------------------------------------------------


def geneval_prompts(split: str) -> dict[str, list[Entry]]:
    """The different prompts of each of GenEval's six tasks, as entries of its metadata.

    The two tasks about colours ask for pairs of shape and colour of the training split, or (``val``) for the
    held-out ones; the other tasks name no colour and are the same for both splits.
    """
    pairs = [pair for pair in itertools.product(SHAPES, COLORS) if (pair in HELD_OUT) == (split == "val")]
    two_shapes = list(itertools.permutations(SHAPES, 2))
    two_pairs = [(a, b) for a, b in itertools.permutations(pairs, 2) if a[0] != b[0] and a[1] != b[1]]
    return {
        "single_object": [_entry("single_object", _name(a), _clause(a)) for a in SHAPES],
        "two_object": [
            _entry("two_object", f"{_name(a)} and {_name(b)}", _clause(a), _clause(b)) for a, b in two_shapes
        ],
        "counting": [
            _entry("counting", f"{word} {_plural(a)}", _clause(a, count)) | {"exclude": [_clause(a, count + 1)]}
            for a, (count, word) in itertools.product(SHAPES, _NUMBERS.items())
        ],
        "colors": [_entry("colors", _name(*a), _clause(a[0], color=a[1])) for a in pairs],
        "position": [
            _entry("position", f"{_name(a)} {relation} {_name(b)}", _clause(b), _clause(a, position=[relation, 0]))
            for relation, (a, b) in itertools.product(RELATIONS, two_shapes)
        ],
        "color_attr": [
            _entry(
                "color_attr", f"{_name(*a)} and {_name(*b)}", *(_clause(shape, color=color) for shape, color in (a, b))
            )
            for a, b in two_pairs
        ],
    }


def _entry(tag: str, prompt: str, *include: Entry) -> Entry:
    return {"tag": tag, "include": list(include), "prompt": prompt}


def _name(shape: str, color: str = "") -> str:
    return _article(f"{color} {shape}".strip())


def _clause(shape: str, count: int = 1, **more: object) -> Entry:
    return {"class": shape, "count": count, **more}
