"""Train the small feature networks that ship with the package, on training splits only.

    python -m vistok.eval train-features digits

takes about a minute on one core and always makes the same network (on one machine; another BLAS may round
differently). What is shipped is what is measured: the accuracy is that of the float16 weights in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from vistok.data.datamodule import Dataset, load_data
from vistok.data.shapes import COLORS, RADII, SHAPES, Shapes
from vistok.errors import UserError
from vistok.eval.features import SMALL_NETWORKS, SmallCNN, load_small
from vistok.files import save_tensors, write_atomically
from vistok.pictures import to_uint8
from vistok.rng import derive_seed, seeded_generator


@dataclass
class Recipe:
    """How one network is trained.

    Args:
        images: how many training images to use (the data set may be endless), at most.
        epochs: passes over them.
        batch_size: images in one update.
        rotation_rad: largest rotation of the augmentation.
        shift: largest shift, as a share of half the image.
        scale: largest relative change of each side.
        shear: largest shear.
        blur: largest share of a 3 x 3 mean mixed in, for half of the images.
    """

    images: int
    epochs: int
    batch_size: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    rotation_rad: float = 0.2
    shift: float = 0.15
    scale: float = 0.12
    shear: float = 0.15
    blur: float = 1.0


HELD_OUT_MOST = 2000

RECIPES = {
    "digits": Recipe(images=1500, epochs=40),
    # A square that turns becomes a diamond.
    "shapes": Recipe(images=8000, epochs=10, rotation_rad=0.05, shift=0.1, scale=0.05, shear=0.05, blur=0.5),
}


def train_features(data: str, path: Path, seed: int = 0) -> dict[str, float]:
    """Train the network of ``data`` and write it to ``path``.

    Args:
        data: a key of :data:`vistok.eval.features.SMALL_NETWORKS`.
        path: the safetensors file.
        seed: names the initialisation, the order and the augmentation.

    Returns:
        The share of right answers of each head on the held-out split, measured on the written file.

    Raises:
        UserError: if there is no such network.
    """
    if data not in RECIPES:
        raise UserError(f"no feature network to train for {data!r} (valid: {', '.join(RECIPES)})")
    recipe = RECIPES[data]
    # Initialisation is the one draw that torch makes from its global state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("features", data, seed))
        network = SmallCNN(**SMALL_NETWORKS[data])
    images, targets = _examples(load_data(data, "train", network.size_px), data, recipe.images)
    _fit(network, images, targets, recipe, seeded_generator("features", data, seed))

    weights = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    write_atomically(path, lambda partial: save_tensors(partial, weights))
    return held_out_accuracy(load_small(data, path), data)


@torch.no_grad()
def held_out_accuracy(network: SmallCNN, data: str, image_size_px: int | None = None) -> dict[str, float]:
    """Share of right answers of each head on the held-out split; a many-answer head counts every answer.

    Args:
        network: a network for ``data``.
        data: name of the data set.
        image_size_px: side of the images given to the network; by default its own.
    """
    dataset = load_data(data, "val", image_size_px or network.size_px)
    images, targets = _examples(dataset, data, HELD_OUT_MOST)
    logits: dict[str, list[Tensor]] = {head: [] for head in targets}
    for batch in to_uint8(images).split(256):
        for head, value in network.logits(network.features(batch)).items():
            logits[head].append(value)
    return {head: _accuracy(torch.cat(logits[head]), targets[head]) for head in targets}


def _examples(dataset: Dataset, data: str, most: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images ``(N, 3, H, W)`` and, for each head, int64 ``(N,)`` classes or float ``(N, K)`` yes/no answers."""
    indices = range(min(most, len(dataset)))
    images = torch.stack([dataset.get(index)["image"] for index in indices])
    answers = [ANSWERS[data](dataset, index) for index in indices]
    return images, {head: torch.tensor([answer[head] for answer in answers]) for head in answers[0]}


def _digit(dataset: Dataset, index: int) -> dict[str, Any]:
    return {"class": dataset.get(index)["label"]}


def _what_is_shown(dataset: Shapes, index: int) -> dict[str, Any]:
    """How many objects there are, and which shapes, colours and sizes occur."""
    things = dataset.scene(index).objects
    return {
        "count": len(things) - 1,
        "shape": [float(any(thing.shape == shape for thing in things)) for shape in SHAPES],
        "color": [float(any(thing.color == color for thing in things)) for color in COLORS],
        "size": [float(any(thing.size == size for thing in things)) for size in RADII],
    }


ANSWERS: dict[str, Any] = {"digits": _digit, "shapes": _what_is_shown}


def _fit(network: SmallCNN, images: Tensor, targets: dict[str, Tensor], recipe: Recipe, rng: torch.Generator) -> None:
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps)
    network.train()
    with tqdm(total=steps, desc="features", unit="step", leave=False) as bar:
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(images), generator=rng).split(recipe.batch_size):
                logits = network.logits(network.from_pixels(augment(images[rows], recipe, rng)))
                loss = torch.stack([_loss(logits[head], target[rows]) for head, target in targets.items()]).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def augment(images: Float[Tensor, "B 3 H W"], recipe: Recipe, rng: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """A random affine motion, a mild blur for half of the images, and a little noise.

    Decoders blur and leave noise: a network that only knows clean images would take either for another class.
    """
    count = len(images)
    angle, scale_x, scale_y, shear, shift_x, shift_y = (
        (torch.rand(6, count, generator=rng) * 2 - 1)
        * torch.tensor([recipe.rotation_rad, recipe.scale, recipe.scale, recipe.shear, recipe.shift, recipe.shift])[
            :, None
        ]
    ).unbind()
    cos, sin = angle.cos(), angle.sin()
    motion = torch.stack([cos * (1 + scale_x), shear - sin, shift_x, sin, cos * (1 + scale_y), shift_y], 1)
    grid = F.affine_grid(motion.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur = recipe.blur * torch.rand(count, 1, 1, 1, generator=rng) * (torch.rand(count, 1, 1, 1, generator=rng) < 0.5)
    noise = 0.1 * torch.rand(count, 1, 1, 1, generator=rng) * torch.randn(moved.shape, generator=rng)
    return moved.lerp(blurred, blur) + noise


def _loss(logits: Float[Tensor, "B K"], target: Tensor) -> Float[Tensor, ""]:
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits, target)


def _accuracy(logits: Float[Tensor, "B K"], target: Tensor) -> float:
    right = (logits > 0) == (target > 0.5) if target.is_floating_point() else logits.argmax(1) == target
    return right.double().mean().item()
