"""Frechet distance between two sets of images in the space of a named feature network.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6. "FID" without a network and a number of images is not a measurement:
:func:`metric_name` puts both into the name of the figure, and nothing here is called plain FID.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

from vistok.errors import UserError
from vistok.eval.features import FeatureNetwork

DEFINITION = "Gaussians with covariance over N-1, float64 sums of float32 features (TF32 off)"

FIELD_COUNT = 50_000
"""Images behind the numbers in papers; the estimate falls with the number of images."""


class Gaussian(NamedTuple):
    """Mean and covariance (over N-1) of features, float64, and of how many images; None where nobody says."""

    mean: Float[Tensor, " F"]
    covariance: Float[Tensor, "F F"]
    num_images: Tensor | int | None


class Moments(Metric):
    """Mean and covariance of features, from sums in float64: memory does not grow with the number of images.

    Added up over processes.

    Args:
        num_features: F.
    """

    full_state_update = False
    total: Float[Tensor, " F"]
    products: Float[Tensor, "F F"]
    count: Float[Tensor, ""]

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, shape in (("total", (num_features,)), ("products", (num_features, num_features)), ("count", ())):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "B F"]) -> None:
        """Add the features of a batch of images."""
        features = features.double()
        self.total += features.sum(0)
        self.products += features.T @ features
        self.count += len(features)

    def compute(self) -> Gaussian:
        """The Gaussian of all images.

        Raises:
            UserError: if there are fewer than two.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs two images at least, got {int(self.count)}")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance, self.count.clone())


class FrechetDistance(nn.Module):
    """Frechet distance of two sets whose features come in batches.

    It takes features, so that one pass through a feature network serves every metric.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.real, self.fake = Moments(num_features), Moments(num_features)

    def update(self, features: Float[Tensor, "B F"], real: bool) -> None:
        """Add a batch to the real set or to the other."""
        (self.real if real else self.fake).update(features)

    def compute(self) -> Float[Tensor, ""]:
        """The distance; :class:`UserError` if a set has fewer than two images."""
        return frechet_distance(self.real.compute(), self.fake.compute())


def frechet_distance(one: Gaussian, other: Gaussian) -> Float[Tensor, ""]:
    """Squared Frechet distance of two Gaussians, float64."""
    # tr sqrt(A B) = tr sqrt(R' B R) with A = R R': symmetric, so it is faster and its roots are real. Fewer images than
    # features leave the covariance without full rank; the directions that are zero would only bring in rounding.
    narrow, wide = sorted((one, other), key=lambda gaussian: _or_infinite(gaussian.num_images))
    variances, axes = torch.linalg.eigh(narrow.covariance)
    there = variances > variances.max() * len(variances) * torch.finfo(torch.float64).eps
    root = axes[:, there] * variances[there].sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ wide.covariance @ root).clamp(min=0).sqrt().sum()
    shift = (one.mean - other.mean).square().sum()
    return shift + one.covariance.trace() + other.covariance.trace() - 2 * overlap


def _or_infinite(count: Tensor | int | None) -> float:
    return math.inf if count is None else float(count)


def metric_name(metric: str, network: FeatureNetwork, count: int) -> str:
    """How to print a figure of a set of images, e.g. ``gFID-500 (digits-cnn features)``, or ``gFID-50k`` of 50,000.

    Args:
        metric: "rFID" for reconstructions against their originals, "gFID" for samples against a reference set.
        network: the feature network.
        count: images in the set that is measured.
    """
    images = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{metric}-{images} ({network.name} features)"


def fid_notes(network: FeatureNetwork, count: int, reference_count: int | None) -> list[str]:
    """What a reader must know before comparing the number with another; the reference's count may be unknown."""
    notes = []
    if count < FIELD_COUNT:
        against = "a reference of unknown size" if reference_count is None else str(reference_count)
        notes.append(
            f"FID falls as the number of images grows: N={count} against {against} does not compare with "
            f"published numbers (N={FIELD_COUNT})."
        )
    return notes + rank_notes(network, count if reference_count is None else min(count, reference_count))


def rank_notes(network: FeatureNetwork, count: int) -> list[str]:
    """What must be known about a set, of samples or a reference, of fewer images than the network has features."""
    if count > network.num_features:
        return []
    return [
        f"{count} images cannot fill a covariance of {network.num_features} features, at least "
        f"{network.num_features + 1} are needed: an FID with so few says little even among equals."
    ]


def check_finite(name: str, gaussian: Gaussian) -> Gaussian:
    """The same Gaussian; :class:`UserError` that begins with ``name`` if it holds a value that is no number."""
    if not all(torch.isfinite(part).all() for part in gaussian[:2]):
        raise UserError(f"{name}: mean or covariance holds values that are not finite")
    return gaussian
