"""A GPT over image tokens: one LLaMA-style backbone, a token adapter, a condition.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (LlamaGen, arXiv 2406.06525);
with an :class:`~vistok.tokens.Ordered1D` layout it is the class-conditional generator of FlexTok (section 3.3 there).

    [condition, code 0, ..., code N-2] -> RMSNorm blocks with rotary positions -> N predictions

The backbone knows nothing about codes: an adapter turns them into positions and hidden states into predictions.
:class:`CodeAdapter` puts one code at each position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.checkpoint import KeyMap, KeyRule
from vistok.errors import UserError
from vistok.generators.sampling import Picker, picker
from vistok.interfaces import NULL_CLASS, Condition, Generator, LossReport, SampleOptions
from vistok.nn.attention import KVCache
from vistok.nn.rope import Rotation, rotation
from vistok.nn.transformer import Block
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Layout, MultiScale, Ordered1D, Tokens, TokenSpec


@dataclass
class Config:
    """Sizes and training choices; the defaults are LlamaGen's GPT-B.

    Args:
        width: channels.
        depth: blocks.
        heads: attention heads.
        num_classes: classes of the condition.
        class_dropout: share of samples trained without a class, for guidance.
        dropout: on embeddings and on the output of both sublayers.
        mlp_multiple: the hidden size of the MLP, 8/3 of the width, is rounded up to a multiple of this.
        rope_base: wavelength base of the rotary positions.
        zero_prefix_rotation: rotate the condition's queries and keys to zero, as LlamaGen's published weights expect;
            off, the condition is at the origin.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    num_classes: int = 1000
    class_dropout: float = 0.1
    dropout: float = 0.1
    mlp_multiple: int = 256
    rope_base: float = 10000.0
    zero_prefix_rotation: bool = False


class ClassEmbedding(nn.Module):
    """One prefix position for a class label; the last row of the table is the null class."""

    num_positions = 1

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition) -> Float[Tensor, "B 1 D"]:
        ids = condition.class_ids
        return self.table(torch.where(ids == NULL_CLASS, self.num_classes, ids))[:, None]

    def dropped(self, condition: Condition, drop: Tensor) -> Condition:
        """The condition with the rows of ``drop`` made null."""
        return type(condition)(torch.where(drop, NULL_CLASS, condition.class_ids))


class CodeAdapter(nn.Module):
    """One code at each position: an embedding in front of the backbone, a linear head behind it.

    Other adapters (fused windows, several slots) have the same five members and replace this one.
    """

    codes_per_position = 1

    def __init__(self, spec: TokenSpec, width: int) -> None:
        super().__init__()
        self.check(spec)
        self.num_positions = spec.num_positions
        self.embedding = nn.Embedding(spec.vocab_sizes[0], width)
        self.head = nn.Linear(width, spec.vocab_sizes[0], bias=False)
        self.coordinates = coordinates(spec.layout)

    @staticmethod
    def check(spec: TokenSpec) -> None:
        """Raise UserError when ``spec`` has another structure than one code at each position of a sequence or grid."""
        if spec.num_slots == 0:
            raise UserError("gpt models discrete codes; this tokenizer is continuous (quantize its latents first)")
        if spec.num_slots > 1:
            raise UserError(f"gpt predicts one code per position; this tokenizer has {spec.num_slots} slots")
        if isinstance(spec.layout, MultiScale):
            raise UserError("gpt predicts position after position; a multi-scale code needs a next-scale generator")

    def embed(self, ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n D"]:
        """Inputs of the backbone."""
        return self.embedding(ids[:, :, 0])

    def logits(self, hidden: Float[Tensor, "B n D"]) -> Float[Tensor, "B n V"]:
        """Predictions of the backbone's outputs."""
        return self.head(hidden)

    def loss(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n"]:
        """Cross-entropy of each code, nats, float32."""
        return F.cross_entropy(self.logits(hidden).float().transpose(1, 2), ids[:, :, 0], reduction="none")

    def sample(self, hidden: Float[Tensor, "B2 D"], uniform: Float[Tensor, "B 1 1"], pick: Picker) -> Tensor:
        """Codes ``(B, codes_per_position, S)`` of one position."""
        return pick(self.logits(hidden), uniform[:, 0, 0])[:, None, None]


def coordinates(layout: Layout) -> Float[Tensor, "N axes"]:
    """Rotary coordinates: the cell on a grid; in a sequence the condition stands at 0 and code n at n + 1."""
    if isinstance(layout, Grid2D):
        rows, columns = torch.meshgrid(torch.arange(layout.height), torch.arange(layout.width), indexing="ij")
        return torch.stack([rows, columns], dim=-1).flatten(0, 1).float()
    return torch.arange(1, layout.num_positions + 1)[:, None].float()


class GPT(Generator):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        spec: the tokens to model.
        adapter: how codes become positions and positions become codes.

    Raises:
        UserError: if the adapter cannot model ``spec`` or the sizes do not fit each other.
    """

    _cos: Tensor
    _sin: Tensor

    def __init__(self, config: Config, spec: TokenSpec, adapter: CodeAdapter) -> None:
        super().__init__()
        axes = adapter.coordinates.shape[1]
        _check_ranges(config)
        if config.width % config.heads or (config.width // config.heads) % (2 * axes):
            raise UserError(
                f"gpt: width {config.width} over {config.heads} heads must leave a multiple of {2 * axes} channels"
            )
        self.config, self.spec, self.num_classes = config, spec, config.num_classes
        self.condition = ClassEmbedding(config.num_classes, config.width)
        self.adapter = adapter
        self.dropout = nn.Dropout(config.dropout)
        multiple = config.mlp_multiple
        hidden = -(-int(2 * 4 * config.width / 3) // multiple) * multiple
        norm = partial(nn.RMSNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, hidden, norm, dropout=config.dropout) for _ in range(config.depth)
        )
        self.norm = norm(config.width)
        cos, sin = self._rotation_table()
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of std 0.02 and a zero head: the first loss is exactly the log of the vocabulary."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.adapter.head.weight)

    def _rotation_table(self) -> Rotation:
        """Angles of the condition positions, then of the codes."""
        config = self.config
        points = self.adapter.coordinates
        origin = points.new_zeros(self.condition.num_positions, points.shape[1])
        cos, sin = rotation(torch.cat([origin, points]), config.width // config.heads, config.rope_base)
        if config.zero_prefix_rotation:
            cos[: len(origin)] = 0
        return cos, sin

    @classmethod
    def check(cls, spec: TokenSpec) -> None:
        """One slot on a grid or in an ordered sequence."""
        CodeAdapter.check(spec)

    # ------------------------------------------------------------------ training

    def hidden(self, ids: Int[Tensor, "B n S"], condition: Condition) -> Float[Tensor, "B n+1 D"]:
        """Backbone outputs at the condition and at each code (teacher forcing, one causal pass)."""
        x = torch.cat([self.condition(condition), self.adapter.embed(ids)], dim=1)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, causal=True, rope=self._rope(0, x.shape[1]))
        return self.norm(x)

    def logits(self, ids: Int[Tensor, "B N S"], condition: Condition) -> Float[Tensor, "B N V"]:
        """Row n predicts code n from the condition and the codes before it."""
        return self.adapter.logits(self.hidden(ids[:, :-1], condition))

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy, nats per code; in training mode some rows lose their class."""
        if self.training:
            drop = torch.rand(len(tokens), generator=rng, device=rng.device) < self.config.class_dropout
            condition = self.condition.dropped(condition, drop.to(tokens.ids.device))
        per_code = self.adapter.loss(self.hidden(tokens.ids[:, :-1], condition), tokens.ids)
        loss = per_code.mean()
        return LossReport(loss, {"cross_entropy": loss}, tokens=tokens)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        options: SampleOptions,
        rng: SampleRng,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Code after code; guidance runs both branches as one batch.

        Raises:
            UserError: for a class outside the range, or a prefix of a layout that has none.
        """
        self.check_condition(condition)
        device = self._cos.device
        count = self._num_codes(options.num_tokens)
        per_position = self.adapter.codes_per_position
        both = condition.to(device)
        if options.cfg_scale != 1:
            both = both.join(both.null())
        uniform = rng.uniform(count, self.spec.num_slots).to(device)
        ids = torch.zeros(len(condition), count, self.spec.num_slots, dtype=torch.int64, device=device)
        step = self._cached_step(both, count) if options.use_cache else self._uncached_step(both)
        for start in range(0, count, per_position):
            codes = slice(start, start + per_position)
            ids[:, codes] = self.adapter.sample(step(ids[:, :start]), uniform[:, codes], picker(options, start))
            if progress is not None:
                progress(per_position)
        return Tokens(ids, self.spec)

    def _num_codes(self, num_tokens: int | None) -> int:
        total = self.spec.num_positions
        if num_tokens is None:
            return total
        if not isinstance(self.spec.layout, Ordered1D) and num_tokens != total:
            raise UserError(f"only ordered codes have prefixes: {self.spec.layout} needs all {total} tokens")
        if not 1 <= num_tokens <= total:
            raise UserError(f"num_tokens must lie in 1..{total}, got {num_tokens}")
        return num_tokens

    def _cached_step(self, condition: Condition, count: int) -> Callable[[Tensor], Tensor]:
        """Step function that feeds only what is new since the last call."""
        prefix = self.condition(condition)
        cache = KVCache(len(self.blocks), capacity=prefix.shape[1] + count)

        def step(ids: Int[Tensor, "B n S"]) -> Float[Tensor, "B2 D"]:
            if cache.length == 0:
                x = prefix
            else:
                x = self._repeat(self.adapter.embed(ids[:, -self.adapter.codes_per_position :]), len(prefix))
            rope = self._rope(cache.length, x.shape[1])
            for index, block in enumerate(self.blocks):
                x = block(x, causal=x.shape[1] > 1, rope=rope, cache=(cache, index))
            cache.advance(x.shape[1])
            return self.norm(x[:, -1])

        return step

    def _uncached_step(self, condition: Condition) -> Callable[[Tensor], Tensor]:
        """Step function that runs the whole prefix again: the definition that the cache must match."""
        return lambda ids: self.hidden(self._repeat(ids, len(condition)), condition)[:, -1]

    @staticmethod
    def _repeat(x: Tensor, rows: int) -> Tensor:
        """The sampled rows once for each guidance branch."""
        return x if len(x) == rows else torch.cat([x, x])

    def _rope(self, start: int, count: int) -> Rotation:
        return self._cos[start : start + count], self._sin[start : start + count]


def _check_ranges(config: Config) -> None:
    """Raise UserError for a number that no model can have."""
    for name in ("width", "depth", "heads", "num_classes", "mlp_multiple"):
        if getattr(config, name) < (0 if name == "num_classes" else 1):
            raise UserError(f"gpt: {name} is {getattr(config, name)}, which is too small")
    for name in ("dropout", "class_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"gpt: {name} must lie in [0, 1], got {getattr(config, name)}")


LLAMAGEN_KEYS = KeyMap(
    "LlamaGen class-conditional GPT",
    [
        KeyRule("condition.table.weight", ("cls_embedding.embedding_table.weight",)),
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


def build(config: Config, spec: TokenSpec) -> GPT:
    """A GPT with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    return GPT(config, spec, CodeAdapter(spec, config.width))
