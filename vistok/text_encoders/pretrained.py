"""What the encoders made of other people's models share: a tokenizer, padding, the empty text, folders and the hub."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from omegaconf import MISSING
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vistok.checkpoint import module_hash
from vistok.errors import UserError, first_line
from vistok.interfaces import TextCondition, TextEncoder
from vistok.key_maps import is_repository
from vistok.nn.precision import exact
from vistok.text_encoders.lengths import LengthConfig, Limit

FILES = (
    ("config.json",),
    ("tokenizer_config.json",),
    ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"),
    tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")),
)
"""What a folder needs, one of each: the vocabulary is of all kinds, of Llama, of T5 or of CLIP."""


@dataclass
class PretrainedConfig(LengthConfig):
    """Which model, and how much of a text it reads.

    Args:
        path: its folder as ``save_pretrained`` and the hub lay it out, or a repository of the Hugging Face hub.
    """

    path: str = MISSING


class PretrainedTextEncoder(TextEncoder):
    """Every token of a text becomes a state.

    Args:
        name: for messages.
        tokenizer: of ``transformers``; it must make at least one token of the empty text.
        model: what makes the states.
        width: channels of a state.
        config: how much of a text is read.

    Raises:
        UserError: if the tokenizer makes nothing of the empty text, or ``max_length`` leaves no room for a word.
    """

    null_states: Tensor
    null_mask: Tensor

    def __init__(self, name: str, tokenizer: Any, model: nn.Module, width: int, config: LengthConfig) -> None:
        super().__init__()
        self.limit = Limit(name, config)
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.width = tokenizer, width
        null = self._tokens([""])
        if not null.input_ids[0]:
            raise UserError(
                f"{name}: its tokenizer makes nothing of the empty text: every text must begin or end by a token"
            )
        states, mask = self._read(null.input_ids)
        self.register_buffer("null_states", states, persistent=False)
        self.register_buffer("null_mask", mask, persistent=False)

    @abstractmethod
    def states(self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """States of tokens, those under the mask only."""

    def encode(self, texts: list[str]) -> TextCondition:
        """A state for every token, padded on the right to the longest text."""
        tokens = self._tokens(texts)
        self.limit.exceeded_by([text for text, row in zip(texts, tokens.encodings) if row.overflowing], texts)
        return TextCondition(*self._read(tokens.input_ids), self.null_states, self.null_mask)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Those of the tokens."""
        return self._tokens(text, return_offsets_mapping=True).offset_mapping

    @property
    def states_hash(self) -> str:
        words = self.tokenizer.backend_tokenizer.to_str()
        return module_hash(self.model, self.limit.name, self.limit.max_length, words)

    def _tokens(self, texts: str | list[str], **options: Any) -> Any:
        return self.tokenizer(texts, truncation=True, max_length=self.limit.max_length, **options)

    def _read(self, tokens: list[list[int]]) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
        device = next(self.model.parameters()).device
        # Not the tokenizer's padding: that of a language model may have none.
        rows = [torch.tensor(row, device=device) for row in tokens]
        ids, mask = (pad_sequence(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows]))
        with torch.no_grad(), exact(device):
            return self.states(ids, mask.bool()), mask.bool()


def read_model(name: str, path: str, class_name: str) -> Any:
    """The model of ``transformers`` that lies in a folder or a repository; as :func:`read` otherwise.

    Raises:
        UserError: also if a tensor is missing or of another shape, and would keep its random initial value.
    """
    model, info = read(name, path, class_name, output_loading_info=True, ignore_mismatched_sizes=True)
    if other := sorted(info["mismatched_keys"]):
        key, found, expected = other[0]
        raise UserError(
            f"{name}: {path}: {len(other)} tensor(s) are of other shapes than its config.json says, such as {key}: "
            f"{tuple(found)}, expected {tuple(expected)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}: {path} lacks {len(missing)} tensor(s) of a {class_name}, such as {missing[0]}")
    return model


def read(name: str, path: str, class_name: str, **options: Any) -> Any:
    """What a class of ``transformers`` makes of a folder as its ``save_pretrained`` lays it out, or of a repository.

    Args:
        name: of the encoder, for messages.
        path: the folder, or ``OWNER/REPOSITORY`` of the Hugging Face hub.
        class_name: ``AutoTokenizer``, ``T5EncoderModel`` and so on.
        options: of ``from_pretrained``.

    Raises:
        UserError: if ``path`` is neither, or a file is missing or cannot be read.
    """
    is_local = _check_path(name, Path(path))
    # Captions are short, and its threads do not survive the forks of a data loader.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers  # slow to import

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, class_name).from_pretrained(path, local_files_only=is_local, **options)
    except Exception as error:  # transformers raises whatever its parsers and its transport do
        what = "cannot be read" if is_local else "is neither a folder nor a repository that can be reached"
        raise UserError(f"{name}: {path} {what}: {first_line(error)}") from None


def _check_path(name: str, path: Path) -> bool:
    """Whether ``path`` is a folder, not a repository of the hub.

    Raises:
        UserError: if it can be neither, or is a folder that lacks a file.
    """
    if not path.is_dir():
        if not is_repository(path):
            needed = ", ".join(names[0] for names in FILES)
            raise UserError(f"no such folder: {path} ({name} needs {needed})")
        return False
    # transformers makes a tokenizer of no words without some, and speaks of its own parts without others.
    if absent := [names[0] for names in FILES if not any((path / file).is_file() for file in names)]:
        raise UserError(f"{name}: {path} lacks {', '.join(absent)}")
    return True
