"""Muon: the matrices of transformer blocks move along their momentum made orthogonal, all else as by AdamW.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): a step of which all singular values
are about 1 also goes where the gradient is weak. Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982,
section 2.2): times ``0.2 sqrt(max(rows, columns))`` its entries are as large as AdamW's, so that both share a learning
rate and a weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

from vistok.nn.attention import Attention, CrossAttention
from vistok.nn.transformer import MLP, SwiGLU
from vistok.training.sharding import full, placed_like

_FUSED = {"qkv": 3, "kv": 2, "gate_up": 2}
"""Layers that are several matrices, one under the other."""

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95
"""Decay of the average of the gradients; Nesterov's look ahead is part of it."""


def matrix_groups(net: nn.Module) -> list[dict[str, Any]]:
    """The trained matrices of attention and MLPs in ``net``, as groups by ``parts``: how many a weight consists of."""
    groups: dict[int, list[Tensor]] = {}
    for module in net.modules():
        if isinstance(module, Attention | CrossAttention | SwiGLU | MLP):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    groups.setdefault(_FUSED.get(name, 1), []).append(layer.weight)
    return [{"params": weights, "parts": parts} for parts, weights in sorted(groups.items())]


class Muon(AdamW):
    """AdamW in which the groups with ``parts`` are those of :func:`matrix_groups`.

    Args:
        groups: of parameters, as for AdamW.
        options: of AdamW, for the other groups; ``lr`` and ``weight_decay`` for all.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move everything that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "parts" not in group]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "parts" in group:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._move(weight, weight.grad, group)
        return loss

    def _move(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in whatever it loads
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        average = state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        # A process that holds a slice needs the whole matrix for this.
        ahead = full(grad.lerp(average, _MOMENTUM))
        steps = orthogonal(ahead.unflatten(0, (group["parts"], -1)))
        move = (0.2 * max(steps.shape[-2:]) ** 0.5 * steps).flatten(0, 1).to(weight.dtype)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(placed_like(move, weight), alpha=-group["lr"])


def orthogonal(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """These matrices with singular values of 0.7 to 1.2, but for the weakest, in bfloat16 (Newton-Schulz steps)."""
    a, b, c = _QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
