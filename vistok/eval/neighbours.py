"""Metrics made of nearest-neighbour distances: precision, recall and the share of copies.

Distances are computed in float64 and in chunks: exact for uint8 pixels, and memory grows with neither set's square.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Num
from torch import Tensor

from vistok.errors import UserError

CHUNK = 1024


def precision_recall(real: Float[Tensor, "N F"], fake: Float[Tensor, "M F"], k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1-2).

    A set's manifold is the union of balls around its points, each reaching the point's k-th nearest neighbour in the
    same set. Precision is the share of fake points on the real manifold, recall that of real points on the fake one.
    Both depend on the sizes of the sets: give equally many.

    Args:
        real: features of real images.
        fake: features of generated images.
        k: which neighbour sets the radius.

    Raises:
        UserError: if a set has no more than k points.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with k={k} need more than {k} images, got {len(real)} and {len(fake)}")
    return {"precision": _coverage(real, fake, k), "recall": _coverage(fake, real, k)}


def nearest_distance(queries: Num[Tensor, "N ..."], references: Num[Tensor, "M ..."]) -> Float[Tensor, " N"]:
    """Euclidean distance of every query (such as a uint8 image) to the nearest reference."""
    flat, reference = queries.flatten(1), references.flatten(1).double()
    return torch.cat([torch.cdist(rows.double(), reference).amin(1) for rows in flat.split(CHUNK)])


def copies_share(
    samples: Float[Tensor, " N"], held_out: Float[Tensor, " M"], percentile: float = 1.0
) -> tuple[float, float]:
    """Share of samples that lie closer to a training image than real images of the same kind do.

    Args:
        samples: distance of every sample to its nearest training image.
        held_out: the same distance for real held-out images.
        percentile: of ``held_out``: closer than this counts as a copy. Held-out images themselves score
            ``percentile / 100``.

    Returns:
        The share in [0, 1] and the threshold, in the unit of the distances.
    """
    threshold = torch.quantile(held_out.double(), percentile / 100)
    return (samples < threshold).double().mean().item(), threshold.item()


def _coverage(centres: Float[Tensor, "N F"], points: Float[Tensor, "M F"], k: int) -> float:
    """Share of ``points`` inside at least one ball of ``centres``."""
    centres, points = centres.double(), points.double()
    # A point is its own nearest neighbour, at distance 0.
    radii = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(CHUNK)])
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(CHUNK)]
    return torch.cat(inside).double().mean().item()
