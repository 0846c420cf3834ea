"""A holder for frozen helpers: teachers, autoencoders, perceptual networks, tokenizers under a generator."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Frozen(Generic[M]):
    """Keeps a module out of its owner's parameters, state dict, EMA and optimizer.

    It is deliberately no ``nn.Module``: an attribute of this type is invisible to ``parameters()`` and
    ``state_dict()``, survives ``.train()``, and follows the device of what it is asked about.

    Args:
        module: the helper; put in eval mode, gradients off for its parameters (they still flow through it).
    """

    def __init__(self, module: M) -> None:
        self.module: M = module.eval().requires_grad_(False)

    def on(self, device: torch.device) -> M:
        """The module, on ``device``."""
        return self.module.to(device)
