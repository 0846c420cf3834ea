"""How a condition enters a transformer of codes: by the position in front of them, or by what its blocks look at.

Each module here has the same members, so that a generator is built without knowing its condition:

    condition -> start (B, P, D) before the first code, and states (B, L, D) with their mask for cross-attention or None

==============  =================================================================  =====================
class_prefix    the class, or a null class, is the position                        LlamaGen
class_start     a learned start of the sequence, plus the class unless it is null  FlexTok (section 3.3)
text_cross      a learned start; every block looks at the states of the text       FlexTok, text to image
text_prefix     the states of the text stand in front, on the left of a start      TokenFlow, text to image
==============  =================================================================  =====================
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.errors import UserError
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


Kind = Literal["class_prefix", "class_start", "text_cross"]


def make_condition(kind: Kind, width: int, num_classes: int, text_width: int) -> ClassPrefix | ClassStart | TextCross:
    """The module of that name; one of a class needs no ``text_width``, one of texts no ``num_classes``."""
    if kind == "text_cross":
        return TextCross(text_width, width)
    return (ClassPrefix if kind == "class_prefix" else ClassStart)(num_classes, width)


class TextPrefix(nn.Module):
    """The states of the text, on the right of ``length`` positions, then a learned start of several positions.

    Positions on the left that no text reaches are to be hidden from all others.
    """

    num_classes = 0

    def __init__(self, width: int, length: int, start: int) -> None:
        super().__init__()
        self.text_width, self.length, self.num_positions = width, length, length + start
        self.start = nn.Embedding(start, width)

    def forward(self, condition: TextCondition) -> tuple[Float[Tensor, "B P D"], Bool[Tensor, "B P"]]:
        """Inputs, and True where there is something.

        Raises:
            UserError: for more states than there are positions for them.
        """
        states, mask = condition.states, condition.mask
        missing = self.length - mask.shape[1]
        if missing < 0:
            raise UserError(
                f"this generator has room for {self.length} states of a text, got {mask.shape[1]}: "
                f"set text_encoder.args.max_length={self.length}"
            )
        # A stable sort: what is hidden comes first, the text keeps its order.
        order = mask.int().argsort(dim=1, stable=True)
        states, mask = states.gather(1, order[..., None].expand_as(states)), mask.gather(1, order)
        states, mask = F.pad(states, (0, 0, missing, 0)), F.pad(mask, (missing, 0))
        start = self.start.weight.expand(len(states), -1, -1)
        mask = F.pad(mask, (0, start.shape[1]), value=True)
        return torch.cat([states.to(start.dtype), start], dim=1), mask


def drop_some(condition: Condition, share: float, rng: torch.Generator) -> Condition:
    """``condition`` with a random ``share`` of its rows null: a generator trained on it can be guided."""
    return condition.dropped(torch.rand(len(condition), generator=rng, device=rng.device) < share)
