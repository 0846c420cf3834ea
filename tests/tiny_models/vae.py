"""A VAE of a few thousand weights in a folder, as diffusers would lay it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL


def save_vae(folder: Path, seed: int = 0, **changes: Any) -> AutoencoderKL:
    """Halves the side of an image and makes 5 channels of it; scaled by 0.7."""
    sizes = {"block_out_channels": (8, 8), "latent_channels": 5, "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(seed)
    vae = AutoencoderKL(**{**sizes, **blocks, "scaling_factor": 0.7, **changes})
    vae.save_pretrained(folder)
    return vae
