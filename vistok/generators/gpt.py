"""A GPT over image tokens: one LLaMA-style backbone, a token adapter, a condition.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (LlamaGen, arXiv 2406.06525);
with ``condition: class_start`` or ``text_cross`` and ``positions: learned`` it is the generator of FlexTok (arXiv
2502.13967, section 3.3): width ``64 * depth``, heads of 64 channels.

    [condition, code 0, ..., code N-2] -> RMSNorm blocks -> N predictions

The backbone knows nothing about codes: an adapter turns them into positions and hidden states into predictions.
:class:`CodeAdapter` puts one code at each position, :class:`~vistok.generators.token_shuffle.TokenShuffle` a window of
codes; codes of several slots go through :class:`~vistok.generators.dimensionwise_head.DimensionwiseHead`. Nor does it
know classes or texts, see :mod:`~vistok.generators.conditions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.generators.conditions import ClassPrefix, ClassStart, Kind, States, TextCross, drop_some, make_condition
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.sampling import Picker, Schedule, num_positions, scheduled
from vistok.generators.token_shuffle import Config as ShuffleConfig
from vistok.generators.token_shuffle import TokenShuffle
from vistok.interfaces import Condition, Generator, LossReport, SampleOptions
from vistok.nn.attention import Context, KVCache
from vistok.nn.rope import Rotation, coordinates, rotation
from vistok.nn.transformer import Block
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, Tokens, TokenSpec


@dataclass
class Config:
    """Sizes and training choices; the defaults are LlamaGen's GPT-B.

    Args:
        width: channels.
        depth: blocks.
        heads: attention heads.
        condition: how class or text enter, see :mod:`~vistok.generators.conditions`.
        positions: ``rope``, rotary in every block; or ``learned``, a table added to the inputs.
        num_classes: classes of a class condition.
        text_width: channels of the text encoder's states, for a text condition (2048: FLAN-T5-XL).
        condition_dropout: share of samples trained with the null class or the empty text, for guidance.
        dropout: on embeddings and on the output of both sublayers.
        mlp_multiple: the hidden size of the MLP, 8/3 of the width, is rounded up to a multiple of this.
        rope_base: wavelength base of the rotary positions.
        zero_prefix_rotation: rotate the condition's queries and keys to zero, as LlamaGen's published weights expect;
            off, the condition is at the origin.
        head: for tokens of several slots, see :mod:`~vistok.generators.dimensionwise_head`.
        shuffle: windows of a grid that share a position, see :mod:`~vistok.generators.token_shuffle`.
        guidance_schedule: of the sampling unless told otherwise, see :data:`~vistok.generators.sampling.SCHEDULES`.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    condition: Kind = "class_prefix"
    positions: Literal["rope", "learned"] = "rope"
    num_classes: int = 1000
    text_width: int = 2048
    condition_dropout: float = 0.1
    dropout: float = 0.1
    mlp_multiple: int = 256
    rope_base: float = 10000.0
    zero_prefix_rotation: bool = False
    head: HeadConfig = field(default_factory=HeadConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    guidance_schedule: Schedule = "constant"


class CodeAdapter(nn.Module):
    """One code at each position: an embedding in front of the backbone, a linear head behind it.

    Other adapters (several slots, fused windows) have the same members and replace this one.
    """

    codes_per_position = 1

    def __init__(self, spec: TokenSpec, width: int) -> None:
        super().__init__()
        self.num_positions = spec.num_positions
        self.embedding = nn.Embedding(spec.vocab_sizes[0], width)
        self.head = nn.Linear(width, spec.vocab_sizes[0], bias=False)
        self.coordinates = coordinates(spec.layout)

    def reset_parameters(self) -> None:
        """A zero head: the first loss is exactly the log of the vocabulary."""
        nn.init.zeros_(self.head.weight)

    def arrange(self, ids: Int[Tensor, "B N 1"]) -> Int[Tensor, "B N 1"]:
        """Codes in the order of the layout -> in that of the backbone."""
        return ids

    def restore(self, ids: Int[Tensor, "B n 1"]) -> Int[Tensor, "B n 1"]:
        """Inverse of :meth:`arrange`."""
        return ids

    def embed(self, ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n D"]:
        """Inputs of the backbone."""
        return self.embedding(ids[:, :, 0])

    def logits(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n V"]:
        """Predictions of ``ids`` from the backbone's outputs (alone: no other code stands at their positions)."""
        return self.head(hidden)

    def loss(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B n 1"]) -> Float[Tensor, "B n 1"]:
        """Cross-entropy of each code, nats, float32."""
        logits = self.logits(hidden, ids).float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, :, 0], reduction="none")[:, :, None]

    def sample(self, hidden: Float[Tensor, "B2 D"], uniform: Float[Tensor, "B 1 1"], pick: Picker) -> Tensor:
        """Codes ``(B, codes_per_position, S)`` of one position."""
        return pick(self.head(hidden), uniform[:, 0, 0])[:, None, None]


Adapter = CodeAdapter | DimensionwiseHead | TokenShuffle


def make_adapter(spec: TokenSpec, width: int, head: HeadConfig, shuffle: ShuffleConfig | None = None) -> Adapter:
    """The adapter that the slots of ``spec`` call for, or the windows of ``shuffle``.

    Raises:
        UserError: as the adapters.
    """
    if shuffle is not None and shuffle.window != 1:
        return TokenShuffle(spec, width, shuffle)
    return CodeAdapter(spec, width) if spec.num_slots == 1 else DimensionwiseHead(spec, width, head)


class GPT(Generator):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        spec: the tokens to model.
        adapter: how codes become positions and positions become codes.
        condition: what stands before the codes and what the blocks look at.

    Raises:
        UserError: if the sizes do not fit each other.
    """

    _cos: Tensor
    _sin: Tensor

    def __init__(
        self, config: Config, spec: TokenSpec, adapter: Adapter, condition: ClassPrefix | ClassStart | TextCross
    ) -> None:
        super().__init__()
        even = 2 * adapter.coordinates.shape[1] if config.positions == "rope" else 1
        if config.width % config.heads or (config.width // config.heads) % even:
            raise UserError(
                f"gpt: width {config.width} over {config.heads} heads must leave a multiple of {even} channels"
            )
        self.config, self.spec = config, spec
        self.num_classes, self.text_width = condition.num_classes, condition.text_width
        self.condition, self.adapter = condition, adapter
        self.dropout = nn.Dropout(config.dropout)
        multiple = config.mlp_multiple
        hidden = -(-int(2 * 4 * config.width / 3) // multiple) * multiple
        norm = partial(nn.RMSNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, hidden, norm, dropout=config.dropout, cross=condition.text_width > 0)
            for _ in range(config.depth)
        )
        self.norm = norm(config.width)
        if config.positions == "rope":
            cos, sin = self._rotation_table()
            self.register_buffer("_cos", cos, persistent=False)
            self.register_buffer("_sin", sin, persistent=False)
        else:  # the last code is never an input
            self.positions = nn.Embedding(condition.num_positions + adapter.num_positions - 1, config.width)
        self.reset_parameters()

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> GPT:
        """A released class-conditional GPT of LlamaGen (B, L, XL, XXL, 3B), in eval mode.

        Args:
            path_or_hub_id: such as ``c2i_L_384.pt``, or where the Hugging Face hub has it: ``OWNER/REPOSITORY/FILE``.
            image_size: side of the images, px, which the weights do not tell; by default what the file's name says.

        Raises:
            UserError: naming the file, key, shape or size that is missing or does not fit.
        """
        from vistok.generators.gpt_published import load_published

        return load_published(path_or_hub_id, image_size)

    def reset_parameters(self) -> None:
        """Normal weights of std 0.02; the adapter's are its own affair."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.adapter.reset_parameters()

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
        """Discrete codes, one or several at each position of a grid or an ordered sequence."""
        if spec.num_slots == 0:
            raise UserError("gpt models discrete codes; this tokenizer is continuous (quantize its latents first)")
        if isinstance(spec.layout, MultiScale):
            raise UserError("gpt predicts position after position; a multi-scale code needs a next-scale generator")
        if spec.num_slots > 1:
            DimensionwiseHead.check(spec)

    # ------------------------------------------------------------------ training

    def hidden(self, ids: Int[Tensor, "B n S"], condition: Condition) -> Float[Tensor, "B n+1 D"]:
        """Backbone outputs at the condition and at each code (teacher forcing, one causal pass)."""
        start, states = self.condition(condition)
        return self._backbone(torch.cat([start, self.adapter.embed(ids)], dim=1), self._contexts(states))

    def _contexts(self, states: States | None) -> list[Context | None]:
        """What each block's cross-attention looks at."""
        blocks = cast(list[Block], self.blocks)
        return [None if states is None else block.cross_attention.context(*states) for block in blocks]

    def _backbone(
        self, x: Float[Tensor, "B n D"], contexts: list[Context | None], cache: KVCache | None = None
    ) -> Float[Tensor, "B n D"]:
        """Inputs -> normalised outputs of all positions from the start or, with a cache, of those after the past."""
        past, rope = 0 if cache is None else cache.length, None
        here = slice(past, past + x.shape[1])
        if self.config.positions == "rope":
            rope = self._cos[here], self._sin[here]
        else:
            x = x + self.positions.weight[here]
        x = self.dropout(x)
        for index, (block, context) in enumerate(zip(self.blocks, contexts)):
            place = None if cache is None else (cache, index)
            x = block(x, causal=x.shape[1] > 1, rope=rope, cache=place, context=context)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def logits(self, ids: Int[Tensor, "B N S"], condition: Condition) -> Tensor:
        """Row n ``(V)`` predicts code n from the condition and the codes before it; of several slots ``(S, V)``.

        Codes are in the order of the backbone, see :meth:`CodeAdapter.arrange`.
        """
        return self.adapter.logits(self.hidden(self._past(ids), condition), ids)

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy, nats per code; in training mode some rows lose their condition."""
        if self.training:
            condition = drop_some(condition, self.config.condition_dropout, rng)
        ids = self.adapter.arrange(tokens.ids)
        per_code = self.adapter.loss(self.hidden(self._past(ids), condition), ids)
        loss = per_code.mean()
        return LossReport(loss, {"cross_entropy": loss}, tokens=tokens)

    def _past(self, ids: Int[Tensor, "B N S"]) -> Int[Tensor, "B n S"]:
        """What predictions of ``ids`` are made from: all but the codes of the last position."""
        return ids[:, : -self.adapter.codes_per_position]

    # ------------------------------------------------------------------ sampling

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """How guidance grows over the codes."""
        return {"guidance_schedule": self.config.guidance_schedule}

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
            UserError: for a condition that is not of this model, or a prefix of a layout that has none.
        """
        self.check_condition(condition)
        device = self.norm.weight.device
        count = num_positions(self.spec, options.num_tokens)
        schedule = self.sample_settings(options)["guidance_schedule"]
        per_position = self.adapter.codes_per_position
        both = condition.to(device)
        if options.cfg_scale != 1:
            both = both.join(both.null())
        uniform = rng.uniform(count, self.spec.num_slots).to(device)
        ids = torch.zeros(len(condition), count, self.spec.num_slots, dtype=torch.int64, device=device)
        step = self._cached_step(both, count) if options.use_cache else self._uncached_step(both)
        for start in range(0, count, per_position):
            codes = slice(start, start + per_position)
            scale = scheduled(schedule, options.scale_at(start), start / self.spec.num_positions)
            pick = Picker(options, scale)
            ids[:, codes] = self.adapter.sample(step(ids[:, :start]), uniform[:, codes], pick)
            if progress is not None:
                progress(per_position)
        return Tokens(self.adapter.restore(ids), self.spec)

    def _cached_step(self, condition: Condition, count: int) -> Callable[[Tensor], Tensor]:
        """Step function that feeds only what is new since the last call."""
        start, states = self.condition(condition)
        contexts = self._contexts(states)
        cache = KVCache(len(self.blocks), capacity=start.shape[1] + count // self.adapter.codes_per_position)

        def step(ids: Int[Tensor, "B n S"]) -> Float[Tensor, "B2 D"]:
            x = start
            if cache.length:
                x = self._repeat(self.adapter.embed(ids[:, -self.adapter.codes_per_position :]), len(start))
            return self._backbone(x, contexts, cache)[:, -1]

        return step

    def _uncached_step(self, condition: Condition) -> Callable[[Tensor], Tensor]:
        """Step function that runs the whole prefix again: the definition that the cache must match."""
        return lambda ids: self.hidden(self._repeat(ids, len(condition)), condition)[:, -1]

    @staticmethod
    def _repeat(x: Tensor, rows: int) -> Tensor:
        """The sampled rows once for each guidance branch."""
        return x if len(x) == rows else torch.cat([x, x])


def _check_ranges(config: Config) -> None:
    """Raise UserError for a number that no model can have."""
    for name in ("width", "depth", "heads", "num_classes", "text_width", "mlp_multiple"):
        if getattr(config, name) < (0 if name == "num_classes" else 1):
            raise UserError(f"gpt: {name} is {getattr(config, name)}, which is too small")
    for name in ("dropout", "condition_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"gpt: {name} must lie in [0, 1], got {getattr(config, name)}")


from_published = GPT.from_published


def build(config: Config, spec: TokenSpec) -> GPT:
    """A GPT with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    _check_ranges(config)
    GPT.check(spec)
    adapter = make_adapter(spec, config.width, config.head, config.shuffle)
    condition = make_condition(config.condition, config.width, config.num_classes, config.text_width)
    return GPT(config, spec, adapter, condition)
