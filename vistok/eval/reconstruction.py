"""How well a tokenizer gives images back: PSNR, SSIM, rFID, class accuracy and codebook usage.

Measured for each number of tokens, and where the decoder is a flow also for each number of its steps. Comparisons of
:mod:`vistok.eval.similarity` (LPIPS, cosine of pretrained features) and the figures of a data set that can check its
own images (:class:`~vistok.data.datamodule.CheckableDataset`) join in. Everything is added up over processes: each may
take any share of the images, or none.

All image metrics see both sides as rounded uint8. Definitions, because papers differ: PSNR is the mean over images of
each image's own PSNR in dB; SSIM is torchmetrics' (11 x 11 Gaussian of std 1.5, mirrored border, data range 255),
not scikit-image's uniform window; rFID compares reconstructions with the very images they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vistok.data.datamodule import CheckableDataset
from vistok.errors import UserError
from vistok.eval.codebook import CodebookUsage
from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import DEFINITION, FrechetDistance, metric_name
from vistok.eval.protocol import table_by_tokens
from vistok.eval.similarity import Comparison
from vistok.interfaces import Autoencoder, Tokenizer
from vistok.pictures import prefix_grid, save_png, to_pil, to_uint8
from vistok.pipeline import decode_images, encode_images
from vistok.tokens import Tokens

DEFINITIONS = {
    "psnr": "mean over images, data range 255",
    "ssim": "torchmetrics, gaussian 11x11 sigma 1.5, reflected border, data range 255",
    "fid": DEFINITION,
}
STRIP_PX = 1280
"""Widest strip of examples: more of small images than of big ones."""


def psnr(originals: UInt8[Tensor, "B 3 H W"], decoded: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Each image's own peak signal-to-noise ratio, dB."""
    pair = decoded.float(), originals.float()
    return peak_signal_noise_ratio(*pair, data_range=255.0, dim=(1, 2, 3), reduction="none")


def ssim(originals: UInt8[Tensor, "B 3 H W"], decoded: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Each image's structural similarity: Wang et al. 2004, mean over all pixels and the three channels."""
    found = structural_similarity_index_measure(
        decoded.float(), originals.float(), data_range=255.0, sigma=1.5, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found


class Means(Metric):
    """Means over images of several figures, with sums in float64, added up over processes.

    Args:
        names: of the figures, the same on every process.
    """

    full_state_update = False
    sums: Float[Tensor, " F"]
    counts: Float[Tensor, " F"]

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.places = {name: place for place, name in enumerate(names)}
        for state in ("sums", "counts"):
            self.add_state(state, torch.zeros(len(self.places), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, name: str, total: Tensor | float, count: int) -> None:
        """Add ``total``, the sum of a figure over ``count`` images."""
        self.sums[self.places[name]] += total
        self.counts[self.places[name]] += count

    def compute(self) -> dict[str, float]:
        """Means of the figures that any image has."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: sums[place] / counts[place] for name, place in self.places.items() if counts[place]}


class ReconstructionQuality:
    """PSNR, SSIM, and with a network rFID and class accuracy, over batches.

    Args:
        network: for rFID, and for class accuracy if it knows the classes; None for neither.
        device: where the sums live.
        comparisons: more figures of each pair of images.
        figures: names of what :meth:`update` is told of each image.
    """

    def __init__(
        self,
        network: FeatureNetwork | None,
        device: torch.device | str = "cpu",
        comparisons: Sequence[Comparison] = (),
        figures: Iterable[str] = (),
    ) -> None:
        self.network, self.device = network, device
        self.compare = {"psnr_db": psnr, "ssim": ssim} | {one.name: one.function for one in comparisons}
        self.means = Means([*self.compare, "class_accuracy", *figures]).to(device)
        self.frechet = None if network is None else FrechetDistance(network.num_features).to(device)

    def update(
        self,
        originals: UInt8[Tensor, "B 3 H W"],
        decoded: UInt8[Tensor, "B 3 H W"],
        labels: Tensor,
        figures: Iterable[Mapping[str, float]] = (),
    ) -> None:
        """Add a batch; ``labels`` int64 ``(B,)`` are -1 where there is no class, ``figures`` those of each image."""
        originals, decoded = originals.to(self.device), decoded.to(self.device)
        for name, function in self.compare.items():
            self.means.update(name, function(originals, decoded).double().sum(), len(originals))
        if self.network is not None and self.frechet is not None:
            features = self.network.features(decoded)
            self.frechet.update(self.network.features(originals), real=True)
            self.frechet.update(features, real=False)
            if "class" in self.network.heads:
                right = self.network.count_right(features, labels)
                self.means.update("class_accuracy", right, int((labels >= 0).sum()))
        for row in figures:
            for name, value in row.items():
                self.means.update(name, value, 1)

    def compute(self) -> dict[str, float]:
        """The metrics by name, that of rFID with its network."""
        means, images = self.means.compute(), self.images
        metrics = {name: means.pop(name) for name in self.compare}
        if self.network is not None and self.frechet is not None:
            metrics[metric_name("rFID", self.network, images)] = float(self.frechet.compute())
        return metrics | means

    @property
    def images(self) -> int:
        """How many images the figures stand for, on all processes."""
        with self.means.sync_context():
            return int(self.means.counts[0])


@dataclass(frozen=True)
class Variant:
    """One way to decode: a row of the result.

    Args:
        series: "tokens" or "steps", what the row is about.
        value: how many of them.
        length: tokens that are decoded.
        options: of the tokenizer's ``decode``.
    """

    series: str
    value: int
    length: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as ``tokens_16``."""
        return f"{self.series}_{self.value}"


def variants(lengths: Sequence[int], decode_options: dict[str, Any], steps: Sequence[int] = ()) -> list[Variant]:
    """A variant for each number of tokens, then one for each number of ``steps`` with all of ``lengths``' tokens."""
    by_tokens = [Variant("tokens", length, length, decode_options) for length in lengths]
    return by_tokens + [Variant("steps", count, lengths[-1], decode_options | {"steps": count}) for count in steps]


def check_steps(tokenizer: Autoencoder, steps: list[int] | None) -> list[int]:
    """Numbers of steps of a decoder that takes them, in order and each once.

    Raises:
        UserError: if the decoder has no steps, or a number is not positive.
    """
    if steps and not isinstance(tokenizer.decode_defaults.get("steps"), int):
        raise UserError(f"--steps: {type(tokenizer).__name__} decodes without steps, it is no flow")
    if steps and min(steps) < 1:
        raise UserError(f"--steps: at least 1, got {min(steps)}")
    return sorted(set(steps or ()))


def measure_reconstruction(
    tokenizer: Autoencoder,
    batches: Iterable[dict[str, Any]],
    network: FeatureNetwork | None,
    lengths: list[int],
    seed: int = 0,
    decode_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    checked: CheckableDataset | None = None,
    progress: Callable[[int], None] | None = None,
    steps: Sequence[int] = (),
    comparisons: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """Reconstruct every image from each number of tokens.

    Args:
        tokenizer: in evaluation mode.
        batches: of :func:`vistok.eval.images.image_batches`; of several processes, each one's share.
        network: for rFID and class accuracy; None for neither.
        lengths: see :func:`vistok.pipeline.prefix_lengths`.
        seed: names the decoder's noise.
        decode_options: options of the tokenizer's ``decode``.
        device: where metrics are computed.
        checked: the data set, for its own figures; None for none.
        progress: called with the number of images decoded since the last call.
        steps: see :func:`check_steps`; each with all tokens.
        comparisons: see :mod:`vistok.eval.similarity`.

    Returns:
        ``{"tokens": {"1": {"psnr_db": ..., ...}, ...}, "codebook": {"usage": ..., ...}, "counts": {"images": N}}``, of
        all processes, and ``"steps"`` like ``"tokens"`` where they were asked for; a continuous tokenizer has no
        codebook, and its ``"codebook"`` is empty.
    """
    rows = variants(lengths, decode_options or {}, steps)
    figures = checked.agreement_definitions if checked else ()
    quality = [ReconstructionQuality(network, device, comparisons, figures) for _ in rows]
    usage = CodebookUsage(tokenizer.spec.vocab_sizes, tokenizer.spec.layout)
    for batch in batches:
        images, positions = batch["image"], batch["position"].tolist()
        code = encode_images(tokenizer, images, len(images))
        if isinstance(code, Tokens):
            usage.update(code.ids)
        for row, measured in zip(rows, quality):
            part = code.prefix(row.length) if isinstance(code, Tokens) else code
            decoded = decode_images(tokenizer, part, seed, len(images), row.options, progress, first=positions[0])
            agreed = map(checked.agreement, positions, decoded / 127.5 - 1) if checked else ()
            measured.update(to_uint8(images), decoded, batch["label"], agreed)
    metrics: dict[str, Any] = {}
    for row, measured in zip(rows, quality):
        metrics.setdefault(row.series, {})[str(row.value)] = measured.compute()
    metrics["codebook"] = usage.compute() if isinstance(tokenizer, Tokenizer) else {}
    return metrics | {"counts": {"images": quality[0].images}}


def decode_examples(
    tokenizer: Autoencoder, samples: list[dict[str, Any]], rows: list[Variant], seed: int = 0
) -> tuple[UInt8[Tensor, "N 3 H W"], list[UInt8[Tensor, "N 3 H W"]]]:
    """The images of ``samples``, and what they are decoded to in each of ``rows``, as :func:`measure_reconstruction`.

    Args:
        tokenizer: in evaluation mode.
        samples: of a data set, its first.
        rows: of :func:`variants`.
        seed: names the decoder's noise.
    """
    images = torch.stack([sample["image"] for sample in samples])
    code = encode_images(tokenizer, images, len(images))
    parts = [code.prefix(row.length) if isinstance(code, Tokens) else code for row in rows]
    return to_uint8(images), [
        decode_images(tokenizer, part, seed, len(images), row.options) for part, row in zip(parts, rows)
    ]


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
    rows = variants(lengths, decode_options or {})
    return picture_examples(rows, *decode_examples(tokenizer, samples, rows, seed))


def picture_examples(
    rows: list[Variant], originals: UInt8[Tensor, "N 3 H W"], decoded: list[UInt8[Tensor, "N 3 H W"]]
) -> Image.Image:
    """What :func:`decode_examples` gives by number of tokens, as :func:`picture_reconstruction`."""
    by_tokens = {row.value: images for row, images in zip(rows, decoded) if row.series == "tokens"}
    return prefix_grid(originals, by_tokens, [""] * len(originals))


def table_by_steps(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of ``"steps"`` of :func:`measure_reconstruction`."""
    columns, rows = table_by_tokens({"tokens": metrics["steps"]})
    return ["steps", *columns[1:]], rows


def strips_of(result: Path) -> Path:
    """The folder of the strips of a result file: beside it."""
    return result.with_name(f"{result.stem}_strips")


def save_strips(
    folder: Path, rows: list[Variant], originals: UInt8[Tensor, "N 3 H W"], decoded: list[UInt8[Tensor, "N 3 H W"]]
) -> None:
    """Write what :func:`decode_examples` gives as ``original.png``, ``tokens_16.png``, ``steps_4.png`` ....

    Each file holds the first images side by side, pixel by pixel, at least two and at most as many as
    :data:`STRIP_PX` takes.
    """
    most = max(2, STRIP_PX // originals.shape[-1])
    for name, images in [("original", originals), *zip((row.name for row in rows), decoded)]:
        save_png(to_pil(torch.cat(list(images[:most]), dim=-1)), folder / f"{name}.png")
