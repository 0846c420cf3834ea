"""How much a model computes, with or without merging."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_macs(model: nn.Module, images: Float[Tensor, "B 3 H W"]) -> int:
    """Multiply-adds of one forward pass, which papers on token merging call FLOPs.

    Counted from the matrix products that run, so that attention is counted at the length before a merge, the MLP at
    the one behind it, and the similarities of the matching with them.
    """
    # Of the fused kernels, not all are known to the counter; they compute the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2
