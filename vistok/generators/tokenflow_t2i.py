"""TokenFlow's text-to-image generator: a Llama that reads a caption and continues it with the scales of an image.

Qu et al., "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation" (arXiv 2412.03069, section
3.4 and appendix); the layout is that of the released ``TokenFlow-t2i``.

    [caption, on the right of 128 positions | <img> | what the scales so far say of the next ... | nothing | </img>]
        -> Llama blocks, normalised behind the sublayers -> words and codes in one vocabulary, words first

A :class:`~vistok.generators.next_scale.NextScale` with the caption in front and the end of a text behind. Captions come
as word vectors (``text_encoder: {name: words}``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.config import Component
from vistok.errors import UserError, first_line
from vistok.files import load_weights
from vistok.generators.conditions import TextPrefix
from vistok.generators.losses import cross_entropy
from vistok.generators.next_scale import BaseConfig, NextScale
from vistok.generators.ranges import check_ranges
from vistok.interfaces import Condition, LossReport
from vistok.key_maps import KeyMap, KeyRule, layer_rules, load_strictly, published_folder, weight_files
from vistok.quantizers.residual_multiscale import Mode
from vistok.tokens import MultiScale, Tokens, TokenSpec

SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)
"""Sides of the released generator's scales: 256 px by a tokenizer that was made for 224 px."""
CODE_DIM, STRIDE_PX = 40, 16


@dataclass
class Config(BaseConfig):
    """Sizes and choices; the defaults are those of the release, on Llama-2-7B.

    Args:
        text_positions: of the caption, on the right of which it stands.
        opening: positions of the text ``<img>``.
        closing: word ids of ``</img>`` and the end of the text, which the model predicts behind the codes.
        text_vocabulary: words that the head tells apart beside the codes.
    """

    width: int = 4096
    depth: int = 32
    heads: int = 32
    mlp_hidden: int = 11008
    mode: Mode = "cascade"
    phi: int = 0
    norm_after: bool = True
    rotary: bool = True
    text_positions: int = 128
    opening: int = 3
    closing: list[int] = field(default_factory=lambda: [1533, 2492, 29958, 2])
    text_vocabulary: int = 32001


class TokenFlowT2I(NextScale):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and choices.
        spec: the tokens to model.
    """

    config: Config

    def __init__(self, config: Config, spec: TokenSpec) -> None:
        condition = TextPrefix(config.width, config.text_positions, config.opening)
        super().__init__(config, spec, condition, tail=len(config.closing), words=config.text_vocabulary)
        self.closing = nn.Embedding(len(config.closing) - 1, config.width)
        nn.init.normal_(self.closing.weight, std=0.02)

    @classmethod
    def from_published(cls, path_or_hub_id: str) -> TokenFlowT2I:
        """The released generator, in eval mode; it still has to :meth:`adopt` its tokenizer's codes.

        Args:
            path_or_hub_id: the folder of the release (``config.json``, the tokenizer's files, and the weights as
                safetensors), or its repository of the Hugging Face hub.

        Raises:
            UserError: naming the file, key or shape that is missing or does not fit.
        """
        return load_published(path_or_hub_id)

    def text_sequence(self, start: Float[Tensor, "B P D"], ids: Int[Tensor, "B N"]) -> Float[Tensor, "B M D"]:
        """Inputs of the blocks for a whole text: behind the codes a position of nothing, then ``</img>``."""
        behind = F.pad(self.closing.weight, (0, 0, 1, 0)) + self.levels.weight[0]
        x = self.sequence(start, ids[:, : -self.lengths[-1]])
        return torch.cat([x, behind.expand(len(x), -1, -1)], dim=1)

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy of the codes and of the words that end the text, among all words and codes.

        Raises:
            UserError: for the first scales alone, behind which no text ends.
        """
        if tokens.ids.shape[1] < self.spec.num_positions:
            raise UserError(f"tokenflow_t2i: a text ends behind all scales, got {tokens.ids.shape[1]} codes")
        if self.training:
            condition = self.condition.drop_some(condition, self.config.condition_dropout, rng)
        ids, words = tokens.ids[:, :, 0], self.config.text_vocabulary
        start, there, contexts = self.condition.prefix(condition, self.blocks)
        outputs = self.backbone(self.text_sequence(start, ids), there, contexts)[:, self.front :]
        closing = torch.tensor(self.config.closing, device=ids.device).expand(len(ids), -1)
        targets = torch.cat([words + ids, closing], dim=1)
        loss = cross_entropy(self.head(outputs), targets[:, :, None]).mean()
        return LossReport(loss, {"cross_entropy": loss}, tokens=tokens)


# ---------------------------------------------------------------------- the release


def _pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Channels of rotary positions: theirs turn i with i + head_dim / 2, ours are neighbours."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def published_keys(head_dim: int) -> KeyMap:
    """The parameters of the released layout, but for its word vectors (see :func:`from_state`)."""

    def rotary(turn: Any) -> Any:
        def both(qkv: Tensor) -> Tensor:
            q, k, v = qkv.chunk(3)
            return torch.cat([turn(q, head_dim), turn(k, head_dim), v])

        return both

    layer, block = "model.layers.{i}", "blocks.{i}"
    attention = f"{layer}.self_attn"
    pairs, halves = (lambda rows: _pairs(rows, head_dim)), (lambda rows: _halves(rows, head_dim))
    return KeyMap(
        "published TokenFlow-t2i",
        [
            KeyRule(
                f"{block}.attention.qkv.weight",
                tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
                rotary(_pairs),
                rotary(_halves),
            ),
            KeyRule(f"{block}.attention.out.weight", (f"{attention}.o_proj.weight",)),
            KeyRule(f"{block}.attention.q_norm.weight", (f"{attention}.qknorm.query_norm.weight",), pairs, halves),
            KeyRule(f"{block}.attention.k_norm.weight", (f"{attention}.qknorm.key_norm.weight",), pairs, halves),
            KeyRule(f"{block}.attention_norm.weight", (f"{layer}.input_layernorm.weight",)),
            KeyRule(f"{block}.mlp_norm.weight", (f"{layer}.post_attention_layernorm.weight",)),
            KeyRule(f"{block}.mlp.gate_up.weight", (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight")),
            KeyRule(f"{block}.mlp.down.weight", (f"{layer}.mlp.down_proj.weight",)),
            KeyRule("norm.weight", ("model.norm.weight",)),
            KeyRule("head.weight", ("lm_head.weight",)),
            KeyRule("positions.weight", ("model.pos_1LC",)),
            # Their row 1 is of the first scale, whose input is the text's (row 0).
            KeyRule(
                "levels.weight",
                ("model.lvl_embed.weight",),
                lambda rows: torch.cat([rows[:1], rows[2:]]),
                lambda rows: torch.cat([rows[:1], torch.zeros_like(rows[:1]), rows[1:]]),
            ),
            *layer_rules("embedding", "model.mm_projector", {"up": "0", "down": "2"}),
        ],
    )


def from_state(
    state: dict[str, Tensor], config: Config, spec: TokenSpec, opening: list[int], source: str
) -> TokenFlowT2I:
    """The model of a published state dict.

    Args:
        state: with ``model.embed_tokens.weight``, of which the vectors of ``opening`` and ``config.closing`` are taken.
        config: its sizes.
        spec: of its tokens.
        opening: word ids of ``<img>``.
        source: for messages.
    """
    words = state["model.embed_tokens.weight"]
    state = {key: value for key, value in state.items() if key != "model.embed_tokens.weight"}
    model = build(config, spec)
    ours = published_keys(config.width // config.heads).to_ours(state)
    ours |= {"condition.start.weight": words[opening], "closing.weight": words[config.closing[:-1]]}
    ours |= {f"codes.{key}": value for key, value in model.codes.state_dict().items()}
    load_strictly(model, ours, source)
    return model.eval()


def load_published(path_or_hub_id: str) -> TokenFlowT2I:
    """See :meth:`TokenFlowT2I.from_published`."""
    folder = published_folder(path_or_hub_id, "published TokenFlow-t2i")
    if missing := [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]:
        raise UserError(f"published TokenFlow-t2i: {folder} lacks {', '.join(missing)}")
    state = {
        key: value.float()
        for file in weight_files(folder)
        for key, value in load_weights(file).items()
        if not key.endswith(("image_token_start", "image_token_end", "inv_freq"))
    }
    sizes = json.loads((folder / "config.json").read_text())
    opening, closing, first_code = _words(folder)
    try:
        codes = len(state["lm_head.weight"]) - first_code
        positions, levels = len(state["model.pos_1LC"]), len(state["model.lvl_embed.weight"]) - 1
        config = Config(
            width=sizes["hidden_size"],
            depth=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            mlp_hidden=sizes["intermediate_size"],
            norm_eps=sizes["rms_norm_eps"],
            rope_base=sizes.get("rope_theta", 10000.0),
            opening=len(opening),
            closing=closing,
            text_vocabulary=first_code,
        )
    except KeyError as error:
        raise UserError(f"{folder}: {error.args[0]} is missing: this is no TokenFlow-t2i") from None
    layout = MultiScale(tuple((side, side) for side in SCALES))
    if (positions, levels) != (layout.num_positions, len(SCALES)):
        raise UserError(
            f"{folder} has {positions} positions of {levels} scales, "
            f"the release {layout.num_positions} of {len(SCALES)}"
        )
    spec = TokenSpec(layout, (codes,), CODE_DIM, STRIDE_PX * SCALES[-1])
    return from_state(state, config, spec, opening, path_or_hub_id)


def _words(folder: Path) -> tuple[list[int], list[int], int]:
    """Word ids of ``<img>``, of ``</img>`` with the end of the text, and the id of the first code."""
    from transformers import AutoTokenizer  # slow to import

    try:
        words: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        opening, closing = (words(tag, add_special_tokens=False).input_ids for tag in ("<img>", "</img>"))
        first_code = words.get_vocab()["<vq_token_0>"]
    except KeyError:
        raise UserError(f"{folder}: its tokenizer has no <vq_token_0>: this is no TokenFlow-t2i") from None
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from None
    return opening, [*closing, words.eos_token_id], first_code


from_published = TokenFlowT2I.from_published
PUBLISHED_TEXT_ENCODER = Component("words", {})  # of the release itself


def build(config: Config, spec: TokenSpec) -> TokenFlowT2I:
    """A generator with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    check_ranges("tokenflow_t2i", config, "mlp_hidden", "text_positions", "opening", "text_vocabulary", per_head=2)
    TokenFlowT2I.check(spec)
    if len(config.closing) < 2 or not all(0 <= word < config.text_vocabulary for word in config.closing):
        raise UserError(
            f"tokenflow_t2i: closing must be at least 2 word ids below {config.text_vocabulary}, got {config.closing}"
        )
    return TokenFlowT2I(config, spec)
