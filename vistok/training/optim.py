"""The optimizer, which parameters decay, and the learning rate as a function of updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import AdamW

from vistok.errors import UserError
from vistok.training.muon import Muon, matrix_groups


@dataclass
class OptimConfig:
    """The optimizer and its schedule.

    Args:
        name: ``adamw``; or ``muon``, which moves the matrices of attention and MLPs otherwise, see
            :mod:`vistok.training.muon`, at the same ``lr`` and ``weight_decay`` but without ``betas`` and ``eps``.
        lr: peak learning rate.
        betas: decay of AdamW's first and second moment.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay of the weights of linear and convolution layers, see :func:`decay_groups`.
        schedule: ``cosine`` down to ``min_lr_ratio * lr`` at the last update, or ``constant``.
        warmup_updates: updates of the linear warm-up before it.
        min_lr_ratio: final share of ``lr`` under ``cosine``.
        clip_norm: largest global gradient norm; null never clips.
    """

    name: Literal["adamw", "muon"] = "adamw"
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
    """The optimizer of ``config`` over :func:`decay_groups`.

    Raises:
        UserError: if nothing in ``net`` is trained, or it has no matrices for ``muon``.
    """
    groups = decay_groups(net, config.weight_decay)
    make: type[AdamW] = AdamW
    if config.name == "muon":
        make, matrices = Muon, matrix_groups(net)
        if not matrices:
            raise UserError(f"optim.name=muon: {type(net).__name__} has no transformer blocks (use adamw)")
        apart = {id(weight) for group in matrices for weight in group["params"]}
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in apart]} for group in groups]
        groups += [{**group, "weight_decay": config.weight_decay} for group in matrices]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError(f"{type(net).__name__} has no weights to train")
    return make(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(update: int, config: OptimConfig, max_updates: int) -> float:
    """Share of ``config.lr`` that the update with this index (the first is 0) is made with."""
    if update < config.warmup_updates:
        return (update + 1) / config.warmup_updates
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup_updates) / max(1, max_updates - config.warmup_updates))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
