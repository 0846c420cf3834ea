"""A whole scale at a time: a transformer over the codes of a multi-scale tokenizer.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (VAR, arXiv
2404.02905); the refinement is that of Qu et al., "TokenFlow" (arXiv 2412.03069).

    [condition, ..., its last position | what scale 1 says of scale 2 | what scales 1, 2 say of scale 3 | ...]
        -> RMSNorm blocks, each position sees its own scale and all before -> every code of every scale at once

The inputs of a scale are no embedded codes but what the codes of the coarser scales add up to, at its own size: the
generator owns a frozen copy of the tokenizer's :class:`~vistok.quantizers.residual_multiscale.ScaleCodes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.generators.conditions import ConditionConfig, Entry, TextCross, make_condition
from vistok.generators.losses import cross_entropy
from vistok.generators.ranges import check_ranges
from vistok.generators.sampling import Picker, Sampler, Schedule, num_positions
from vistok.interfaces import Condition, Generator, LossReport, SampleOptions, Tokenizer
from vistok.key_maps import load_strictly
from vistok.nn.attention import Context, KVCache, ordered_mask
from vistok.nn.packed import packed_linears
from vistok.nn.rope import rotation
from vistok.nn.transformer import MLP, Block
from vistok.quantizers.residual_multiscale import Mode, ScaleCodes
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, Tokens, TokenSpec


@dataclass
class BaseConfig:
    """What every generator of scales has; the defaults are of the size of VAR-d16.

    Args:
        width: channels.
        depth: blocks.
        heads: attention heads.
        mlp_hidden: hidden channels of the SwiGLU.
        condition_dropout: share of samples trained with the null class or the empty text, for guidance.
        dropout: on embeddings and on the output of every sublayer.
        mode: what the inputs of a scale are, see :data:`~vistok.quantizers.residual_multiscale.Mode`.
        phi: convolutions of the tokenizer that refine an upsampled scale.
        phi_ratio: share of the convolution in what it refines.
        qk_norm: normalise queries and keys.
        norm_after: normalise what the sublayers return, not what they read.
        norm_eps: of all other norms.
        rotary: rotary positions along the sequence, beside the learned ones.
        rope_base: their wavelength base.
        guidance_schedule: of the sampling unless told otherwise; ``linear`` raises the guidance scale from 1 at the
            first scale to the one asked for at the last.
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    mlp_hidden: int = 2816
    condition_dropout: float = 0.1
    dropout: float = 0.0
    mode: Mode = "residual"
    phi: int = 4
    phi_ratio: float = 0.5
    qk_norm: bool = True
    norm_after: bool = False
    norm_eps: float = 1e-5
    rotary: bool = False
    rope_base: float = 10000.0
    guidance_schedule: Schedule = "linear"


@dataclass
class Config(BaseConfig, ConditionConfig):
    """Sizes, and the condition."""


class NextScale(Generator):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and choices.
        spec: the tokens to model.
        condition: what stands before the codes and what the blocks look at.
        tail: positions behind the codes, each of which sees all before it.
        words: what the head tells apart before the codes.
    """

    _step: Tensor
    _cos: Tensor
    _sin: Tensor

    def __init__(
        self,
        config: BaseConfig,
        spec: TokenSpec,
        condition: Entry,
        tail: int = 0,
        words: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.num_classes, self.text_width = condition.num_classes, condition.text_width
        self.text_positions = condition.text_positions
        self.condition = condition
        layout = cast(MultiScale, spec.layout)
        self.lengths, self.front = layout.lengths, condition.num_positions - 1
        width, head_dim = config.width, config.width // config.heads
        self.codes = ScaleCodes(
            spec.vocab_sizes[0], spec.latent_dim, layout.sizes, config.phi, config.mode, config.phi_ratio
        )
        nn.init.normal_(self.codes.codes)  # until those of a tokenizer are adopted
        self.embedding = MLP(spec.latent_dim, width, out=width)
        self.positions = nn.Embedding(spec.num_positions, width)
        self.levels = nn.Embedding(len(self.lengths), width)
        self.dropout = nn.Dropout(config.dropout)
        norm = partial(nn.RMSNorm, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.mlp_hidden,
                norm,
                qk_norm=config.qk_norm and partial(nn.RMSNorm, eps=1e-6),
                dropout=config.dropout,
                cross=isinstance(condition, TextCross),
                norm_after=config.norm_after,
            )
            for _ in range(config.depth)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, words + spec.vocab_sizes[0], bias=False)
        # When each position is there: the condition one by one, the codes scale by scale.
        scales = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        last = self.front + len(self.lengths)
        step = torch.cat([torch.arange(self.front), self.front + scales, torch.arange(last, last + tail)])
        self.register_buffer("_step", step, persistent=False)
        cos, sin = rotation(torch.arange(len(step))[:, None], head_dim, config.rope_base)
        self.register_buffer("_cos", cos, persistent=False)
        self.register_buffer("_sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of std 0.02 and a zero head: the first loss is exactly the log of the vocabulary."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def check(cls, spec: TokenSpec) -> None:
        """Scales of one discrete code at each position."""
        if not isinstance(spec.layout, MultiScale):
            raise UserError(f"next_scale predicts scale after scale; {spec.layout} has none (use gpt or masked)")
        if spec.num_slots != 1:
            raise UserError(
                f"next_scale models one discrete code at each position, this tokenizer has {spec.num_slots}"
            )

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Copy the tokenizer's code vectors.

        Raises:
            UserError: if it has none, or they are combined in another way than this generator's.
        """
        given = cast(ScaleCodes | None, tokenizer.scale_codes)
        if given is None:
            raise UserError(f"next_scale needs scale codes, and {type(tokenizer).__name__} has none (scale_codes)")
        wanted = {"phi": len(given.phi)} | ({"phi_ratio": given.phi_ratio} if len(given.phi) else {})
        for name, value in wanted.items():
            if value != getattr(self.config, name):
                raise UserError(f"the tokenizer's {name} is {value}: set generator.args.{name}={value}")
        load_strictly(self.codes, given.state_dict(), "the tokenizer")

    # ------------------------------------------------------------------ network

    def sequence(self, start: Float[Tensor, "B P D"], ids: Int[Tensor, "B n"]) -> Float[Tensor, "B P-1+m D"]:
        """Inputs of the blocks: the condition and the first scale, then the scale behind each of the given ones."""
        parts = [self._first(start)]
        if ids.shape[1]:
            parts.append(self._placed(self.embedding(self.codes.inputs(ids)), self.front + self.lengths[0]))
        return torch.cat(parts, dim=1)

    def _first(self, start: Float[Tensor, "B P D"]) -> Float[Tensor, "B P-1+n D"]:
        """Inputs up to the first scale, all of whose positions begin as the last of the condition."""
        front, last = start.tensor_split([self.front], dim=1)
        return self._placed(torch.cat([front, last.expand(-1, self.lengths[0], -1)], dim=1), 0)

    def _placed(self, x: Float[Tensor, "B n D"], past: int) -> Float[Tensor, "B n D"]:
        """Add what tells the scale and, of codes, the position; the condition counts as the first scale."""
        here = slice(past, past + x.shape[1])
        levels = self.levels((self._step[here] - self.front).clamp(min=0))
        return x + levels + F.pad(self.positions.weight, (0, 0, self.front, 0))[here]

    def visible(
        self, here: slice, there: Bool[Tensor, "B P"] | None
    ) -> Bool[Tensor, "n N"] | Bool[Tensor, "B 1 n N"] | None:
        """Whether the positions ``here`` may look at those up to the last of them; None: at all.

        Args:
            here: of the whole sequence.
            there: see :meth:`Entry.prefix`; a position that is not there is seen by itself alone.
        """
        if there is None and here.start:
            return None  # one scale behind others
        return ordered_mask(self._step, here, there)

    def backbone(
        self,
        x: Float[Tensor, "B n D"],
        there: Bool[Tensor, "B P"] | None,
        contexts: list[Context | None],
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Inputs -> normalised outputs, from the start or, with a cache, of those after the past."""
        past = 0 if cache is None else cache.length
        here = slice(past, past + x.shape[1])
        mask = self.visible(here, there if there is None else there[: len(x)])
        rope = (self._cos[here], self._sin[here]) if self.config.rotary else None
        x = self.dropout(x)
        for index, (block, context) in enumerate(zip(self.blocks, contexts)):
            x = block(x, mask, rope=rope, cache=None if cache is None else (cache, index), context=context)
        return self.norm(x)

    # ------------------------------------------------------------------ training

    def logits(self, ids: Int[Tensor, "B N 1"], condition: Condition) -> Float[Tensor, "B N V"]:
        """Row n predicts code n from the condition and the scales before its own (one pass)."""
        start, there, contexts = self.condition.prefix(condition, self.blocks)
        scales = cast(MultiScale, self.spec.layout).prefixes.index(ids.shape[1])
        x = self.sequence(start, ids[:, : -self.lengths[scales], 0])
        return self.head(self.backbone(x, there, contexts)[:, self.front :])

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy, nats per code; in training mode some rows lose their condition."""
        if self.training:
            condition = self.condition.drop_some(condition, self.config.condition_dropout, rng)
        loss = cross_entropy(self.logits(tokens.ids, condition), tokens.ids).mean()
        return LossReport(loss, {"cross_entropy": loss}, tokens=tokens)

    # ------------------------------------------------------------------ sampling

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """How guidance grows, and rounds ``[[top_k, top_p], ...]`` (none: one, by the options of all samplers).

        The first round samples a scale; each further one predicts it once more, from inputs that have its present
        codes in them (TokenFlow, appendix; the first scale is sampled once). Top-k 0 and top-p 0 or 1 keep all.
        Scales behind it see a scale as its first round did.
        """
        return Sampler.defaults(self.config.guidance_schedule) | {"rounds": []}

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        options: SampleOptions,
        rng: SampleRng,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Scale after scale; guidance runs both branches as one batch, which loses the null rows once it is over.

        Raises:
            UserError: for a condition or an option that is not of this model, or a number of tokens that ends inside a
                scale.
        """
        self.check_condition(condition)
        device, count = self.norm.weight.device, num_positions(self.spec, options.num_tokens)
        rounds = self._rounds(options)
        both = condition.to(device)
        if rounds[0].will_guide(0):
            both = both.join(self.condition.null(both))
        uniform = rng.uniform(count, len(rounds)).to(device)
        ids = torch.zeros(len(condition), 0, dtype=torch.int64, device=device)
        with packed_linears(self):
            start, there, contexts = self.condition.prefix(both, self.blocks)
            run = self._runner(there, contexts, options.use_cache)
            for scale, length in enumerate(self.lengths):
                done = ids.shape[1]
                if done == count:
                    break
                known, grown = done / self.spec.num_positions, scale / max(len(self.lengths) - 1, 1)
                for number, sampler in enumerate(rounds if scale else rounds[:1]):
                    if scale == 0:
                        x = self._first(start)
                    else:
                        inputs = self.codes.refined_inputs(ids) if number else self.codes.inputs(ids)
                        x = self.embedding(inputs[:, -length:])
                        branches = 2 if sampler.will_guide(known) else 1
                        x = self._placed(x.repeat(branches, 1, 1), self.front + done)
                    outputs = run(x, number == 0)[:, -length:]
                    pick = sampler.at(known, grown)
                    codes = self._draw(outputs, uniform[:, done : done + length, number], pick)
                    ids = torch.cat([ids[:, :done], codes], dim=1)
                if progress is not None:
                    progress(length)
        return Tokens(ids[..., None], self.spec)

    def _draw(
        self, outputs: Float[Tensor, "B2 n D"], uniform: Float[Tensor, "B n"], pick: Picker
    ) -> Int[Tensor, "B n"]:
        """Codes of one scale; what else the head tells apart is out of the question."""
        logits = self.head(outputs)[..., -self.spec.vocab_sizes[0] :]
        return pick(logits.flatten(0, 1), uniform.flatten()).view(uniform.shape)

    def _runner(
        self, there: Bool[Tensor, "B P"] | None, contexts: list[Context | None], cached: bool
    ) -> Callable[[Tensor, bool], Tensor]:
        """Function from the inputs of a pass to its outputs.

        Its second argument says whether the pass is the first round of a scale, which later scales look at, or a
        further one, which they do not. Without a cache every pass runs the whole sequence again: the definition that
        the cache must match.
        """
        scales: list[Tensor] = []
        cache = KVCache(len(self.blocks), len(self._step)) if cached else None

        def run(x: Float[Tensor, "B n D"], is_first: bool) -> Float[Tensor, "B m D"]:
            if is_first:
                if cache is not None and scales:
                    cache.advance(scales[-1].shape[1])
                scales.append(x)
            if cache is None:
                past = [inputs[: len(x)] for inputs in scales[:-1]]
                return self.backbone(torch.cat([*past, x], dim=1), there, contexts)
            return self.backbone(x, there, contexts, cache if is_first else cache.glance())

        return run

    def _rounds(self, options: SampleOptions) -> list[Sampler]:
        """What picks the codes of each round.

        Raises:
            UserError: for an option or a value that there is not.
        """
        settings = self.sample_settings(options)
        rounds = settings["rounds"]
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds):
            raise UserError(f"next_scale: rounds must be pairs [[top_k, top_p], ...], got {rounds}")
        filters = [replace(options, top_k=int(k), top_p=float(p or 1)) for k, p in rounds] or [options]
        return [Sampler(filtered, settings) for filtered in filters]


def build(config: Config, spec: TokenSpec) -> NextScale:
    """A next-scale generator with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    check_ranges("next_scale", config, "mlp_hidden", per_head=2)
    NextScale.check(spec)
    return NextScale(config, spec, make_condition(config, config.width, config.heads))
