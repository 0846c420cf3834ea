"""How well a tokenizer gives images back: PSNR, SSIM, rFID, class accuracy and codebook usage.

A data set that can check its own images (:class:`~vistok.data.datamodule.CheckableDataset`) adds its figures.

All image metrics see both sides as rounded uint8. Definitions, because papers differ: PSNR is the mean over images of
each image's own PSNR in dB; SSIM is torchmetrics' (11 x 11 Gaussian of std 1.5, mirrored border, data range 255),
not scikit-image's uniform window; rFID compares reconstructions with the very images they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from vistok.eval.codebook import CodebookUsage
from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import DEFINITION, FrechetDistance, metric_name
from vistok.interfaces import Autoencoder
from vistok.pictures import prefix_grid, to_uint8
from vistok.pipeline import decode_prefixes, encode_images
from vistok.tokens import Tokens

DEFINITIONS = {
    "psnr": "mean over images, data range 255",
    "ssim": "torchmetrics, gaussian 11x11 sigma 1.5, reflected border, data range 255",
    "fid": DEFINITION,
}


class ReconstructionQuality:
    """PSNR, SSIM, and with a network rFID and class accuracy, over batches.

    Args:
        network: for rFID, and for class accuracy if it knows the classes; None for neither.
        device: where the sums live.
    """

    def __init__(self, network: FeatureNetwork | None, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network, device
        self.psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3)).to(device)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=255.0, kernel_size=11, sigma=1.5).to(device)
        self.frechet = None if network is None else FrechetDistance(network.num_features).to(device)
        self.labelled = self.right = 0

    def update(self, originals: UInt8[Tensor, "B 3 H W"], decoded: UInt8[Tensor, "B 3 H W"], labels: Tensor) -> None:
        """Add a batch; ``labels`` int64 ``(B,)`` are -1 where there is no class."""
        originals, decoded = originals.to(self.device), decoded.to(self.device)
        self.psnr.update(decoded.float(), originals.float())
        self.ssim.update(decoded.float(), originals.float())
        if self.network is not None and self.frechet is not None:
            features = self.network.features(decoded)
            self.frechet.update(self.network.features(originals), real=True)
            self.frechet.update(features, real=False)
            self.right += self.network.count_right(features, labels)
        self.labelled += int((labels >= 0).sum())

    def compute(self) -> dict[str, float]:
        """The metrics by name, that of rFID with its network."""
        metrics = {"psnr_db": float(self.psnr.compute()), "ssim": float(self.ssim.compute())}  # type: ignore[arg-type]
        if self.network is not None and self.frechet is not None:
            metrics[metric_name("rFID", self.network)] = float(self.frechet.compute())
            if "class" in self.network.heads and self.labelled:
                metrics["class_accuracy"] = self.right / self.labelled
        return metrics


def measure_reconstruction(
    tokenizer: Autoencoder,
    batches: Iterable[dict[str, Any]],
    network: FeatureNetwork | None,
    lengths: list[int],
    seed: int = 0,
    decode_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    agreement: Callable[[int, Tensor], dict[str, float]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Reconstruct every image from each number of tokens.

    Args:
        tokenizer: in evaluation mode.
        batches: of :func:`vistok.eval.images.image_batches`.
        network: for rFID and class accuracy; None for neither.
        lengths: see :func:`vistok.pipeline.prefix_lengths`.
        seed: names the decoder's noise.
        decode_options: options of the tokenizer's ``decode``.
        device: where metrics are computed.
        agreement: of a :class:`~vistok.data.datamodule.CheckableDataset`, for its figures; None for none.
        progress: called with the number of images decoded since the last call.

    Returns:
        ``{"tokens": {"1": {"psnr_db": ..., ...}, ...}, "codebook": {"usage": ..., ...}, "counts": {"images": N}}``;
        a continuous tokenizer has no codebook, and its ``"codebook"`` is empty.
    """
    quality = {length: ReconstructionQuality(network, device) for length in lengths}
    figures: dict[int, list[dict[str, float]]] = {length: [] for length in lengths}
    usage = CodebookUsage(tokenizer.spec.vocab_sizes, tokenizer.spec.layout)
    seen = 0
    for batch in batches:
        images, size = batch["image"], len(batch["image"])
        code = encode_images(tokenizer, images, size)
        if isinstance(code, Tokens):
            usage.update(code.ids)
        decoded = decode_prefixes(tokenizer, code, lengths, seed, size, decode_options, progress, first=seen)
        for length, columns in decoded.items():
            quality[length].update(to_uint8(images), columns, batch["label"])
            if agreement is not None:
                figures[length] += map(agreement, batch["position"].tolist(), columns / 127.5 - 1)
        seen += size
    return {
        "tokens": {str(length): quality[length].compute() | _means(figures[length]) for length in lengths},
        "codebook": usage.compute() if usage.update_called else {},
        "counts": {"images": seen},
    }


def picture_reconstruction(
    tokenizer: Autoencoder,
    samples: list[dict[str, Any]],
    lengths: list[int],
    seed: int = 0,
    decode_options: dict[str, Any] | None = None,
) -> Image.Image:
    """Rows are images, columns the original and its reconstructions from each number of tokens.

    Args:
        tokenizer: in evaluation mode.
        samples: of a data set.
        lengths: as in :func:`measure_reconstruction`, like everything else.
        seed: names the decoder's noise.
        decode_options: options of the tokenizer's ``decode``.
    """
    images = torch.stack([sample["image"] for sample in samples])
    code = encode_images(tokenizer, images, len(images))
    decoded = decode_prefixes(tokenizer, code, lengths, seed, len(images), decode_options)
    return prefix_grid(to_uint8(images), decoded, [""] * len(samples))


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in rows[0]} if rows else {}
