"""A GPT over image tokens: one LLaMA-style backbone, a token adapter, a condition.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (LlamaGen, arXiv 2406.06525);
of classes or, with ``condition: text_prefix``, of texts; with ``class_start`` or ``text_cross`` and ``positions:
learned`` it is the generator of FlexTok (arXiv 2502.13967, section 3.3): width ``64 * depth``, heads of 64 channels.

    [condition, code 0, ..., code N-2] -> RMSNorm blocks -> N predictions

The backbone knows nothing about codes: an adapter turns them into positions and hidden states into predictions, see
:mod:`~vistok.generators.adapters`. Nor does it know classes or texts, see :mod:`~vistok.generators.conditions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vistok.config import Component
from vistok.errors import UserError
from vistok.generators.adapters import Adapter, make_adapter
from vistok.generators.conditions import ConditionConfig, Entry, TextCross, make_condition
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.losses import cross_entropy, z_loss
from vistok.generators.ranges import check_ranges
from vistok.generators.sampling import Sampler, Schedule, num_positions
from vistok.generators.token_shuffle import Config as ShuffleConfig
from vistok.interfaces import Condition, Generator, LossReport, SampleOptions
from vistok.nn.attention import Context, KVCache, ordered_mask
from vistok.nn.compiler import check_compiler
from vistok.nn.packed import packed_linears
from vistok.nn.rope import Rotation, coordinates, rotation
from vistok.nn.transformer import Block, attention_flops, matrix_flops
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, Tokens, TokenSpec


@dataclass
class Config(ConditionConfig):
    """Sizes and training choices; the defaults are LlamaGen's GPT-B.

    Args:
        width: channels.
        depth: blocks.
        heads: attention heads.
        positions: ``rope``, rotary in every block; or ``learned``, a table added to the inputs.
        condition_dropout: share of samples trained with the null class or the empty text, for guidance.
        dropout: on embeddings and on the output of every sublayer.
        order: ``random`` trains on the positions of each sample in an order of its own for half of the run, on ever
            fewer such samples up to three quarters, and in raster order from there on (RAR, Yu et al., arXiv
            2411.00776, so that what stands on the right and below is learned from as well). A table tells every input
            which position it is to predict. Samples are drawn in raster order.
        z_loss: weight of :func:`~vistok.generators.losses.z_loss`.
        mlp_multiple: the hidden size of the MLP, 8/3 of the width, is rounded up to a multiple of this.
        rope_base: wavelength base of the rotary positions.
        zero_prefix_rotation: of ``rope``, rotate the condition's queries and keys to zero, as LlamaGen's published
            weights expect; off, the condition leads up to the origin.
        head: for tokens of several slots, see :mod:`~vistok.generators.dimensionwise_head`.
        shuffle: windows of a grid that share a position, see :mod:`~vistok.generators.token_shuffle`.
        guidance_schedule: of the sampling unless told otherwise, see :data:`~vistok.generators.sampling.SCHEDULES`.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: Literal["rope", "learned"] = "rope"
    condition_dropout: float = 0.1
    dropout: float = 0.1
    order: Literal["raster", "random"] = "raster"
    z_loss: float = 0.0
    mlp_multiple: int = 256
    rope_base: float = 10000.0
    zero_prefix_rotation: bool = False
    head: HeadConfig = field(default_factory=HeadConfig)
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    guidance_schedule: Schedule = "constant"


class GPT(Generator):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        spec: the tokens to model.
        adapter: how codes become positions and positions become codes.
        condition: what stands before the codes and what the blocks look at.
    """

    steps_are_alike = True

    _cos: Tensor
    _sin: Tensor
    _random_share: Tensor

    def __init__(self, config: Config, spec: TokenSpec, adapter: Adapter, condition: Entry) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.num_classes, self.text_width = condition.num_classes, condition.text_width
        self.text_positions = condition.text_positions
        self.condition, self.adapter = condition, adapter
        self.dropout = nn.Dropout(config.dropout)
        multiple = config.mlp_multiple
        hidden = -(-int(2 * 4 * config.width / 3) // multiple) * multiple
        norm = partial(nn.RMSNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                hidden,
                norm,
                dropout=config.dropout,
                cross=isinstance(condition, TextCross),
            )
            for _ in range(config.depth)
        )
        self.norm = norm(config.width)
        if config.positions == "rope":
            cos, sin = self._rotation_table()
            self.register_buffer("_cos", cos, persistent=False)
            self.register_buffer("_sin", sin, persistent=False)
        else:  # in raster order the last code is never an input
            inputs = condition.num_positions + adapter.num_positions - (config.order == "raster")
            self.positions = nn.Embedding(inputs, config.width)
        if config.order == "random":
            self.targets = nn.Embedding(adapter.num_positions, config.width)
            self.register_buffer("_random_share", torch.ones(()), persistent=False)
        self.reset_parameters()

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> GPT:
        """A released GPT of LlamaGen, of classes (B, L, XL, XXL, 3B) or texts (XL), in eval mode.

        Args:
            path_or_hub_id: such as ``c2i_L_384.pt`` or ``t2i_XL_stage1_256.pt``, or where the Hugging Face hub has it:
                ``OWNER/REPOSITORY/FILE``.
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
        config, points = self.config, self.adapter.coordinates
        # The condition leads up to the origin along the diagonal. A text whose words all stood at the origin would be a
        # set: only the order of the causal mask would be left of theirs.
        before = torch.arange(1 - self.condition.num_positions, 1)[:, None].expand(-1, points.shape[1])
        cos, sin = rotation(torch.cat([before, points]), config.width // config.heads, config.rope_base)
        if config.zero_prefix_rotation:
            cos[: len(before)] = sin[: len(before)] = 0
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

    @property
    def train_flops(self) -> float:
        """Without what reads a text alone: how much that is depends on the text."""
        positions, config = self.condition.num_positions + self.adapter.num_positions - 1, self.config
        matrices = matrix_flops(positions, self.blocks)
        if isinstance(self.condition, TextCross):
            matrices -= matrix_flops(positions, *(cast(Block, block).cross_attention.kv for block in self.blocks))
        return matrices + attention_flops(positions, config.width, config.depth) + self.adapter.train_flops

    def hidden(
        self, ids: Int[Tensor, "B n S"], condition: Condition, order: Int[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B n+1 D"]:
        """Backbone outputs at the end of the condition and at each code (teacher forcing, one causal pass)."""
        start, there, contexts = self.condition.prefix(condition, self.blocks)
        x = torch.cat([start, self.adapter.embed(ids)], dim=1)
        return self._backbone(x, there, contexts, order=order)[:, start.shape[1] - 1 :]

    def _backbone(
        self,
        x: Float[Tensor, "B n D"],
        there: Bool[Tensor, "B P"] | None,
        contexts: list[Context | None],
        cache: KVCache | None = None,
        order: Int[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Inputs -> normalised outputs of all positions from the start or, with a cache, of those after the past."""
        count, rope, mask = x.shape[1], None, None
        here = slice(0, count) if cache is None else cache.place(count)
        if there is not None or isinstance(here, Tensor):
            total = here.stop if isinstance(here, slice) else cast(KVCache, cache).capacity
            there = there if there is None else there[: len(x)]
            mask = ordered_mask(torch.arange(total, device=x.device), here, there)
        place, ahead = (here, here) if order is None else self._places(order)
        if self.config.positions == "rope":
            rope = self._cos[place], self._sin[place]
        else:
            x = x + self.positions.weight[place]
        if self.config.order == "random":
            x = x + F.pad(self.targets.weight, (0, 0, self.condition.num_positions - 1, 0))[ahead]
        x = self.dropout(x)
        for index, (block, context) in enumerate(zip(self.blocks, contexts)):
            past = None if cache is None else (cache, index)
            x = block(x, mask, causal=mask is None and count > 1, rope=rope, cache=past, context=context)
        return self.norm(x)

    def _places(self, order: Int[Tensor, "B N"]) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B n"]]:
        """Where each input would stand in raster order, and where the one would that sees what it shall predict."""
        first = torch.arange(self.condition.num_positions, device=order.device).expand(len(order), -1)
        codes = first.shape[1] + order
        return torch.cat([first, codes[:, :-1]], dim=1), torch.cat([first[:, :-1], codes - 1], dim=1)

    def logits(
        self, ids: Int[Tensor, "B N S"], condition: Condition, order: Int[Tensor, "B N"] | None = None
    ) -> Tensor:
        """Row n ``(V)`` predicts code n from the condition and the codes before it; of several slots ``(S, V)``.

        Args:
            ids: in the order of the backbone (``adapter.arrange``), or in that of ``order``.
            condition: one row for each sample.
            order: numbers of the positions of each sample, for a model that was trained so; None is raster order.
        """
        return self.adapter.logits(self.hidden(self._past(ids), condition, order), ids)

    def at_progress(self, share: float) -> None:
        """Anneal the share of samples in random order, see :class:`Config`."""
        if self.config.order == "random":
            self._random_share.fill_(min(max(3 - 4 * share, 0.0), 1.0))

    def _draw_order(self, count: int, positions: int, rng: torch.Generator) -> Int[Tensor, "B n"]:
        shuffled = torch.rand(count, positions, generator=rng, device=rng.device).argsort(dim=1)
        is_random = torch.rand(count, 1, generator=rng, device=rng.device) < self._random_share
        return torch.where(is_random, shuffled, torch.arange(positions, device=rng.device))

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy, nats per code; in training mode some rows lose their condition, and ``z_loss`` counts."""
        if self.training:
            condition = self.condition.drop_some(condition, self.config.condition_dropout, rng)
        ids, order = self.adapter.arrange(tokens.ids), None
        if self.training and self.config.order == "random":
            windows = ids.unflatten(1, (-1, self.adapter.codes_per_position))
            order = self._draw_order(len(ids), windows.shape[1], rng)
            ids = windows[torch.arange(len(ids), device=ids.device)[:, None], order].flatten(1, 2)
        logits = self.logits(ids, condition, order)
        loss = cross_entropy(logits, ids).mean()
        report = LossReport(loss, {"cross_entropy": loss}, tokens=tokens)
        if self.training and self.config.z_loss:
            return report.plus("z_loss", self.config.z_loss * z_loss(logits))
        return report

    def _past(self, ids: Int[Tensor, "B N S"]) -> Int[Tensor, "B n S"]:
        """What predictions of ``ids`` are made from: all but the codes of the last position."""
        return ids[:, : -self.adapter.codes_per_position]

    # ------------------------------------------------------------------ sampling

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """How guidance grows over the codes."""
        return Sampler.defaults(self.config.guidance_schedule)

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        options: SampleOptions,
        rng: SampleRng,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Code after code; guidance runs both branches as one batch, which loses the null rows once it is over.

        Raises:
            UserError: for a condition that is not of this model, or a prefix of a layout that has none.
        """
        self.check_condition(condition)
        device, batch = self.norm.weight.device, len(condition)
        count = num_positions(self.spec, options.num_tokens)
        sampler = Sampler(options, self.sample_settings(options))
        if options.compile:
            check_compiler("compile", device.type)
        per_position = self.adapter.codes_per_position
        both = condition.to(device)
        if sampler.will_guide(0):
            both = both.join(self.condition.null(both))
        uniform = rng.uniform(count, self.spec.num_slots).to(device)
        ids = torch.zeros(batch, count, self.spec.num_slots, dtype=torch.int64, device=device)
        with packed_linears(self, not options.compile):
            cached = options.use_cache
            step = self._cached_step(both, count, options.compile) if cached else self._uncached_step(both)
            for start in range(0, count, per_position):
                codes, known = slice(start, start + per_position), start / self.spec.num_positions
                branches = 2 if sampler.will_guide(known) else 1
                hidden = step(ids[:, :start].repeat(branches, 1, 1))
                ids[:, codes] = self.adapter.sample(hidden, uniform[:, codes], sampler.at(known))
                if progress is not None:
                    progress(per_position)
        return Tokens(self.adapter.restore(ids), self.spec)

    def _cached_step(self, condition: Condition, count: int, compiled: bool) -> Callable[[Tensor], Tensor]:
        """Step function that feeds only what is new since the last call; the batch may shrink to its first rows."""
        start, there, contexts = self.condition.prefix(condition, self.blocks)
        cache = KVCache(len(self.blocks), capacity=start.shape[1] + count // self.adapter.codes_per_position)
        run = self._backbone

        def step(ids: Int[Tensor, "B2 n S"]) -> Float[Tensor, "B2 D"]:
            nonlocal cache, run
            x = self.adapter.embed(ids[:, -self.adapter.codes_per_position :]) if ids.shape[1] else start
            hidden = run(x, there, contexts, cache)[:, -1]
            cache.advance(x.shape[1])
            if compiled and run == self._backbone:
                # The condition is of another shape than all steps behind it.
                mode = "reduce-overhead" if x.device.type == "cuda" else None
                run, cache = torch.compile(run, fullgraph=True, dynamic=False, mode=mode), cache.fixed()
            return hidden

        return step

    def _uncached_step(self, condition: Condition) -> Callable[[Tensor], Tensor]:
        """Step function that runs the whole prefix again: the definition that the cache must match."""
        return lambda ids: self.hidden(ids, condition[: len(ids)])[:, -1]


from_published = GPT.from_published
PUBLISHED_TEXT_ENCODER = Component("t5", {"path": "google/flan-t5-xl", "lower": True})


def build(config: Config, spec: TokenSpec) -> GPT:
    """A GPT with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    GPT.check(spec)
    is_rotary = config.positions == "rope"
    per_head = 2 * coordinates(spec.layout).shape[1] if is_rotary else 1
    check_ranges("gpt", config, "mlp_multiple", per_head=per_head)
    for name, value in (("z_loss", config.z_loss), ("shuffle.blocks", config.shuffle.blocks)):
        if value < 0:
            raise UserError(f"gpt: {name} must be at least 0, got {value}")
    if config.zero_prefix_rotation and not is_rotary:
        raise UserError("gpt: zero_prefix_rotation is of positions=rope, learned positions have no rotation")
    adapter = make_adapter(spec, config.width, config.head, config.shuffle)
    return GPT(config, spec, adapter, make_condition(config, config.width, config.heads))
