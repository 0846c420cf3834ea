"""Linear layers with repacked weights, for sampling on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_LEAST_WEIGHTS = 1 << 18
"""Smaller layers cost more to call than to compute."""


@contextmanager
def packed_linears(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let the linear layers of ``model`` compute from copies of their weights in the layout of oneDNN's kernels.

    Products take less time then, above all those of few rows, as in a step of sampling
    (``benchmarks/gpt_sampling.py``). They round otherwise than plain ones, in the last digits of float32. The copies
    have the type of autocast and last as long as the context; they need the memory of the weights once more. There are
    no gradients, and weights that change are not followed. Layers on other devices stay as they are.
    """
    linears = [layer for layer in model.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in linears if enabled and _can_pack(layer.weight)]
    for layer in layers:
        layer.forward = _packed(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # that of the class is behind it


def _can_pack(weight: Tensor) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and type(weight) is nn.Parameter  # no slice of one that processes share
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= _LEAST_WEIGHTS
    )


@torch.no_grad()
def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else layer.weight.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    # What torch.compile makes of linear layers on a CPU; eager torch has no public name for it.
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to(dtype))

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")

    return forward
