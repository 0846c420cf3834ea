"""Kernel distance between two sets of features (Binkowski et al. 2018, arXiv:1801.01401, eq. 3-4), unbiased."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
DEFINITION = (
    f"polynomial kernel of degree 3, gamma 1/F, offset 1; mean over {SUBSETS} subsets of {SUBSET_SIZE} (of all, where "
    f"a set is smaller), drawn with numpy seed {SEED} as torch-fidelity does; float64"
)


def kernel_distance(
    fake: Float[Tensor, "N F"], real: Float[Tensor, "M F"], subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared maximum mean discrepancy.

    Args:
        fake: features of generated images.
        real: features of real images.
        subsets: how many are drawn from each set.
        size: images in a subset; all where a set is smaller.
    """
    size = min(size, len(fake), len(real))
    rng = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        x, y = (every[rng.choice(len(every), size, replace=False)].double() for every in (fake, real))
        within = sum(_without_diagonal(_kernel(part, part)).sum() for part in (x, y)) / (size * (size - 1))
        values.append(within - 2 * _kernel(x, y).mean())
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


def _kernel(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"]) -> Float[Tensor, "N M"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _without_diagonal(kernel: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    return kernel.fill_diagonal_(0)
