"""What a generator is trained on, whatever adapter made the logits of its codes."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "B n *S V"], ids: Int[Tensor, "B n S"]) -> Float[Tensor, "B n S"]:
    """Cross-entropy of each code, nats, float32; logits of a single slot may lack its axis."""
    rows = logits.float().reshape(ids.numel(), -1)  # classes last in memory, which a CPU is faster with
    return F.cross_entropy(rows, ids.flatten(), reduction="none").view(ids.shape)


def z_loss(logits: Float[Tensor, "B n *S V"]) -> Float[Tensor, ""]:
    """Mean square of the log of the softmax's denominator, float32: a pull towards normalised logits.

    It keeps them from drifting away together, which 16-bit precision does not survive (PaLM, arXiv 2204.02311,
    section 5; weight 1e-4 there).
    """
    return logits.float().logsumexp(-1).square().mean()
