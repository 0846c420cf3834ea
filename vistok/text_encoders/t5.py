"""``t5``: the encoder of a pretrained T5 (Raffel et al. 2020); FlexTok's text-to-image models read FLAN-T5-XL.

``transformers`` reads it from a folder as its ``save_pretrained`` and the hub lay it out; a whole T5 will do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from omegaconf import MISSING
from torch import Tensor, nn

from vistok.errors import UserError, first_line
from vistok.interfaces import TextCondition, TextEncoder
from vistok.nn.frozen import Frozen

FILES = ("config.json", "tokenizer.json")  # and the weights, in one file or several


@dataclass
class Config:
    """Which T5, and how much of a text it reads.

    Args:
        path: its folder, or a repository of the Hugging Face hub such as ``google/flan-t5-xl``.
        max_length: tokens, the last of which ends the text; what a longer text has more is cut off.
    """

    path: str = MISSING
    max_length: int = 128


class T5(TextEncoder):
    """See the module docstring; build it with :func:`build`.

    Args:
        model: a ``T5EncoderModel``.
        tokenizer: of ``transformers``, with a padding token.
        max_length: see :class:`Config`.

    Raises:
        UserError: if the tokenizer makes nothing of the empty text.
    """

    null_states: Tensor
    null_mask: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.width: int = model.config.d_model  # type: ignore[union-attr, assignment]
        states, mask = self._states([""])
        if not mask.any():
            raise UserError("t5: its tokenizer makes nothing of the empty text: it must end every text with a token")
        self.register_buffer("null_states", states, persistent=False)
        self.register_buffer("null_mask", mask, persistent=False)

    def encode(self, texts: list[str]) -> TextCondition:
        """The last hidden states, padded on the right to the longest text."""
        return TextCondition(*self._states(texts), self.null_states, self.null_mask)

    def _states(self, texts: list[str]) -> tuple[Float[Tensor, "B L C"], Bool[Tensor, "B L"]]:
        device = next(self.model.parameters()).device
        words = self.tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad(), Frozen.exact(device):
            hidden = self.model(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state
        return hidden, words.attention_mask.bool()


def build(config: Config) -> T5:
    """The T5 in ``config.path``.

    Raises:
        UserError: if there is none, a file or a tensor is missing, or ``max_length`` leaves no room for a word.
    """
    if config.max_length < 2:
        raise UserError(f"t5: max_length must be at least 2, got {config.max_length}")
    is_local = _check_path(Path(config.path))
    # Captions are short, and its threads do not survive the forks of a data loader.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, local_files_only=is_local)
        loaded: Any = T5EncoderModel.from_pretrained(config.path, local_files_only=is_local, output_loading_info=True)
    except Exception as error:  # transformers raises whatever its parsers and its transport do
        what = "cannot be read" if is_local else "is neither a folder nor a repository that can be reached"
        raise UserError(f"t5: {config.path} {what}: {first_line(error)}") from None
    model, info = loaded
    # A tensor that is not in the file would keep its random initial value.
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"t5: {config.path} lacks {len(missing)} tensor(s) of a T5 encoder, such as {missing[0]}")
    return T5(model, tokenizer, config.max_length)


def _check_path(path: Path) -> bool:
    """Whether ``path`` is a folder, not a repository of the hub.

    Raises:
        UserError: if it can be neither, or is a folder that lacks a file.
    """
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) != 2:
            raise UserError(f"no such folder: {path} (t5 needs {', '.join(FILES)} and the weights)")
        return False
    # Without its files transformers makes a tokenizer of no words.
    if absent := [name for name in FILES if not (path / name).is_file()]:
        raise UserError(f"t5: {path} lacks {', '.join(absent)} (t5 needs {', '.join(FILES)} and the weights)")
    return True
