"""What samples are compared with: Gaussians of real images, and features of some of them, measured or from a file.

Files have the keys of ADM's reference files, so that ADM's own evaluator reads them too: ``mu``, ``sigma`` (pool),
``mu_s``, ``sigma_s`` (spatial) and ``arr_0``, the images behind precision and recall. Ours also hold the features of
these images and, as JSON, what they were made of.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vistok.data.datamodule import Dataset
from vistok.errors import UserError
from vistok.eval.features import FeatureNetwork, sha256_of
from vistok.eval.fid import Gaussian, check_finite
from vistok.eval.image_statistics import ImageStatistics
from vistok.eval.images import NPZ_IMAGES, NpzImages, PixelHash, uint8_batches, unaugmented
from vistok.eval.processes import gather_file, of_all, rows_of_all
from vistok.files import write_atomically

MOST_IMAGES = 10_000
"""Real images behind precision, recall and the kernel distance, as in ADM's files."""

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
FEATURES, MADE_OF = "features", "vistok_reference"


@dataclass(frozen=True)
class Reference:
    """Real images as metrics see them.

    Args:
        gaussians: of the layers ``pool`` and, where network and file have it, ``spatial``.
        features: pool features of at most 10,000 of the images, on the CPU; None without any.
        count: images behind the Gaussians; None where the file does not say.
        image_size_px: their side; None where the file does not say.
        description: what a protocol says about them, plain JSON values.
    """

    gaussians: dict[str, Gaussian]
    features: Float[Tensor, "M F"] | None
    count: int | None
    image_size_px: int | None
    description: dict[str, Any]

    def notes(self) -> list[str]:
        """What it lacks."""
        notes = []
        if self.features is None:
            notes.append("The reference holds statistics alone, no images: no precision, recall and KID.")
        if self.image_size_px is None:
            notes.append("The reference does not say how large its images were: make sure that they were as these.")
        return notes


def check_size(samples_px: int, reference_px: int | None) -> None:
    """Raise UserError if samples have another side than the images of a reference; None is not known."""
    if reference_px not in (None, samples_px):
        raise UserError(
            f"samples have {samples_px} px, the reference {reference_px} px: they do not compare "
            f"(--protocol adm{reference_px} resizes samples)"
        )


def measure_reference(
    dataset: Dataset,
    network: FeatureNetwork,
    seed: int = 0,
    batch_size: int = 100,
    workers: int = 0,
    device: torch.device | str = "cpu",
    keep: Callable[[UInt8[Tensor, "B 3 H W"]], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """All images of a data set as a reference; memory does not grow with their number.

    Of several processes each reads its share and gets the reference of all of them.

    Args:
        dataset: of real images.
        network: the feature network.
        seed: names the images drawn for precision, recall and the kernel distance, where there are more than 10,000.
        batch_size: images at a time.
        workers: loader processes.
        device: where metrics are computed.
        keep: called with those images of the share, batch after batch.
        progress: called with the number of images read since the last call.
    """
    statistics = ImageStatistics(network, len(dataset), MOST_IMAGES, seed, device)
    pixels = PixelHash()
    for images, labels, rows in uint8_batches(dataset, batch_size, workers, pixels=pixels):
        if keep:
            keep(images[torch.isin(rows, statistics.kept_rows)])
        statistics.update(images, labels, rows)
        if progress:
            progress(len(images))
    description = pixels.reference(dataset.description["split"]) | {"data": unaugmented(dataset)}
    size = images.shape[-1]
    return Reference(statistics.gaussians(), statistics.kept, statistics.count, size, description)


def save_reference(path: Path, reference: Reference, network: FeatureNetwork, images: ImageFile) -> None:
    """Write a reference of :func:`measure_reference`; ``path`` is whole or absent.

    Args:
        path: the ``.npz``.
        reference: to write.
        network: the feature network.
        images: the images whose features the reference holds.
    """
    assert reference.features is not None
    arrays = {FEATURES: reference.features.numpy()}
    for layer, gaussian in reference.gaussians.items():
        arrays |= {key: part.cpu().numpy() for key, part in zip(KEYS[layer], (gaussian.mean, gaussian.covariance))}
    made_of = {
        "features": network.identity,
        "image_size_px": reference.image_size_px,
        "reference": reference.description,
    }
    images.save(path, arrays | {MADE_OF: np.array(json.dumps(made_of))})


def holds_statistics(path: Path) -> bool:
    """Whether a file is an ``.npz`` with ``mu`` and ``sigma``."""
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{key}.npy" for key in KEYS["pool"]} <= set(archive.namelist())


def load_reference(
    path: Path,
    network: FeatureNetwork,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """A reference from ADM's files, from plain ``mu`` and ``sigma`` or from :func:`save_reference`.

    Args:
        path: the ``.npz``.
        network: the feature network that the file was made with; nothing else in ADM's files tells which.
        batch_size: images of ``arr_0`` at a time, where the file does not hold their features.
        device: of the network.
        progress: called with the number of images read since the last call.

    Raises:
        UserError: if the file is damaged or was made with another feature network or layer.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            made_of = json.loads(str(file[MADE_OF])) if MADE_OF in file else {}
            wanted = [*(key for keys in KEYS.values() for key in keys), FEATURES]
            arrays = {key: torch.from_numpy(file[key]) for key in wanted if key in file}
            has_images = NPZ_IMAGES in file
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if made_of and made_of["features"] != network.identity:
        theirs, ours = (f"{names['name']} ({names['sha256'][:8]})" for names in (made_of["features"], network.identity))
        raise UserError(f"{path} was made with the feature network {theirs}, --features is {ours}: they do not compare")
    count = made_of["reference"]["count"] if made_of else None
    gaussians = {}
    for layer, width in (("pool", network.num_features), ("spatial", network.num_spatial)):
        if width and all(key in arrays for key in KEYS[layer]):
            mean, covariance = (arrays[key].double() for key in KEYS[layer])
            if (mean.shape, covariance.shape) != ((width,), (width, width)):
                raise UserError(
                    f"{path}: {KEYS[layer][0]} has the shape {tuple(mean.shape)}, {network.name} has {width} features: "
                    "it was made with another feature network"
                )
            if layer == "spatial" and bool((mean < 0).any()):
                raise UserError(
                    f"{path}: {KEYS[layer][0]} is negative in places: it was not taken behind the ReLU, as here"
                )
            gaussians[layer] = check_finite(str(path), Gaussian(mean.to(device), covariance.to(device), count))
    if made_of:
        return Reference(gaussians, arrays[FEATURES], count, made_of["image_size_px"], made_of["reference"])
    description = {"images": "of a file", "file_sha256": sha256_of(path)}
    if not has_images:
        return Reference(gaussians, None, None, None, description)
    images = NpzImages(path)
    return Reference(
        gaussians,
        _pool_features(images, network, batch_size, device, progress),
        None,
        images.image_size_px,
        description,
    )


class ImageFile:
    """Images that come in batches and end as ``arr_0``, uint8 ``(N, H, W, 3)``, of an ``.npz``.

    They wait on the disk, so that memory does not grow with their number.

    Args:
        folder: where they wait; made if missing.
        image_size_px: their side.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, image_size_px: int) -> None:
        self.image_size_px, self.count = image_size_px, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as this object
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from None

    def write(self, images: UInt8[Tensor, "B 3 H W"]) -> None:
        """Add images."""
        self._rows.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        self.count += len(images)

    def gather(self) -> None:
        """Bring the images of all processes together in the first one's, in order."""
        self.count = sum(of_all(self.count))
        gather_file(self._rows)

    def save(self, path: Path, arrays: dict[str, np.ndarray] | None = None) -> None:
        """Write the file, with more ``arrays`` if they are given; ``path`` is whole or absent."""
        shape = (self.count, self.image_size_px, self.image_size_px, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}

        def write(partial: Path) -> None:
            with zipfile.ZipFile(partial, "w") as archive:
                with archive.open(f"{NPZ_IMAGES}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    self._rows.seek(0)
                    shutil.copyfileobj(self._rows, member)
                for name, array in (arrays or {}).items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)

        write_atomically(path, write)


@torch.no_grad()
def _pool_features(
    images: NpzImages,
    network: FeatureNetwork,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None,
) -> Float[Tensor, "M F"]:
    parts = []
    for pixels, *_ in uint8_batches(images, batch_size, count=min(MOST_IMAGES, len(images))):
        parts.append(network.features(pixels.to(device)).cpu())
        if progress:
            progress(len(pixels))
    return rows_of_all(torch.cat(parts))
