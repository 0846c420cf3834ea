"""How good and how varied samples are: FID, sFID, Inception score, KID, precision, recall, class accuracy, copies.

FID, sFID, KID, precision and recall compare with a reference of real images (the field's convention is the training
set). The same figures for real held-out images stand below them: what a perfect generator could reach here. An ordered
code gives one row for each number of tokens that samples are decoded from. Samples are of all classes in turn, or of
the captions of held-out images; whether they show what a text asks for is measured by :mod:`vistok.eval.geneval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from vistok.data.datamodule import Dataset
from vistok.errors import UserError
from vistok.eval import inception_score, kid
from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import DEFINITION, frechet_distance, metric_name
from vistok.eval.image_statistics import ImageStatistics
from vistok.eval.images import Batch
from vistok.eval.neighbours import copies_share, nearest_distance, precision_recall
from vistok.eval.processes import rows_of_all
from vistok.eval.reference import MOST_IMAGES, Reference
from vistok.interfaces import NULL_CLASS

MOST_SAMPLES = 50_000
NEIGHBOUR = 3
COPIES_PERCENTILE = 1.0
DEFINITIONS = {
    "fid": DEFINITION,
    "sfid": "as fid, of the first 7 channels of mixed_6/conv (Mixed_6d.branch1x1 after its ReLU) at 17 x 17 places",
    "is": inception_score.SHUFFLED,
    "adm_is": inception_score.ORDERED,
    "kid": kid.DEFINITION,
    "precision_recall": f"k={NEIGHBOUR}, at most {MOST_IMAGES} reference images, {MOST_SAMPLES} samples; float64",
    "copies": f"pixel L2 to the nearest reference image below percentile {COPIES_PERCENTILE:g} of held-out images",
}

SampledBatch = tuple[dict[str, UInt8[Tensor, "B 3 H W"]], Int[Tensor, " B"], Int[Tensor, " B"]]
"""By the number of tokens, the images made from that many; the classes that they were asked to show, -1 without one;
and their places among all samples."""


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
    samples: Iterable[SampledBatch],
    count: int,
    reference: Reference,
    network: FeatureNetwork,
    held_out: Iterable[Batch] | None = None,
    held_out_count: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compare samples with real images; each batch is forgotten before the next one is read.

    Of several processes each gives its share of the batches, at least one, and gets the figures of all of them.

    Args:
        samples: batches.
        count: samples in all batches of one number of tokens.
        reference: real images that samples should resemble.
        network: for features, and for class accuracy if it knows the classes.
        held_out: real images that are not in the reference; None without any.
        held_out_count: how many there are.
        seed: names the samples drawn for precision, recall and the kernel distance, where there are more than 50,000.
        device: where metrics are computed.

    Returns:
        ``{"tokens": {"1": {...}, ...}, "held_out": {...}, "counts": {...}, "standard_deviations": {...}}``; names of
        figures carry the number of images. Standard deviations are those of the Inception score over its parts and of
        the kernel distance over its subsets. Class accuracy is there if every image has a class. Counts are those of
        ``samples`` of one set, ``held_out`` and ``reference`` images.

    Raises:
        UserError: if a set is too small for a metric.
    """
    sets: dict[str, ImageStatistics] = {}

    def add(name: str, total: int, *batch: Tensor) -> None:
        if name not in sets:
            sets[name] = ImageStatistics(network, total, MOST_SAMPLES, seed, device)
        sets[name].update(*batch)

    for images, labels, rows in held_out or ():
        add("held_out", held_out_count, images, labels, rows)
    for by_length, labels, rows in samples:
        for length, images in by_length.items():
            add(length, count, images, labels, rows)
    figures, deviations = {}, {}
    for name, statistics in sets.items():
        figures[name], deviations[name] = _compare(statistics, reference)
    accuracies = {name: statistics.class_accuracy() for name, statistics in sets.items()}
    for name, accuracy in accuracies.items():
        if accuracy is not None and None not in accuracies.values():
            figures[name]["class_accuracy"] = accuracy
    metrics: dict[str, Any] = {"counts": {"samples": count, "reference": reference.count}}
    if "held_out" in sets:
        metrics |= {"held_out": figures.pop("held_out")}
        metrics["counts"]["held_out"] = sets["held_out"].count
    return {"tokens": figures, **metrics, "standard_deviations": deviations}


def measure_copies(
    samples: dict[str, UInt8[Tensor, "N 3 H W"]],
    held_out: UInt8[Tensor, "M 3 H W"],
    reference: Iterable[Batch],
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], float]:
    """Share of samples that lie nearer to a reference image than all but a hundredth of real held-out images do.

    The time grows with samples x reference images x pixels, and all samples are in memory. Of several processes each
    gives its share of the samples and held-out images, and reads the whole reference.

    Args:
        samples: by the number of tokens, equally many of each.
        held_out: real images.
        reference: real images that samples should not copy.
        device: where distances are computed.
        progress: called with the number of reference images read since the last call.

    Returns:
        The shares by number of tokens, and the threshold, a Euclidean distance of pixels in 0..255.
    """
    pixels = torch.cat([held_out, *samples.values()]).to(device)
    nearest = torch.full((len(pixels),), torch.inf, dtype=torch.float64, device=device)
    for images, *_ in reference:
        nearest = nearest.minimum(nearest_distance(pixels, images.to(device)))
        if progress:
            progress(len(images))
    of_real, *of_samples = map(rows_of_all, nearest.split([len(held_out), *map(len, samples.values())]))
    found = [copies_share(distances, of_real, COPIES_PERCENTILE) for distances in of_samples]
    return dict(zip(samples, (share for share, _ in found))), found[0][1]


def check_counts(**counts: int | None) -> None:
    """Raise UserError if a set of so many images is too small for precision and recall; None is not known."""
    if any(count is not None and count <= NEIGHBOUR for count in counts.values()):
        found = ", ".join(f"{count} {name}" for name, count in counts.items() if count is not None)
        raise UserError(f"generation metrics need more than {NEIGHBOUR} images of each kind, got {found}")


def in_class_order(row: dict[str, float]) -> bool:
    """Whether the two Inception scores of a row differ as they do where images are sorted by class."""
    shuffled, ordered = (
        [value for name, value in row.items() if name.startswith(start)] for start in ("IS-", "ADM-IS-")
    )
    return bool(shuffled) and ordered[0] < 0.9 * shuffled[0]


def _compare(statistics: ImageStatistics, reference: Reference) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of one set against the reference, and the standard deviations of those that have one."""
    network, count = statistics.network, statistics.count
    figures, deviations = {}, {}

    def add(metric: str, value: float, deviation: float | None = None) -> None:
        name = metric_name(metric, network, count)
        figures[name] = value
        if deviation is not None:
            deviations[name] = deviation

    gaussians = statistics.gaussians()
    for layer, metric in (("pool", "gFID"), ("spatial", "sFID")):
        if layer in gaussians and layer in reference.gaussians:
            add(metric, frechet_distance(gaussians[layer], reference.gaussians[layer]).item())
    for cut, score in statistics.inception_scores().items():
        add({"shuffled": "IS", "ordered": "ADM-IS"}[cut], *score)
    if reference.features is not None:
        real, fake = reference.features.to(statistics.device), statistics.kept.to(statistics.device)
        add("KID", *kid.kernel_distance(fake, real))
        for metric, value in precision_recall(real, fake, NEIGHBOUR).items():
            add(metric, value)
    return figures, deviations
