"""Alignment of a generative transformer's features with those of a frozen vision model (REPA).

Yu et al., "Representation Alignment for Generation", ICLR 2025 (arXiv 2410.06940), section 3: a three-layer projector
and the negative mean cosine over locations. FlexTok aligns an early block of its decoder with DINOv2-L, both maps on a
grid of 37 x 37, which is the teacher's own at its native 518 px.

Ours, where no source states it: the common grid is that of the teacher, so that only the map of the decoder is resized;
the projector's hidden width is REPA's 2048.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.nn.frozen import Frozen
from vistok.nn.vision_teacher import VisionTeacher


@dataclass
class AlignmentConfig:
    """The teacher, and how much it counts.

    Args:
        teacher: timm name of a vision transformer.
        teacher_weights: its weights file, see :func:`~vistok.nn.vision_teacher.load_teacher`; None turns the alignment
            off.
        teacher_args: arguments of ``timm.create_model``, such as ``img_size: 224`` for a grid of 16 x 16 instead of
            37 x 37 at a sixth of the cost.
        weight: factor on the loss.
        layer: the aligned block, from 0.
        projector_width: hidden channels of the projector.
    """

    teacher: str = "vit_large_patch14_dinov2.lvd142m"
    teacher_weights: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    layer: int = 1
    projector_width: int = 2048


class Alignment(nn.Module):
    """The unweighted loss, with a trainable projector and a frozen teacher.

    Args:
        config: see :class:`AlignmentConfig`.
        teacher: no part of parameters and state dict.
        width: channels of the features to align.
    """

    def __init__(self, config: AlignmentConfig, teacher: VisionTeacher, width: int) -> None:
        super().__init__()
        self.config = config
        self.teacher = Frozen(teacher)
        hidden = config.projector_width
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher.width)
        )

    def forward(self, features: Float[Tensor, "B h w D"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """:func:`alignment_loss` of the projected features with what the teacher sees in ``images`` in [-1, 1].

        The teacher computes at the precision of the run: nothing but this loss depends on it.
        """
        with torch.no_grad():
            target = self.teacher.on(images.device)(images)
        return alignment_loss(self.projector(features), target)


def alignment_loss(projected: Float[Tensor, "B h w C"], target: Float[Tensor, "B rows columns C"]) -> Float[Tensor, ""]:
    """Negative mean cosine over the locations of ``target``, in [-1, 1] and float32.

    ``projected`` is resized to them (bilinear).
    """
    ours = F.interpolate(projected.float().permute(0, 3, 1, 2), target.shape[1:3], mode="bilinear")
    return -F.cosine_similarity(ours, target.float().permute(0, 3, 1, 2), dim=1).mean()
