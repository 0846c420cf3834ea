"""Frechet distance between two sets of images in the space of a named feature network.

Heusel et al. 2017 (arXiv:1706.08500), eq. 6. "FID" without a network and a number of images is not a measurement:
:func:`metric_name` names the network, tables and results give the counts, and nothing here is called plain FID.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from vistok.eval.features import FeatureNetwork

DEFINITION = "torchmetrics, float64 sums of float32 features (TF32 off)"

FIELD_COUNT = 50_000
"""Images behind the numbers in papers; the estimate falls with the number of images."""


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID, with sums in float64, added up over processes.

    It takes features, so that one pass through a feature network serves every metric.

    Args:
        num_features: F.
        keep_real: ``reset()`` keeps the real set, to measure several sets against it.
    """

    def __init__(self, num_features: int, keep_real: bool = False) -> None:
        super().__init__(feature=_Features(num_features), reset_real_features=not keep_real)
        # torchmetrics learns the result's type in update(), which a process without images never calls.
        self.orig_dtype = torch.float64

    def update(self, features: Float[Tensor, "B F"], real: bool) -> None:
        """Add a batch to the real set or to the other."""
        super().update(features.double(), real)


class _Features(nn.Module):
    """The feature extractor of images that are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def metric_name(metric: str, network: FeatureNetwork) -> str:
    """How to print a number that depends on features, e.g. ``gFID (digits-cnn features)``.

    Args:
        metric: "rFID" for reconstructions against their originals, "gFID" for samples against a reference set.
        network: the feature network.
    """
    return f"{metric} ({network.name} features)"


def fid_notes(network: FeatureNetwork, count: int, reference_count: int) -> list[str]:
    """What a reader must know before comparing the number with another."""
    smaller = min(count, reference_count)
    notes = []
    if smaller < FIELD_COUNT:
        notes.append(
            f"FID falls as the number of images grows: N={count} against {reference_count} does not compare with "
            f"published numbers (N={FIELD_COUNT})."
        )
    if smaller <= network.num_features:
        notes.append(
            f"{smaller} images cannot fill a covariance of {network.num_features} features: "
            "this FID says little even among equals."
        )
    return notes
