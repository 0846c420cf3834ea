"""``words``: captions as the word vectors of a pretrained language model, without any context.

For generators that are language models themselves, such as TokenFlow's, which begins as Llama-2. The table is read
from a folder as ``transformers`` lays it out, such as that of Llama-2 or of the released ``TokenFlow-t2i``; it stays as
it is.
"""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.key_maps import published_folder, weight_files
from vistok.text_encoders.pretrained import PretrainedConfig, PretrainedTextEncoder, read

TABLES = ("model.embed_tokens.weight", "shared.weight")
"""Names of the table in the files of Llama and of T5."""


class Config(PretrainedConfig):
    """``path`` is that of the language model: its tokenizer and safetensors."""


class Words(PretrainedTextEncoder):
    """See the module docstring; build it with :func:`build`."""

    def states(self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        return self.model(ids)


def build(config: Config) -> Words:
    """The words of the language model in ``config.path``.

    Raises:
        UserError: if a file or the table is missing, or ``max_length`` leaves no room for a word.
    """
    folder = published_folder(config.path, "words")
    table = nn.Embedding.from_pretrained(_table(folder))
    return Words("words", read("words", str(folder), "AutoTokenizer"), table, table.embedding_dim, config)


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
