"""The smallest detectors and the smallest CLIP that ``transformers`` makes, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

CLASSES = ["person", "cat", "mouse", "cup"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", ".", "-", *["a", "photo", "of", "object", "colored", "cat", "person", "cup"]]
WORDS += ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]

_LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
_HEADS = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
_SWIN = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {**_TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 16}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {**_TOWER, "image_size": 32, "patch_size": 8}
_SIDE = {"height": 32, "width": 32}


def save_clip(folder: Path) -> None:
    """A CLIP that knows the ten colours."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=_SIDE)
    _save(folder, transformers.CLIPModel(config), transformers.CLIPProcessor(images, _tokenizer()))


def save_detector(kind: str, folder: Path) -> None:
    """A detector of :data:`CLASSES`, or of whatever is asked for."""
    torch.manual_seed(0)
    _save(folder, *_MAKERS[kind]())


def _mask2former() -> tuple[Any, Any]:
    backbone = transformers.SwinConfig(**_SWIN, out_features=[f"stage{stage}" for stage in (1, 2, 3, 4)])
    widths = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 8}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, dim_feedforward=16, encoder_feedforward_dim=16, **widths, **sizes, **_LABELS
    )
    images = transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    return transformers.Mask2FormerForUniversalSegmentation(config), images


def _detr() -> tuple[Any, Any]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1, num_queries=5, **_HEADS, **_LABELS
    )
    images = transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    return transformers.DetrForObjectDetection(config), images


def _owlv2() -> tuple[Any, Any]:
    config = transformers.Owlv2Config(text_config=_TEXT, vision_config=_VISION, projection_dim=16)
    images = transformers.Owlv2ImageProcessor(size=_SIDE)
    return transformers.Owlv2ForObjectDetection(config), transformers.Owlv2Processor(images, _tokenizer())


def _grounding_dino() -> tuple[Any, Any]:
    backbone = transformers.SwinConfig(**_SWIN, out_indices=[2, 3, 4])
    text = transformers.BertConfig(**{**_TEXT, "hidden_size": 32, "max_position_embeddings": 32})
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "num_queries": 20, "max_text_len": 32}
    config = transformers.GroundingDinoConfig(backbone_config=backbone, text_config=text, **sizes, **_HEADS)
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 160})
    return transformers.GroundingDinoForObjectDetection(config), transformers.GroundingDinoProcessor(
        images, _tokenizer()
    )


_MAKERS = {"mask2former": _mask2former, "detr": _detr, "owlv2": _owlv2, "grounding_dino": _grounding_dino}


def _tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


def _save(folder: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
