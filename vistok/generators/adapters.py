"""Token adapters: how codes become the positions of a backbone, and its outputs predictions of codes.

:class:`CodeAdapter` puts one code at each position, :class:`~vistok.generators.token_shuffle.TokenShuffle` a window of
codes; codes of several slots go through :class:`~vistok.generators.dimensionwise_head.DimensionwiseHead`.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.sampling import Picker
from vistok.generators.token_shuffle import Config as ShuffleConfig
from vistok.generators.token_shuffle import TokenShuffle
from vistok.nn.rope import coordinates
from vistok.nn.transformer import matrix_flops
from vistok.tokens import TokenSpec


class CodeAdapter(nn.Module):
    """One code at each position: an embedding in front of the backbone, a linear head behind it.

    Other adapters (several slots, fused windows) have the same members and replace this one.
    """

    codes_per_position = 1

    def __init__(self, spec: TokenSpec, width: int) -> None:
        super().__init__()
        self.num_positions = spec.num_positions
        self.embedding = nn.Embedding(spec.vocab_sizes[0], width)
        self.head = nn.Linear(width, spec.vocab_sizes[0], bias=False)
        self.coordinates = coordinates(spec.layout)

    def reset_parameters(self) -> None:
        """A zero head: the first loss is exactly the log of the vocabulary."""
        nn.init.zeros_(self.head.weight)

    @property
    def train_flops(self) -> int:
        """Of a sample, see :attr:`Generator.train_flops`."""
        return matrix_flops(self.num_positions, self.head)

    def arrange(self, ids: Int[Tensor, "B N 1"]) -> Int[Tensor, "B N 1"]:
        """Codes in the order of the layout -> in that of the backbone."""
        return ids

    def restore(self, ids: Int[Tensor, "B n 1"]) -> Int[Tensor, "B n 1"]:
        """Inverse of :meth:`arrange`."""
        return ids

    def embed(self, ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n D"]:
        """Inputs of the backbone."""
        return self.embedding(ids[:, :, 0])

    def logits(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n V"]:
        """Predictions of ``ids`` from the backbone's outputs (alone: no other code stands at their positions)."""
        return self.head(hidden)

    def sample(self, hidden: Float[Tensor, "B2 D"], uniform: Float[Tensor, "B 1 1"], pick: Picker) -> Tensor:
        """Codes ``(B, codes_per_position, S)`` of one position."""
        return pick(self.head(hidden), uniform[:, 0, 0])[:, None, None]


Adapter = CodeAdapter | DimensionwiseHead | TokenShuffle


def make_adapter(spec: TokenSpec, width: int, head: HeadConfig, shuffle: ShuffleConfig | None = None) -> Adapter:
    """The adapter that the slots of ``spec`` call for, or the windows of ``shuffle``.

    Raises:
        UserError: as the adapters.
    """
    if shuffle is not None and shuffle.window != 1:
        return TokenShuffle(spec, width, shuffle)
    return CodeAdapter(spec, width) if spec.num_slots == 1 else DimensionwiseHead(spec, width, head)
