"""How a condition enters a transformer of codes: by the position in front of them, or by what its blocks look at.

Each module here has the same members, so that a generator is built without knowing its condition:

    condition -> start (B, P, D) before the first code; which of it is there, (B, P) or None for all;
                 and states (B, L, D) with their mask for cross-attention, or None

==============  =================================================================  =================================
class_prefix    the class, or a null class, is the position                        LlamaGen
class_start     a learned start of the sequence, plus the class unless it is null  FlexTok (section 3.3)
text_cross      a learned start; every block looks at the states of the text       FlexTok, text to image
text_prefix     the states of the text stand in front, the last right before       LlamaGen and, on the left of a start,
                the codes                                                          TokenFlow, text to image
==============  =================================================================  =================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.interfaces import NULL_CLASS, ClassCondition, Condition, TextCondition
from vistok.nn.attention import Context
from vistok.nn.rope import rotation
from vistok.nn.transformer import MLP, Block

States = tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]
Prefix = tuple[Float[Tensor, "B P D"], Bool[Tensor, "B P"] | None, list[Context | None]]
"""What a transformer is given of a condition, see :meth:`Entry.prefix`."""


@dataclass(kw_only=True)
class ConditionConfig:
    """How class or text enter a generator.

    Args:
        condition: by which module, see above.
        num_classes: classes of a class condition.
        text_width: channels of the text encoder's states, for a text condition (2048: FLAN-T5-XL).
        text_depth: blocks that read the states as a text before the codes see them, trained with the rest; for a text
            encoder whose states know nothing of one another (``bytes``).
        text_positions: of ``text_prefix``, the most states that a text may have.
        own_null: of ``text_prefix``, the null text is a constant of the model, under the mask of the text that it
            replaces, as LlamaGen's published weights expect; off, it is the empty text.
    """

    condition: Literal["class_prefix", "class_start", "text_cross", "text_prefix"] = "class_prefix"
    num_classes: int = 1000
    text_width: int = 2048
    text_depth: int = 0
    text_positions: int = 120
    own_null: bool = False


class Entry(nn.Module):
    """What the modules here have in common.

    Attributes:
        num_positions: P, before the first code.
        num_classes: classes that it knows, 0 for texts.
        text_width: channels of the states of a text, 0 for classes.
        text_positions: most states of a text, 0 for any number.
    """

    num_positions = 1
    num_classes = 0
    text_width = 0
    text_positions = 0

    def prefix(self, condition: Condition, blocks: Iterable[nn.Module]) -> Prefix:
        """The positions of ``condition``, which of them are there (None: all), and what each of ``blocks`` looks at."""
        start, there, states = self(condition)
        context = [None if states is None else cast(Block, block).cross_attention.context(*states) for block in blocks]
        return start, there, context

    def null(self, condition: Condition) -> Condition:
        """What guidance leads away from."""
        return condition.null()

    def drop_some(self, condition: Condition, share: float, rng: torch.Generator) -> Condition:
        """``condition`` with a random ``share`` of its rows null: a generator trained on it can be guided."""
        drop = torch.rand(len(condition), generator=rng, device=rng.device) < share
        return condition.dropped(drop, self.null(condition))


class ClassPrefix(Entry):
    """The class is the first position; the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: ClassCondition) -> tuple[Float[Tensor, "B 1 D"], None, None]:
        ids = condition.class_ids
        return self.table(torch.where(ids == NULL_CLASS, self.num_classes, ids))[:, None], None, None


class ClassStart(Entry):
    """The class is added to a learned start of the sequence; the null class adds nothing."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.start = nn.Embedding(1, width)
        self.table = nn.Embedding(num_classes, width)

    def forward(self, condition: ClassCondition) -> tuple[Float[Tensor, "B 1 D"], None, None]:
        # The null class, -1, finds the row of zeros.
        classes = F.pad(self.table.weight, (0, 0, 0, 1))[condition.class_ids]
        return self.start.weight + classes[:, None], None, None


def _text_mlp(text_width: int, hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(text_width, hidden, bias=False), nn.GELU(approximate="tanh"), nn.Linear(hidden, width, bias=False)
    )


class TextBlocks(nn.Module):
    """Transformer blocks that read a whole text, each state in the light of all others; they learn with the generator.

    They make a text encoder out of states that know nothing of one another, such as those of ``text_encoders.bytes``.

    Args:
        width: channels of the states.
        depth: blocks; without any, states stay what they are.
        heads: of the attention, with rotary positions.
    """

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.RMSNorm, eps=1e-5)
        self.head_dim = width // heads
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, norm, mlp=MLP) for _ in range(depth))

    def forward(self, states: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        rope = rotation(torch.arange(states.shape[1], device=states.device)[:, None], self.head_dim)
        for block in self.blocks:
            states = block(states, mask[:, None, None], rope=rope)
        return states


class TextEntry(Entry):
    """What the two ways of a text have in common."""

    mlp: nn.Module
    text: TextBlocks

    def read(self, states: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """States of a text encoder as the generator sees them, each in the light of all others with ``text_depth``."""
        dtype = next(self.parameters()).dtype  # under autocast too: the blocks add to it
        return self.text(self.mlp(states.to(dtype)).to(dtype), mask)


class TextCross(TextEntry):
    """A learned start of the sequence; the states of the text are for the cross-attention of every block."""

    def __init__(self, text_width: int, width: int, text_depth: int, heads: int) -> None:
        super().__init__()
        self.text_width = text_width
        self.start = nn.Embedding(1, width)
        self.mlp = _text_mlp(text_width, text_width, width)
        self.text = TextBlocks(width, text_depth, heads)

    def forward(self, condition: TextCondition) -> tuple[Float[Tensor, "B 1 D"], None, States]:
        states = self.read(condition.states, condition.mask)
        return self.start.weight.expand(len(condition), 1, -1), None, (states, condition.mask)


class TextPrefix(TextEntry):
    """The states of the text, on the right of ``length`` positions, then a learned start of several positions or none.

    Positions on the left that no text reaches are to be hidden from all others.

    Args:
        width: channels of the positions.
        length: positions for the text.
        start: positions of the learned start.
        text_width: channels of the states, which an MLP brings to ``width``; None for states that stand as they are.
        text_depth: :class:`TextBlocks` over them.
        heads: of these blocks.
        own_null: the null text is a constant of this module, under the mask of the text that it replaces (LlamaGen's
            published weights), unless there is a negative prompt.
    """

    null_states: Tensor | None

    def __init__(
        self,
        width: int,
        length: int,
        start: int = 0,
        text_width: int | None = None,
        text_depth: int = 0,
        heads: int = 1,
        own_null: bool = False,
    ) -> None:
        super().__init__()
        self.text_width, self.text_positions, self.num_positions = text_width or width, length, length + start
        self.mlp = _text_mlp(text_width, width, width) if text_width else nn.Identity()
        self.text = TextBlocks(width, text_depth, heads)
        self.start = nn.Embedding(start, width) if start else None
        null = torch.randn(length, self.text_width) / self.text_width**0.5 if own_null else None
        self.register_buffer("null_states", null)

    def null(self, condition: TextCondition) -> TextCondition:  # type: ignore[override]
        """The empty text or a negative prompt; with ``own_null`` see there."""
        if self.null_states is None or condition.is_negative:
            return condition.null()
        _, mask = self.align(condition.states, condition.mask)
        return replace(condition, states=self.null_states.expand(len(mask), -1, -1), mask=mask)

    def forward(self, condition: TextCondition) -> tuple[Float[Tensor, "B P D"], Bool[Tensor, "B P"], None]:
        """Inputs, and True where there is something.

        Raises:
            UserError: for more states than there are positions for them.
        """
        x, there = self.align(self.read(condition.states, condition.mask), condition.mask)
        if self.start is not None:
            start = self.start.weight.expand(len(x), -1, -1)
            x, there = torch.cat([x, start], dim=1), F.pad(there, (0, start.shape[1]), value=True)
        return x, there, None

    def align(self, states: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> States:
        """Texts on the right of ``length`` positions, wherever their padding is; raises as :meth:`forward`."""
        missing = self.text_positions - mask.shape[1]
        if missing < 0:
            raise UserError(
                f"this generator has room for {self.text_positions} states of a text, got {mask.shape[1]}: "
                f"set text_encoder.args.max_length={self.text_positions}"
            )
        # A stable sort: what is hidden comes first, the text keeps its order.
        order = mask.int().argsort(dim=1, stable=True)
        states, mask = states.gather(1, order[..., None].expand_as(states)), mask.gather(1, order)
        return F.pad(states, (0, 0, missing, 0)), F.pad(mask, (missing, 0))


def make_condition(config: ConditionConfig, width: int, heads: int) -> Entry:
    """The module of ``config`` for a generator of that width and of blocks with so many heads.

    Raises:
        UserError: for a number that no condition can have.
    """
    for name, least in (("num_classes", 0), ("text_width", 1), ("text_depth", 0), ("text_positions", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(config, name)}")
    if config.own_null and config.condition != "text_prefix":
        raise UserError(f"own_null is of condition=text_prefix, not of {config.condition}")
    text_width, text_depth = config.text_width, config.text_depth
    if text_depth and width % (2 * heads):
        raise UserError(f"text_depth: width must be a multiple of {2 * heads} for its {heads} heads, got {width}")
    if config.condition == "text_cross":
        return TextCross(text_width, width, text_depth, heads)
    if config.condition == "text_prefix":
        return TextPrefix(width, config.text_positions, 0, text_width, text_depth, heads, config.own_null)
    return (ClassPrefix if config.condition == "class_prefix" else ClassStart)(config.num_classes, width)
