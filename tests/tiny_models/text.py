"""A T5 and a CLIP of a few thousand weights in folders, as their authors would lay them out.

And conditions for any generator.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from vistok.interfaces import NULL_CLASS, ClassCondition, Condition, Generator, TextCondition

WIDTH = 16
CLIP_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
WORDS = ["<pad>", "</s>", "<unk>", "a", "handwritten", "small", "large", "red", "blue", "circle", "square", "of"]


def save_t5(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """A whole T5, decoder included, that knows :data:`WORDS` and the digits."""
    words = [*WORDS, *map(str, range(10))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **sizes))
    model.save_pretrained(folder)
    return folder


def clip_config() -> CLIPTextConfig:
    """Of a text tower with a token for every byte, within a word and at its end."""
    return CLIPTextConfig(**CLIP_SIZES, vocab_size=514, bos_token_id=512, eos_token_id=513)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """The text tower of a CLIP that reads bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(seed)
    CLIPTextModel(clip_config()).save_pretrained(folder)
    return folder


def condition_for(generator: Generator, count: int = 4) -> Condition:
    """Different rows of the kind that ``generator`` takes, the last of four or more unconditional."""
    if not generator.text_width:
        ids = torch.arange(count) * 3 % generator.num_classes
        return ClassCondition(torch.where(torch.arange(count) == count - 1, NULL_CLASS, ids))
    rng = torch.Generator().manual_seed(0)
    states, null = (
        torch.randn(rows, length, generator.text_width, generator=rng) for rows, length in ((count, 5), (1, 2))
    )
    # Texts of one to five states, and two for the empty one.
    mask = torch.arange(5) <= torch.arange(count)[:, None] % 5
    texts = TextCondition(states, mask, null, torch.ones(1, 2, dtype=torch.bool))
    return texts.dropped(torch.arange(count) == count - 1)
