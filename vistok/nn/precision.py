"""Where rounding must not depend on how a model is run."""

import torch


def exact(device: torch.device) -> torch.autocast:
    """Context in which modules compute in the precision of their weights, whatever the autocast around it.

    Tokens and latents must be the same in training, in a cache and in an evaluation.
    """
    return torch.autocast(device.type, enabled=False)
