"""``words``: captions as the word vectors of a pretrained language model, without any context.

For generators that are language models themselves, such as TokenFlow's, which begins as Llama-2. The table is read
from a folder as ``transformers`` lays it out, such as that of Llama-2 or of the released ``TokenFlow-t2i``; it stays as
it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vistok.checkpoint import weight_files
from vistok.errors import UserError, first_line
from vistok.interfaces import TextCondition, TextEncoder

TABLES = ("model.embed_tokens.weight", "shared.weight")
"""Names of the table in the files of Llama and of T5."""


@dataclass
class Config:
    """Whose words, and how many.

    Args:
        path: folder of the language model: its tokenizer and safetensors.
        max_length: tokens; what a longer text has more is cut off.
    """

    path: str = MISSING
    max_length: int = 128


class Words(TextEncoder):
    """See the module docstring; build it with :func:`build`.

    Args:
        table: a vector for each word.
        tokenizer: of ``transformers``.
        max_length: see :class:`Config`.

    Raises:
        UserError: if the tokenizer makes nothing of the empty text.
    """

    def __init__(self, table: Tensor, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table.float())
        self.tokenizer, self.max_length, self.width = tokenizer, max_length, table.shape[1]
        if not self._ids([""])[0]:
            raise UserError("words: its tokenizer makes nothing of the empty text: it must begin or end every text")

    def encode(self, texts: list[str]) -> TextCondition:
        """Vectors of the words, padded on the right to the longest text."""
        null = self._states([""])
        return TextCondition(*self._states(texts), *null)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids

    @torch.no_grad()
    def _states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        device = self.table.weight.device
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in self._ids(texts)], batch_first=True, padding_value=-1
        ).to(device)
        return self.table(ids.clamp(min=0)), ids >= 0


def build(config: Config) -> Words:
    """The words of the language model in ``config.path``.

    Raises:
        UserError: if a file or the table is missing, or ``max_length`` leaves no room for a word.
    """
    if config.max_length < 2:
        raise UserError(f"words: max_length must be at least 2, got {config.max_length}")
    from transformers import AutoTokenizer  # slow to import

    folder = Path(config.path)
    table = _table(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(f"words: the tokenizer in {folder} cannot be read: {first_line(error)}") from None
    return Words(table, tokenizer, config.max_length)


def _table(folder: Path) -> Tensor:
    """The word vectors alone: the rest of a language model may not fit into memory."""
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for name in TABLES:
                    if name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                        return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"words: {file} is no complete safetensors file: {error}") from None
    raise UserError(f"words: {folder} has no word vectors ({' or '.join(TABLES)})")
