"""The released GPTs of LlamaGen: of classes, ``c2i_{B,L}_256.pt`` and ``c2i_{B,L,XL,XXL,3B}_384.pt``, and of texts.

Those of texts, ``t2i_XL_stage1_256.pt`` and ``t2i_XL_stage2_512.pt``, read FLAN-T5-XL. LlamaGen cleans captions and
prompts before. Of that, the text encoder that an export records does the lower case and takes the space around a text
away. It does not mend encodings (ftfy) or HTML entities, nor take away web addresses, HTML, hashtags, file names, CJK
characters and other marks of captions from the web, nor write dashes and quotes alike: give prompts without them.

Sizes are read from the tensors. They do not tell the number of heads, which the width does, nor the grid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.errors import UserError
from vistok.generators import gpt
from vistok.generators.gpt import GPT, Config
from vistok.key_maps import KeyMap, KeyRule, load_strictly, load_torch_file, published_file
from vistok.tokens import Grid2D, TokenSpec

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}
"""By width, of B, L, XL, XXL and 3B."""

STRIDE_PX, CODE_DIM = 16, 8
"""Of VQ-16, whose codes they model."""

PUBLISHED_KEYS = KeyMap(
    "LlamaGen GPT",
    [
        KeyRule("condition.table.weight", ("cls_embedding.embedding_table.weight",)),
        KeyRule("condition.mlp.0.weight", ("cls_embedding.cap_proj.fc1.weight",)),
        KeyRule("condition.mlp.2.weight", ("cls_embedding.cap_proj.fc2.weight",)),
        KeyRule("condition.null_states", ("cls_embedding.uncond_embedding",)),
        KeyRule("adapter.embedding.weight", ("tok_embeddings.weight",)),
        KeyRule("adapter.head.weight", ("output.weight",)),
        KeyRule("norm.weight", ("norm.weight",)),
        KeyRule("blocks.{i}.attention_norm.weight", ("layers.{i}.attention_norm.weight",)),
        KeyRule("blocks.{i}.attention.qkv.weight", ("layers.{i}.attention.wqkv.weight",)),
        KeyRule("blocks.{i}.attention.out.weight", ("layers.{i}.attention.wo.weight",)),
        KeyRule("blocks.{i}.mlp_norm.weight", ("layers.{i}.ffn_norm.weight",)),
        KeyRule(
            "blocks.{i}.mlp.gate_up.weight",
            ("layers.{i}.feed_forward.w1.weight", "layers.{i}.feed_forward.w3.weight"),
        ),
        KeyRule("blocks.{i}.mlp.down.weight", ("layers.{i}.feed_forward.w2.weight",)),
    ],
)


def load_published(path_or_hub_id: str, image_size: int | None = None) -> GPT:
    """See :meth:`GPT.from_published`."""
    path = published_file(path_or_hub_id, "LlamaGen GPT")
    named = re.search(r"_(256|384|512)\b", path.stem)
    if image_size is None and named is None:
        raise UserError(f"{path}: its name does not say for which images it is: give --image-size 256, 384 or 512")
    size = image_size or int(named[1])  # type: ignore[index]
    return from_state({key: value.float() for key, value in _read(path).items()}, size, str(path))


def from_state(state: Mapping[str, Tensor], image_size: int, source: str) -> GPT:
    """The model of a published state dict.

    Raises:
        UserError: naming the key, shape or size that is missing or does not fit.
    """
    if image_size < STRIDE_PX or image_size % STRIDE_PX:
        raise UserError(f"{source}: image_size must be a multiple of {STRIDE_PX}, got {image_size}")
    ours = PUBLISHED_KEYS.to_ours(state)
    try:
        vocab_size, width = ours["adapter.embedding.weight"].shape
        condition = _condition(ours)
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]} is missing in our layout") from None
    if width not in HEADS:
        raise UserError(f"{source}: width {width} is none of the released ones ({', '.join(map(str, HEADS))})")
    depth = len([key for key in ours if key.endswith(".attention_norm.weight")])
    config = Config(width, depth, HEADS[width], zero_prefix_rotation=True, **condition)
    side = image_size // STRIDE_PX
    model = gpt.build(config, TokenSpec(Grid2D(side, side), (vocab_size,), CODE_DIM, image_size))
    load_strictly(model, ours, source)
    return model.eval()


def _condition(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the condition, by the tensors that it has."""
    if "condition.null_states" in ours or "condition.mlp.0.weight" in ours:
        length, text_width = ours["condition.null_states"].shape
        return {"condition": "text_prefix", "text_width": text_width, "text_positions": length, "own_null": True}
    return {"num_classes": len(ours["condition.table.weight"]) - 1}


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict of a released file, without the table of angles that some have."""
    content = load_torch_file(path)
    for name in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is no GPT of LlamaGen: it holds no state dict")
    return {key: value for key, value in content.items() if key != "freqs_cis"}
