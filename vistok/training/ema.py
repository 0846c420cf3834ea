"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from vistok.training.sharding import placed_like, whole
from vistok.training.tasks import LossTask


@dataclass
class EmaConfig:
    """Averaged weights, which validation, pictures and exports use.

    Args:
        decay: share of the average that one update keeps; 0 makes the average the raw weights.
    """

    decay: float = 0.999


def trainable(net: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``net`` that the optimizer moves, by name."""
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


def averaged(net: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``net`` with its trainable weights replaced by their average, see :func:`whole`."""
    state = net.state_dict()
    return whole(state | {name: value.to(state[name].dtype) for name, value in average.items()})


class Ema(L.Callback):
    """Keeps ``average``, a float32 copy of each trainable parameter of the task's net, by name.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that early averages are not the
    initial weights. Frozen helpers and buffers are never averaged.

    Args:
        decay: see :class:`EmaConfig`.
    """

    state_key = "ema"

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._is_swapped = False

    @override
    def on_train_start(self, trainer: L.Trainer, task: LossTask) -> None:
        weights = trainable(task.net)
        if self.average:  # loaded
            assert self.average.keys() == weights.keys(), "the average must have the keys of the net"
            self.average = {name: placed_like(value, weights[name]) for name, value in self.average.items()}
        else:
            self.average = {name: p.float().clone() for name, p in weights.items()}

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if not task.updated:
            return
        decay = min(self.decay, (1 + task.updates) / (10 + task.updates))
        weights = [p.float() for p in trainable(task.net).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    @contextmanager
    def swapped(self, task: LossTask) -> Iterator[None]:
        """The net with averaged weights; the raw ones are back afterwards, whatever happens inside."""
        weights = trainable(task.net)
        raw = {name: p.clone() for name, p in weights.items()}
        self._is_swapped = True
        try:
            for name, p in weights.items():
                p.copy_(self.average[name])
            yield
        finally:
            for name, p in weights.items():
                p.copy_(raw[name])
            self._is_swapped = False

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, task: LossTask, checkpoint: dict) -> None:
        assert not self._is_swapped, "a checkpoint must hold the raw weights"

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return whole(self.average)

    @override
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average = dict(state)
