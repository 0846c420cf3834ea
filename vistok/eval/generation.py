"""How good and how varied samples are: gFID, precision, recall, class accuracy and the share of copies.

gFID, precision and recall compare with real images of the reference split (the field's convention is the training
set). The same numbers for real held-out images stand below them: what a perfect generator could reach here. An ordered
code gives one row for each number of tokens that samples are decoded from. Samples are of all classes in turn, or of
the captions of held-out images; whether they show what a text asks for is measured by :mod:`vistok.eval.geneval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vistok.data.datamodule import Dataset
from vistok.errors import UserError
from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import DEFINITION, FrechetDistance, metric_name
from vistok.eval.images import image_batches
from vistok.eval.neighbours import copies_share, nearest_distance, precision_recall
from vistok.interfaces import NULL_CLASS
from vistok.pictures import to_uint8
from vistok.rng import seeded_generator

PRECISION_RECALL_K = 3
PRECISION_RECALL_MOST = 10_000
COPIES_PERCENTILE = 1.0
DEFINITIONS = {
    "fid": DEFINITION,
    "precision_recall": f"k={PRECISION_RECALL_K}, equal numbers of both sets, at most {PRECISION_RECALL_MOST}",
    "copies": f"pixel L2 to the nearest reference image below percentile {COPIES_PERCENTILE:g} of held-out images",
}


def balanced_classes(count: int, num_classes: int) -> Int[Tensor, " N"]:
    """Class ids 0, 1, 2, ... in turn, so that classes differ by one image at most; ``NULL_CLASS`` without classes.

    Interleaved, because evaluators that cut a set into consecutive parts expect every class in every part.
    """
    return torch.arange(count) % num_classes if num_classes else torch.full((count,), NULL_CLASS)


def captions(dataset: Dataset, count: int) -> list[str]:
    """The captions of ``dataset`` in order, once more from the start where ``count`` is larger.

    Raises:
        UserError: if an image has none.
    """
    samples = [dataset.get(index) for index in range(min(count, len(dataset)))]
    for sample in samples:
        if not sample["text"]:
            raise UserError(f"{sample['key']} has no caption, and the generator is conditioned on text")
    return [samples[index % len(samples)]["text"] for index in range(count)]


def measure_generation(
    samples: Iterable[tuple[int, UInt8[Tensor, "N 3 H W"]]],
    class_ids: Int[Tensor, " N"],
    reference: Dataset,
    held_out: Dataset,
    network: FeatureNetwork,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    copies: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare samples with real images.

    Args:
        samples: numbers of tokens, and what was made from that many. One set at a time is in memory, unless copies
            are counted.
        class_ids: the class each sample was asked to show; alike in all sets.
        reference: real images that samples should resemble but not copy.
        held_out: real images that are not in ``reference``.
        network: for features, and for class accuracy if it knows the classes.
        seed: names the images drawn for precision and recall.
        batch_size: images at a time.
        workers: loader processes.
        device: where metrics are computed.
        copies: count copies; the time grows with samples x reference images x pixels, and all are in memory.
        progress: called with the number of images read since the last call.

    Returns:
        ``{"tokens": {"1": {...}, ...}, "held_out": {...}, "counts": {...}, "copies_threshold_l2": ...}``, every set
        with the same metrics; the threshold is a Euclidean distance of pixels in 0..255. Class accuracy is there if
        every image has a class. Counts are those of ``samples`` of one set, ``held_out`` and ``reference`` images.

    Raises:
        UserError: if a set is too small for a metric.
    """
    count = len(class_ids)
    if min(count, len(reference), len(held_out)) <= PRECISION_RECALL_K:
        raise UserError(
            f"generation metrics need more than {PRECISION_RECALL_K} images of each kind, got {count} samples, "
            f"{len(reference)} reference and {len(held_out)} held-out images"
        )
    real, real_labels = _read(held_out, batch_size, workers)
    if copies:
        samples = list(samples)
        pixels = torch.cat([real, *(images for _, images in samples)]).to(device)
        nearest = torch.full((len(pixels),), torch.inf, dtype=torch.float64, device=device)
    frechet = FrechetDistance(network.num_features, keep_real=True).to(device)
    # The features of all of a big reference set would not fit in memory: precision and recall take a random part.
    rng = seeded_generator("precision_recall", seed)
    chosen = _draw(len(reference), min(PRECISION_RECALL_MOST, max(count, len(real))), rng)
    chosen_features: list[Tensor] = []
    seen = 0
    for batch in image_batches(reference, batch_size, workers):
        images = to_uint8(batch["image"]).to(device)
        features = network.features(images)
        frechet.update(features, real=True)
        rows = torch.arange(seen, seen + len(images))
        chosen_features.append(features[torch.isin(rows, chosen).to(device)])
        if copies:
            nearest = nearest.minimum(nearest_distance(pixels, images))
        seen += len(images)
        if progress:
            progress(len(images))

    manifold = torch.cat(chosen_features)
    labelled = "class" in network.heads and NULL_CLASS not in torch.cat([class_ids, real_labels])

    def measure(images: UInt8[Tensor, "N 3 H W"], labels: Int[Tensor, " N"]) -> dict[str, float]:
        features = torch.cat([network.features(rows.to(device)) for rows in images.split(batch_size)])
        row = _compare(features, manifold, frechet, network, seed)
        if labelled:
            row["class_accuracy"] = network.count_right(features, labels) / len(features)
        return row

    tokens = {str(length): measure(images, class_ids) for length, images in samples}
    metrics: dict[str, Any] = {"tokens": tokens, "held_out": measure(real, real_labels)}
    metrics["counts"] = {"samples": count, "held_out": len(real), "reference": seen}
    if copies:
        of_real, *of_samples = nearest.split([len(real), *[count] * len(tokens)])
        for row, distances in zip(tokens.values(), of_samples, strict=True):
            row["copies_share"], metrics["copies_threshold_l2"] = copies_share(distances, of_real, COPIES_PERCENTILE)
        metrics["held_out"]["copies_share"] = COPIES_PERCENTILE / 100
    return metrics


def _compare(
    features: Float[Tensor, "N F"],
    manifold: Float[Tensor, "M F"],
    frechet: FrechetDistance,
    network: FeatureNetwork,
    seed: int,
) -> dict[str, float]:
    """Metrics of one set against the reference that ``frechet`` and ``manifold`` hold, whatever sets came before."""
    rng = seeded_generator("precision_recall", seed)
    frechet.reset()
    frechet.update(features, real=False)
    metrics = {metric_name("gFID", network): frechet.compute().item()}
    count = min(len(features), len(manifold))
    fake, real = (every[_draw(len(every), count, rng).to(every.device)] for every in (features, manifold))
    for metric, value in precision_recall(real, fake, PRECISION_RECALL_K).items():
        metrics[metric_name(metric, network)] = value
    return metrics


def _draw(total: int, count: int, rng: torch.Generator) -> Int[Tensor, " count"]:
    """``count`` of ``total`` indices without replacement."""
    return torch.randperm(total, generator=rng)[:count]


def _read(dataset: Dataset, batch_size: int, workers: int) -> tuple[UInt8[Tensor, "N 3 H W"], Int[Tensor, " N"]]:
    parts = [(to_uint8(batch["image"]), batch["label"]) for batch in image_batches(dataset, batch_size, workers)]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
