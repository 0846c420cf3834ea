"""``bytes``: captions without anything pretrained; the default where no weights are at hand.

    text -> words -> the bytes of each, as the set of their n-grams -> hashed into a vector of ``width`` channels

The vectors are fixed and know nothing of one another: a generator with ``text_depth`` blocks learns to read them. As
in fastText (Bojanowski et al. 2017, "Enriching Word Vectors with Subword Information"), a word that was never seen
still shares its parts with others, there is no vocabulary, and a caption takes a state for each word instead of one for
each byte.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.checkpoint import module_hash
from vistok.errors import UserError
from vistok.interfaces import TextCondition, TextEncoder
from vistok.text_encoders.lengths import LengthConfig, Limit

LENGTHS = range(3, 7)
"""Of the n-grams, bytes, with the marks of a word's ends; the whole word is one more."""

WORD = re.compile(r"\w+|[^\w\s]")

END = ""
"""The word behind every text, so that the empty one has a state too."""


@dataclass
class Config(LengthConfig):
    """Size of the vectors and of the texts, whose tokens are words; the last one ends the text.

    Args:
        width: channels; with too few, words begin to look alike.
    """

    width: int = 256
    max_length: int = 64


class Bytes(TextEncoder):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes.
    """

    device_marker: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.limit, self.width = Limit("bytes", config), config.width
        self._known: dict[str, Tensor] = {}
        self.register_buffer("device_marker", torch.empty(0), persistent=False)

    def encode(self, texts: list[str]) -> TextCondition:
        """A vector of unit mean square for each word, padded on the right to the longest text."""
        rows, most = [words(text) for text in texts], self.limit.max_length - 1
        self.limit.exceeded_by([text for text, row in zip(texts, rows) if len(row) > most], texts)
        return TextCondition(*self._states([row[:most] for row in rows]), *self._states([[]]))

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Those of the words; none of the state behind them."""
        found = [match.span() for match in WORD.finditer(text)]
        return [*found[: self.limit.max_length - 1], (len(text), len(text))]

    @property
    def states_hash(self) -> str:
        return module_hash(self, "bytes", self.width, self.limit.max_length)

    def _states(self, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
        rows = [[*text, END] for text in texts]
        vectors = [torch.stack([self._vector(word) for word in row]) for row in rows]
        states = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        return states.to(self.device_marker.device), mask.to(self.device_marker.device)

    def _vector(self, word: str) -> Tensor:
        if word not in self._known:
            vector = torch.zeros(self.width)
            vector[[zlib.crc32(gram) % self.width for gram in ngrams(word)]] = 1
            self._known[word] = vector * (self.width / vector.sum()).sqrt()
        return self._known[word]


def words(text: str) -> list[str]:
    """The words of a text and its punctuation, in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def ngrams(word: str) -> set[bytes]:
    """The word between marks of its ends, and its parts of :data:`LENGTHS` bytes."""
    marked = b"<" + word.encode() + b">"
    return {marked} | {marked[start : start + n] for n in LENGTHS for start in range(len(marked) - n + 1)}


def build(config: Config) -> Bytes:
    """The encoder of these sizes.

    Raises:
        UserError: if there is no room for a word.
    """
    if config.width < 16:
        raise UserError(f"bytes: width must be at least 16, got {config.width}")
    return Bytes(config)
