"""``t5``: the encoder of a pretrained T5 (Raffel et al. 2020); FlexTok's text-to-image models read FLAN-T5-XL.

The states are those of its last layer. A whole T5 will do.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from tokenizers.normalizers import Lowercase, Sequence, Strip
from torch import Tensor

from vistok.text_encoders.pretrained import PretrainedConfig, PretrainedTextEncoder, read, read_model


@dataclass
class Config(PretrainedConfig):
    """``path`` is a folder, or a repository of the hub such as ``google/flan-t5-xl``.

    Args:
        lower: read texts in lower case, without space around them.
    """

    lower: bool = False


class T5(PretrainedTextEncoder):
    """See the module docstring; build it with :func:`build`."""

    def states(self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def build(config: Config) -> T5:
    """The T5 in ``config.path``.

    Raises:
        UserError: if there is none, a file or a tensor is missing, or ``max_length`` leaves no room for a word.
    """
    tokenizer, model = read("t5", config.path, "AutoTokenizer"), read_model("t5", config.path, "T5EncoderModel")
    if config.lower:
        # Not by str.lower: the tokenizer's own steps are in its hash, and keep track of places in the text.
        own = tokenizer.backend_tokenizer
        own.normalizer = Sequence([Lowercase(), Strip(), *([own.normalizer] if own.normalizer else [])])
    return T5("t5", tokenizer, model, model.config.d_model, config)
