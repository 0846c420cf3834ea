"""Inception score (Salimans et al. 2016, arXiv:1606.03498): exp of the mean KL of p(y|x) to p(y), over parts of a set.

The score depends on how the set is cut. Two ways are in use: torch-fidelity's ten parts of a shuffled set, and ADM's
parts of 5,000 in the order in which images lie, whose value collapses when they are sorted by class.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

SHUFFLED_PARTS, SHUFFLE_SEED = 10, 2020
ORDERED_PART = 5000
SHUFFLED = f"mean over {SHUFFLED_PARTS} parts of the shuffled set (numpy seed {SHUFFLE_SEED}), as torch-fidelity"
ORDERED = f"mean over parts of {ORDERED_PART} images in order, as ADM"


class InceptionScore(Metric):
    """Inception score from sums in float64: memory does not grow with the number of images; added up over processes.

    Args:
        num_classes: K.
        num_parts: how many parts the set is cut into.
    """

    full_state_update = False
    shares: Float[Tensor, "parts K"]
    negative_entropy: Float[Tensor, " parts"]
    counts: Float[Tensor, " parts"]

    def __init__(self, num_classes: int, num_parts: int) -> None:
        super().__init__()
        for name, shape in (
            ("shares", (num_parts, num_classes)),
            ("negative_entropy", num_parts),
            ("counts", num_parts),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "B K"], parts: Int[Tensor, " B"]) -> None:
        """Add a batch; ``parts`` says which part each image belongs to."""
        log_shares = logits.double().log_softmax(1)
        shares, parts = log_shares.exp(), parts.to(logits.device)
        self.shares.index_add_(0, parts, shares)
        self.negative_entropy.index_add_(0, parts, (shares * log_shares).sum(1))
        self.counts.index_add_(0, parts, torch.ones(len(parts), dtype=torch.float64, device=logits.device))

    def compute(self) -> Float[Tensor, " 2"]:
        """Mean and standard deviation (over the parts, not of a sample of them) of the scores of parts with images."""
        there = self.counts > 0
        counts = self.counts[there]
        mean = self.shares[there] / counts[:, None]
        scores = (self.negative_entropy[there] / counts - torch.xlogy(mean, mean).sum(1)).exp()
        return torch.stack([scores.mean(), scores.std(correction=0)])


def shuffled_parts(count: int) -> Int[Tensor, " N"]:
    """The part of each of ``count`` images, cut as torch-fidelity does by default."""
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    parts = torch.empty(count, dtype=torch.int64)
    for part in range(SHUFFLED_PARTS):
        parts[order[part * count // SHUFFLED_PARTS : (part + 1) * count // SHUFFLED_PARTS]] = part
    return parts


def ordered_parts(count: int) -> Int[Tensor, " N"]:
    """The part of each of ``count`` images, cut as ADM does."""
    return torch.arange(count) // ORDERED_PART
