"""AdamW, which parameters decay, and the learning rate as a function of updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW

from vistok.errors import UserError


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay of the weights of linear and convolution layers, see :func:`decay_groups`.
        schedule: ``cosine`` down to ``min_lr_ratio * lr`` at the last update, or ``constant``.
        warmup_updates: updates of the linear warm-up before it.
        min_lr_ratio: final share of ``lr`` under ``cosine``.
        clip_norm: largest global gradient norm; null never clips.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_updates: int = 0
    min_lr_ratio: float = 0.0
    clip_norm: float | None = 1.0


def decay_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters of ``net`` in two groups: weights that decay and everything else.

    The weight of a linear or convolution layer decays, unless it is shared with a layer of another kind (a tied
    embedding). Biases, norms, embeddings, tokens and positions do not.
    """
    decaying: dict[int, nn.Parameter] = {}
    others: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decays = isinstance(module, (nn.Linear, _ConvNd)) and name == "weight"
            if parameter.requires_grad:
                (decaying if decays else others)[id(parameter)] = parameter
    return [
        {"params": [p for key, p in decaying.items() if key not in others], "weight_decay": weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]


def make_optimizer(net: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over :func:`decay_groups`.

    Raises:
        UserError: if nothing in ``net`` is trained.
    """
    groups = [group for group in decay_groups(net, config.weight_decay) if group["params"]]
    if not groups:
        raise UserError(f"{type(net).__name__} has no weights to train")
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(update: int, config: OptimConfig, max_updates: int) -> float:
    """Share of ``config.lr`` that the update with this index (the first is 0) is made with."""
    if update < config.warmup_updates:
        return (update + 1) / config.warmup_updates
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup_updates) / max(1, max_updates - config.warmup_updates))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
