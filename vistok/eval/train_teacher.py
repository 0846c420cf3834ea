"""Train a small vision transformer of timm to tell toy images apart: a teacher for those who have no pretrained one.

    python -m vistok.eval train-teacher digits --out runs/digits/teacher.safetensors

takes about a minute on one core. Its patches are what the classifier pools, so that they are what it learns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from vistok.data.datamodule import load_data
from vistok.eval.train_features import RECIPES, augment
from vistok.files import save_tensors, write_atomically
from vistok.rng import derive_seed, seeded_generator

NAME = "vit_tiny_patch16_224"
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 0.05

_POOLED = {"global_pool": "avg", "fc_norm": False, "class_token": False}

TEACHERS: dict[str, dict[str, Any]] = {
    "digits": {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, **_POOLED},
}
"""Arguments of ``timm.create_model`` for each data set, beside :data:`NAME`."""


def train_teacher(data: str, path: Path, args: dict[str, Any], epochs: int = 80, seed: int = 0) -> float:
    """Train a classifier on the training split of ``data`` and write its weights to ``path``.

    Args:
        data: a key of :data:`~vistok.eval.train_features.RECIPES`, whose images have classes.
        path: the safetensors file.
        args: of ``timm.create_model``, with ``img_size``.
        epochs: passes over the training split.
        seed: names the initialisation, the order and the augmentation.

    Returns:
        The share of right answers on the held-out split.
    """
    import timm  # slow to import

    images, labels = _examples(data, "train", args["img_size"])
    # Initialisation is the one draw that timm makes from torch's global state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("teacher", data, seed))
        model = timm.create_model(NAME, num_classes=int(labels.max()) + 1, **args)
    rng = seeded_generator("teacher", data, seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    with tqdm(total=steps, desc="teacher", unit="step", leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=rng).split(BATCH_SIZE):
                loss = F.cross_entropy(model(augment(images[rows], RECIPES[data], rng)), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    write_atomically(path, lambda partial: save_tensors(partial, model.state_dict()))
    images, labels = _examples(data, "val", args["img_size"])
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def _examples(data: str, split: str, size_px: int) -> tuple[Float[Tensor, "N 3 H W"], Int[Tensor, " N"]]:
    dataset = load_data(data, split, size_px)
    samples = [dataset.get(index) for index in range(len(dataset))]
    return torch.stack([sample["image"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])
