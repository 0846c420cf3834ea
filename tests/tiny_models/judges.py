"""The smallest models of ``transformers`` that answer questions about images, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "yes", "Yes", "no", "No", "?", ".", "a", "red"]
WORDS += ["blue", "hat", "cup", "Is", "there", "Does", "this", "figure", "show", "Please", "answer", "or"]
WORDS += ["Question", "Answer"]
CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_TOWER, "image_size": 16, "patch_size": 8}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_SIDE = {"height": 16, "width": 16}


def save_judge(kind: str, folder: Path) -> Path:
    """A "blip", a "llava" or an "instructblip" on a Flan-T5."""
    torch.manual_seed(0)
    model, processor = {"blip": _blip, "llava": _llava, "instructblip": _instructblip}[kind]()
    for parameter in model.parameters():  # large, so that question and image matter
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _blip() -> tuple[Any, Any]:
    text = {**_TOWER, **_TOKENS, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "sep_token_id": 3}
    config = transformers.BlipConfig(text_config=text, vision_config=_VISION)
    tokenizer = transformers.BertTokenizer({word: index for index, word in enumerate(WORDS)})
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=_SIDE), tokenizer)
    return transformers.BlipForQuestionAnswering(config), processor


def _llava() -> tuple[Any, Any]:
    text = {**_TOWER, **_TOKENS, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": len(WORDS)}
    config = transformers.LlavaConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config=text,
        image_token_id=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=_SIDE)
    processor = transformers.LlavaProcessor(
        images,
        _tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _instructblip() -> tuple[Any, Any]:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    t5 |= {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    config = transformers.InstructBlipConfig(
        vision_config=_VISION,
        qformer_config={**_TOWER, "vocab_size": len(WORDS), "cross_attention_frequency": 1},
        text_config={**t5, "model_type": "t5", "vocab_size": len(WORDS)},
        num_query_tokens=4,
        image_token_index=WORDS.index("<image>"),
    )
    images = transformers.BlipImageProcessor(size=_SIDE)
    processor = transformers.InstructBlipProcessor(images, _tokenizer(), _tokenizer(), num_query_tokens=4)
    return transformers.InstructBlipForConditionalGeneration(config), processor


def _tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    special = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    extra = {"additional_special_tokens": ["<image>"]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special, **extra)
