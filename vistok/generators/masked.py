"""Masked generation in random order: the encoder-decoder of MAR, with discrete codes, as in TokenBridge.

Li et al., "Autoregressive Image Generation without Vector Quantization" (MAR, arXiv 2406.11838); Wang et al., "Bridging
Continuous and Discrete Tokens for Autoregressive Visual Generation" (TokenBridge, arXiv 2503.16430).

    [class x buffer, visible codes] -> encoder -> scattered among mask tokens -> decoder -> a feature for each position

The encoder sees no hidden position; both halves look in all directions. Training hides a random 70 to 100 % and
predicts them from what is left; sampling starts with everything hidden and predicts more and more positions at a time.
Codes enter and leave through the same adapters as the GPT's: one code at a position, or several and the dimension-wise
head. So do conditions, of which the last position is repeated over the buffer: a class is nothing else, a text has its
other states in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.generators.adapters import Adapter, make_adapter
from vistok.generators.conditions import ConditionConfig, Entry, Prefix, TextCross, make_condition
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.dimensionwise_head import DimensionwiseHead
from vistok.generators.losses import cross_entropy
from vistok.generators.ranges import check_ranges
from vistok.generators.sampling import Sampler, Schedule, num_positions
from vistok.interfaces import Condition, Generator, LossReport, SampleOptions
from vistok.nn.packed import packed_linears
from vistok.nn.transformer import MLP, Block
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Tokens, TokenSpec


def _published_head() -> HeadConfig:
    return HeadConfig(step_in_first_input=True)


@dataclass
class Config(ConditionConfig):
    """Sizes and choices; the defaults are TokenBridge-L's and reproduce its published sampling.

    Args:
        width: channels.
        depth: blocks of the encoder, and of the decoder.
        heads: attention heads.
        buffer: positions in front of the codes that carry the class, or the end of a text; at the start they, and the
            text, are all that the encoder sees.
        head: for tokens of several slots, see :mod:`~vistok.generators.dimensionwise_head`. Its ``step_in_first_input``
            is on here; switch it off for a model of your own, which then samples from what it was trained on.
        mask_mean: of the normal distribution of the hidden share.
        mask_std: of the same.
        mask_min: where it is cut off below; above it is cut off at 1.
        condition_dropout: share of samples trained with the null class or the empty text, for guidance.
        dropout: on attention weights, inside the MLPs, and on the output of every sublayer.
        steps: passes of a generation, on a cosine schedule; as many as positions predict one at a time.
        guidance_schedule: ``linear`` raises the guidance scale from 1 with the share of positions that are known after
            a pass (there is nothing to raise to a scale below 1); ``constant`` does not.
    """

    width: int = 1024
    depth: int = 16
    heads: int = 16
    buffer: int = 64
    head: HeadConfig = field(default_factory=_published_head)
    mask_mean: float = 1.0
    mask_std: float = 0.25
    mask_min: float = 0.7
    condition_dropout: float = 0.1
    dropout: float = 0.1
    steps: int = 256
    guidance_schedule: Schedule = "linear"


class Masked(Generator):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and choices.
        spec: the tokens to model.
        adapter: how codes become inputs and features become codes.
        condition: what stands in front of the codes and what the blocks look at.
    """

    def __init__(self, config: Config, spec: TokenSpec, adapter: Adapter, condition: Entry) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.num_classes, self.text_width = condition.num_classes, condition.text_width
        self.text_positions = condition.text_positions
        self.front = condition.num_positions - 1 + config.buffer
        width, positions = config.width, spec.num_positions
        norm = partial(nn.LayerNorm, eps=1e-6)

        def blocks() -> nn.ModuleList:
            mlp, dropout = partial(MLP, dropout=config.dropout), config.dropout
            cross = isinstance(condition, TextCross)
            make = partial(Block, dropout=dropout, cross=cross, mlp=mlp, bias=True, attention_dropout=dropout)
            return nn.ModuleList(make(width, config.heads, 4 * width, norm) for _ in range(config.depth))

        self.condition, self.adapter = condition, adapter
        self.encoder_positions = nn.Parameter(torch.empty(self.front + positions, width))
        self.input_norm = norm(width)
        self.encoder, self.encoder_norm = blocks(), norm(width)
        self.decoder_in = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder_positions = nn.Parameter(torch.empty(self.front + positions, width))
        self.decoder, self.decoder_norm = blocks(), norm(width)
        self.output_positions = nn.Parameter(torch.empty(positions, width))
        self.reset_parameters()

    @classmethod
    def from_published(cls, path_or_hub_id: str) -> Masked:
        """A released TokenBridge-L or -H, in eval mode, sampling as its authors do.

        Its slots are the channels of the KL-16 VAE in the published order.

        Args:
            path_or_hub_id: a file such as ``checkpoint-last.pth``, the folder that holds it, or
                ``OWNER/REPOSITORY/FILE`` of the Hugging Face hub. The averaged weights are read.

        Raises:
            UserError: naming the file, key or shape that is missing or does not fit.
        """
        from vistok.generators.masked_published import load_published

        return load_published(path_or_hub_id)

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers, tables of std 0.02; the adapter's are its own affair."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for table in (self.encoder_positions, self.mask_token, self.decoder_positions, self.output_positions):
            nn.init.normal_(table, std=0.02)
        self.adapter.reset_parameters()

    @classmethod
    def check(cls, spec: TokenSpec) -> None:
        """Discrete codes, one or several at each position of a grid."""
        if spec.num_slots == 0:
            raise UserError("masked models discrete codes; this tokenizer is continuous (quantize its latents first)")
        if not isinstance(spec.layout, Grid2D):
            raise UserError(f"masked fills a grid in random order; {spec.layout} has an order of its own (use gpt)")
        if spec.num_slots > 1:
            DimensionwiseHead.check(spec)

    # ------------------------------------------------------------------ network

    def prefix(self, condition: Condition) -> Prefix:
        """What all passes of a generation are given of its ``condition``; of the blocks, the encoder's come first."""
        return self.condition.prefix(condition, [*self.encoder, *self.decoder])

    def encode(
        self, inputs: Float[Tensor, "B v D"], visible: Int[Tensor, "B v"], prefix: Prefix
    ) -> Float[Tensor, "B front+v D"]:
        """Features of the front (the condition and the buffer) and of the visible positions.

        Args:
            inputs: embedded codes of the visible positions.
            visible: their indices, ascending.
            prefix: of the condition, see :meth:`prefix`; it may have rows behind those of ``inputs``.
        """
        first, last = prefix[0][: len(inputs)].tensor_split([-1], dim=1)
        start = torch.cat([first, last.expand(-1, self.config.buffer, -1)], dim=1)
        inputs = inputs + self.encoder_positions[self.front + visible]
        x = self.input_norm(torch.cat([start + self.encoder_positions[: self.front], inputs], dim=1))
        return self.encoder_norm(_run(self.encoder, x, prefix, 0))

    def decode(
        self, encoded: Float[Tensor, "B front+v D"], visible: Int[Tensor, "B v"], prefix: Prefix
    ) -> Float[Tensor, "B N D"]:
        """Features of all positions, from those of the front and the visible ones; arguments as :meth:`encode`."""
        x = self.decoder_in(encoded)
        front, known = x.tensor_split([self.front], dim=1)
        canvas = self.mask_token.to(x.dtype).expand(len(x), self.spec.num_positions, -1)
        canvas = canvas.scatter(1, visible[..., None].expand_as(known), known)
        x = torch.cat([front, canvas], dim=1) + self.decoder_positions
        x = _run(self.decoder, x, prefix, len(self.encoder))
        return self.decoder_norm(x)[:, self.front :] + self.output_positions

    def features(
        self, ids: Int[Tensor, "B N S"], visible: Int[Tensor, "B v"], prefix: Prefix
    ) -> Float[Tensor, "B N D"]:
        """Features of all positions; codes at other than the ``visible`` ones have no influence."""
        return self.decode(self.encode(self.adapter.embed(_take(ids, visible)), visible, prefix), visible, prefix)

    # ------------------------------------------------------------------ training

    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Mean cross-entropy of the hidden positions, nats per code; one hidden share for the whole batch."""
        if self.training:
            condition = self.condition.drop_some(condition, self.config.condition_dropout, rng)
        batch, positions, _ = tokens.ids.shape
        order = torch.rand(batch, positions, generator=rng, device=rng.device).argsort(dim=1)
        return self.loss_in_order(tokens, condition, order.to(tokens.ids.device), self.num_hidden(rng))

    def num_hidden(self, rng: torch.Generator) -> int:
        """Positions to hide: their share is drawn from the truncated normal distribution."""
        config = self.config
        ends = torch.tensor([config.mask_min, 1.0], dtype=torch.float64)
        low, high = torch.special.ndtr((ends - config.mask_mean) / config.mask_std)
        uniform = torch.rand((), generator=rng, device=rng.device, dtype=torch.float64).cpu()
        share = config.mask_mean + config.mask_std * torch.special.ndtri(low + uniform * (high - low))
        return math.ceil(self.spec.num_positions * share.clamp(*ends.tolist()))

    def loss_in_order(
        self, tokens: Tokens, condition: Condition, order: Int[Tensor, "B N"], num_hidden: int
    ) -> LossReport:
        """The loss with the first ``num_hidden`` positions of each ``order`` hidden."""
        hidden, visible = (part.sort(dim=1).values for part in order.tensor_split([num_hidden], dim=1))
        features = _take(self.features(tokens.ids, visible, self.prefix(condition)), hidden)
        ids = _take(tokens.ids, hidden)
        loss = cross_entropy(self.adapter.logits(features, ids), ids).mean()
        share = loss.new_tensor(num_hidden / self.spec.num_positions)
        return LossReport(loss, {"cross_entropy": loss}, {"hidden_share": share}, tokens=tokens)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def generate(
        self,
        condition: Condition,
        options: SampleOptions,
        rng: SampleRng,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Every sample fills the grid in a random order of its own; guidance runs both branches as one batch.

        Raises:
            UserError: for a condition or an option that is not of this model, or fewer tokens than the grid has.
        """
        self.check_condition(condition)
        device, total = self.mask_token.device, num_positions(self.spec, options.num_tokens)
        order = rng.uniform(total).argsort(dim=1, stable=True).to(device)
        uniform = rng.uniform(total, self.spec.num_slots).to(device)
        with packed_linears(self):
            return self.fill(condition.to(device), options, order, uniform, progress)

    def fill(
        self,
        condition: Condition,
        options: SampleOptions,
        order: Int[Tensor, "B N"],
        uniform: Float[Tensor, "B N S"],
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Predict the positions of ``order``, the last ones first, with the draw that belongs to each code."""
        settings = self._settings(options)
        sampler = Sampler(options, settings)
        will_guide = sampler.will_guide(0)
        prefix = self.prefix(condition.join(self.condition.null(condition)) if will_guide else condition)
        ids = torch.zeros_like(uniform, dtype=torch.int64)
        hidden = total = self.spec.num_positions
        for left in hidden_after(total, settings["steps"]):
            if left < hidden:
                now, visible = order[:, left:hidden], order[:, hidden:].sort(dim=1).values
                # The last pass hides nothing, but is counted as if it hid one position, as in the released sampler.
                pick = sampler.at((total - hidden) / total, progress=(total - max(left, 1)) / total)
                branches = 2 if pick.scale != 1 else 1
                features = self.features(ids.repeat(branches, 1, 1), visible.repeat(branches, 1), prefix)
                features = _take(features, now.repeat(branches, 1))
                draws = _take(uniform, now).flatten(0, 1)[:, None]
                codes = self.adapter.sample(features.flatten(0, 1), draws, pick)
                codes = codes.unflatten(0, now.shape).squeeze(2)
                ids.scatter_(1, now[..., None].expand_as(codes), codes)
                if progress is not None:
                    progress(hidden - left)
            hidden = left
        return Tokens(ids, self.spec)

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """Passes, and how guidance grows over the codes."""
        return {"steps": self.config.steps} | Sampler.defaults(self.config.guidance_schedule)

    def _settings(self, options: SampleOptions) -> dict[str, Any]:
        """Those of a generation.

        Raises:
            UserError: for an option or a value that there is not.
        """
        settings = self.sample_settings(options)
        if settings["steps"] < 1:
            raise UserError(f"masked: steps must be at least 1, got {settings['steps']}")
        return settings


def hidden_after(positions: int, steps: int) -> list[int]:
    """Positions still hidden after each step: a quarter cosine wave, at least one fewer than before, none at the end.

    With as many steps as positions, every step predicts one; with more, the last ones but one predict none.
    """
    hidden, after = positions, []
    for step in range(1, steps + 1):
        wave = math.floor(positions * math.cos(math.pi / 2 * step / steps))
        hidden = 0 if step == steps else max(1, min(hidden - 1, wave))
        after.append(hidden)
    return after


def _run(blocks: nn.ModuleList, x: Float[Tensor, "B n D"], prefix: Prefix, first: int) -> Float[Tensor, "B n D"]:
    """Through ``blocks``, the ``first`` and following ones of ``prefix``, without a look at what is not there."""
    _, there, contexts = prefix
    mask = None
    if there is not None:
        mask = F.pad(there[: len(x)], (0, x.shape[1] - there.shape[1]), value=True)[:, None, None]
    for block, context in zip(blocks, contexts[first:]):
        x = block(x, mask, context=context)
    return x


def _take(x: Tensor, positions: Int[Tensor, "B n"]) -> Tensor:
    """The rows ``(B, n, C)`` of ``x`` ``(B, N, C)`` at ``positions``."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def _check_shares(config: Config) -> None:
    """Raise UserError for hidden shares that there are not."""
    if not 0 < config.mask_min <= 1:
        raise UserError(f"masked: mask_min must lie in (0, 1], got {config.mask_min}")
    if config.mask_std <= 0:
        raise UserError(f"masked: mask_std must be positive, got {config.mask_std}")


from_published = Masked.from_published


def build(config: Config, spec: TokenSpec) -> Masked:
    """A masked generator with fresh weights for ``spec``.

    Raises:
        UserError: if it cannot model ``spec`` or its sizes do not fit each other.
    """
    check_ranges("masked", config, "buffer", "steps")
    _check_shares(config)
    Masked.check(spec)
    adapter = make_adapter(spec, config.width, config.head)
    return Masked(config, spec, adapter, make_condition(config, config.width, config.heads))
