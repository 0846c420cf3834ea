"""``latent_cache``: a data set as a frozen VAE sees it, computed once, so that models train without its encoder.

A folder of a table for each split, of which loaders read the rows that they need, and what belongs to it:

    {split}.npy     float16 (P, M, C, h, w): pass, image, latent
    latents.json    hash of the VAE, size of the images, and for each split what the data are, labels, keys, captions

Pass 0 holds the images as they are, each further pass of the training split augments them anew.

With moments, the training split has what MAR and TokenBridge train on (arXiv 2406.11838): mean and standard deviation
of the VAE's posterior, for each image and its mirror image,

    train.npy           float16 (P, M, 2, 2 C, h, w): pass, image, image or mirror image, means before deviations

and every sample is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor

from vistok.data.cache import Cache, Table, go_through, passes_of, read_header, write_header
from vistok.data.datamodule import Dataset
from vistok.errors import UserError
from vistok.files import new_folder
from vistok.interfaces import Autoencoder

HEADER = "latents.json"


@dataclass
class Config:
    """``path``: the folder of the cache."""

    path: str = MISSING


class LatentCache(Cache):
    """The latents of one split; a sample has ``latent`` float32 ``(C, h, w)`` instead of an image.

    Attributes:
        latent_hash: of the VAE that made them; compare with :func:`check_vae`.
        has_moments: a latent is drawn from the posterior of image or mirror image; it is the image's mean without rng.

    Raises:
        UserError: if the folder is no whole cache, or lacks the split, or is for another image size.
    """

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        folder = Path(config.path)
        header = read_header(folder / HEADER, ("image_size_px", "latent_hash"), "latent cache", "latents")
        super().__init__(header, split, folder)
        if header["image_size_px"] != image_size_px:
            raise UserError(f"{folder} holds latents of {header['image_size_px']} px images, not of {image_size_px} px")
        self.table = Table(folder / f"{split}.npy", "latents")
        self.labels = torch.tensor(self.part["labels"])
        self.passes, self.has_moments = len(self.latents), self.latents.ndim == 6
        self.latent_hash: str = header["latent_hash"]
        self.description = {
            "name": "latent_cache",
            "split": split,
            "latent_hash": self.latent_hash,
            "passes": self.passes,
            "moments": self.has_moments,
            "data": self.part["data"],
        }

    @property
    def latents(self) -> np.ndarray:
        """The table, on the disk."""
        return self.table.array

    def stored(self, number: int, index: int) -> dict[str, Tensor]:
        return {"latent": torch.from_numpy(self.latents[number, index].astype(np.float32))}

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        sample = super().get(index, rng)
        return {**sample, "latent": draw(sample["latent"], rng)} if self.has_moments else sample


def draw(moments: Float[Tensor, "2 2*C h w"], rng: torch.Generator | None) -> Float[Tensor, "C h w"]:
    """A latent of image or mirror image, drawn from ``rng``; the mean of the image if that is None."""
    if rng is None:
        return moments[0].chunk(2)[0]
    mean, std = moments[int(torch.randint(2, (), generator=rng))].chunk(2)
    return mean + std * torch.randn(mean.shape, generator=rng)


def build(config: Config, split: str, image_size_px: int) -> LatentCache:
    """The latents of ``split``."""
    return LatentCache(config, split, image_size_px)


def check_vae(dataset: LatentCache, tokenizer: Autoencoder) -> None:
    """Refuse latents that are not those of the tokenizer's VAE.

    Raises:
        UserError: if it has none, or another one; naming both hashes.
    """
    if tokenizer.latent_shape is None:
        raise UserError("data: these are latents of a VAE, and this tokenizer has none: train it on images")
    if dataset.latent_hash != tokenizer.latent_hash:
        raise UserError(
            f"these latents were made by VAE {dataset.latent_hash[:12]}, the tokenizer's is "
            f"{tokenizer.latent_hash[:12]}: make them again (python -m vistok.data latents)"
        )


def extract(
    tokenizer: Autoencoder,
    datasets: dict[str, Dataset],
    out: str | Path,
    batch_size: int = 32,
    passes: int = 1,
    moments: bool = False,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the latent cache of a data set.

    Args:
        tokenizer: whose VAE it is; its other weights play no part.
        datasets: the splits, by name.
        out: the folder to make.
        batch_size: images encoded at once.
        passes: of the training split; the others get one.
        moments: keep the moments of the training split, of images and mirror images; the others get latents.
        seed: pass p > 0 augments image i by a stream that (seed, p, i) names.
        workers: loader processes.
        device: where to encode.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: if ``out`` exists, a number is out of range, the tokenizer has no VAE or moments, or the disk is
            full.
    """
    shape = tokenizer.latent_shape
    if shape is None:
        raise UserError("this tokenizer has no VAE (its argument vae): there are no latents to cache")

    splits: dict[str, dict[str, Any]] = {}
    with new_folder(out) as folder:
        for split, dataset in datasets.items():
            count, both = passes_of(split, passes), moments and split == "train"
            row = (2, 2 * shape[0], *shape[1:]) if both else shape
            encode = partial(_encode, tokenizer, both, device)
            # Written as it comes, not through a mapped file: that would end the process where the disk is full.
            with open(folder / f"{split}.npy", "wb") as file:
                table = {"descr": "<f2", "fortran_order": False, "shape": (count, len(dataset), *row)}
                np.lib.format.write_array_header_1_0(file, table)
                part, labels = go_through(dataset, count, encode, file.write, batch_size, seed, workers, progress)
            splits[split] = {**part, "labels": labels.tolist()}
        values = {"image_size_px": tokenizer.spec.image_size_px, "latent_hash": tokenizer.latent_hash}
        write_header(folder / HEADER, datasets, splits, **values)


def _encode(
    tokenizer: Autoencoder, moments: bool, device: torch.device | str, images: Float[Tensor, "B 3 H W"]
) -> bytes:
    """Rows of the table."""
    images = images.to(device)
    if moments:
        rows = torch.stack([tokenizer.encode_moments(each) for each in (images, images.flip(-1))], dim=1)
    else:
        rows = tokenizer.encode_latent(images)
    return rows.to("cpu", torch.float16).numpy().tobytes()
