"""How a condition enters a transformer of codes: by the position in front of them, or by what its blocks look at.

Each module here has the same members, so that a generator is built without knowing its condition:

    condition -> start (B, P, D) before the first code, and states (B, L, D) with their mask for cross-attention or None

==============  =================================================================  =====================
class_prefix    the class, or a null class, is the position                        LlamaGen
class_start     a learned start of the sequence, plus the class unless it is null  FlexTok (section 3.3)
text_cross      a learned start; every block looks at the states of the text       FlexTok, text to image
==============  =================================================================  =====================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.interfaces import NULL_CLASS, ClassCondition, Condition, TextCondition

States = tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]


class ClassPrefix(nn.Module):
    """The class is the first position; the last row of the table is the null class."""

    num_positions = 1
    text_width = 0

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: ClassCondition) -> tuple[Float[Tensor, "B 1 D"], None]:
        ids = condition.class_ids
        return self.table(torch.where(ids == NULL_CLASS, self.num_classes, ids))[:, None], None


class ClassStart(nn.Module):
    """The class is added to a learned start of the sequence; the null class adds nothing."""

    num_positions = 1
    text_width = 0

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.start = nn.Embedding(1, width)
        self.table = nn.Embedding(num_classes, width)

    def forward(self, condition: ClassCondition) -> tuple[Float[Tensor, "B 1 D"], None]:
        # The null class, -1, finds the row of zeros.
        classes = F.pad(self.table.weight, (0, 0, 0, 1))[condition.class_ids]
        return self.start.weight + classes[:, None], None


class TextCross(nn.Module):
    """A learned start of the sequence; the states of the text are for the cross-attention of every block."""

    num_positions = 1
    num_classes = 0

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.text_width = text_width
        self.start = nn.Embedding(1, width)
        self.mlp = nn.Sequential(
            nn.Linear(text_width, text_width, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(text_width, width, bias=False),
        )

    def forward(self, condition: TextCondition) -> tuple[Float[Tensor, "B 1 D"], States]:
        states = self.mlp(condition.states.to(self.start.weight.dtype))
        return self.start.weight.expand(len(condition), 1, -1), (states, condition.mask)


def drop_some(condition: Condition, share: float, rng: torch.Generator) -> Condition:
    """``condition`` with a random ``share`` of its rows null: a generator trained on it can be guided."""
    return condition.dropped(torch.rand(len(condition), generator=rng, device=rng.device) < share)
