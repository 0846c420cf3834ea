"""Several codes at each position, predicted one after the other: the dimension-wise head of TokenBridge.

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv 2503.16430).

    codes of a position -> their levels -> linear layer -> backbone -> feature z
    [z, code 0, ..., code S-2] -> causal blocks, slot s modulated by z + step s -> S predictions

One pass gives all S predictions of known codes; sampling runs S passes of one slot each, with a key-value cache. The
slots are predicted in the order in which the tokenizer emits them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.generators.ranges import check_ranges
from vistok.generators.sampling import Picker
from vistok.nn.attention import KVCache
from vistok.nn.modulation import AdaLN, modulate
from vistok.nn.rope import coordinates
from vistok.nn.transformer import MLP, Block, attention_flops, matrix_flops
from vistok.quantizers.dimensionwise import published_levels
from vistok.tokens import TokenSpec


@dataclass
class Config:
    """Sizes and choices of the head; the defaults are TokenBridge-L's.

    Args:
        width: channels.
        depth: blocks.
        heads: attention heads.
        dropout: on attention weights, inside the MLPs, and on the output of both sublayers.
        guidance: guide the features in front of the head, as published (one pass for both branches), or its logits.
        parallel: cut the slots off from the codes before them: the baseline that shows what the order is worth.
        step_in_first_input: add the embedding of step 0 to the input of slot 0 when sampling, as the released sampler
            does. The released training does not, so this is a mismatch, and the published numbers are obtained with
            it; off, sampling follows exactly the distribution that was trained.
    """

    width: int = 1024
    depth: int = 4
    heads: int = 8
    dropout: float = 0.1
    guidance: Literal["features", "logits"] = "features"
    parallel: bool = False
    step_in_first_input: bool = False


class DimensionwiseHead(nn.Module):
    """The adapter for S codes at each position; see the module docstring.

    To the backbone a code is a number: its level in the published table for unit variance. What scale and offset the
    tokenizer gives to each channel is no concern of a linear layer.

    Args:
        spec: the tokens to model.
        width: channels of the backbone.
        config: sizes and choices.

    Raises:
        UserError: if the sizes do not fit each other, or as :meth:`check`.
    """

    codes_per_position = 1

    levels: Tensor
    _first_row: Tensor

    def __init__(self, spec: TokenSpec, width: int, config: Config) -> None:
        super().__init__()
        self.check(spec)
        check_ranges("head", config)
        self.config, self.num_positions, self.vocab_sizes = config, spec.num_positions, spec.vocab_sizes
        self.coordinates = coordinates(spec.layout)
        levels = [published_levels(size).float() for size in spec.vocab_sizes]
        self.register_buffer("levels", nn.utils.rnn.pad_sequence(levels, batch_first=True), persistent=False)
        # The tables of all slots lie in one.
        rows = torch.tensor([0, *spec.vocab_sizes[:-1]]).cumsum(0)
        self.register_buffer("_first_row", rows, persistent=False)
        slots, inner = spec.num_slots, config.width
        self.embedding = nn.Linear(slots, width)
        self.condition = nn.Linear(width, inner)
        self.codes = None if config.parallel else nn.Embedding(sum(spec.vocab_sizes[:-1]), inner)
        self.slots = nn.Parameter(torch.empty(slots, inner))
        self.steps = nn.Parameter(torch.empty(slots, inner))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(
                inner,
                config.heads,
                4 * inner,
                norm,
                qk_norm=True,
                dropout=config.dropout,
                condition_dim=inner,
                mlp=partial(MLP, dropout=config.dropout),
                bias=True,
                attention_dropout=config.dropout,
            )
            for _ in range(config.depth)
        )
        self.norm = norm(inner)
        self.last_norm = norm(inner, elementwise_affine=False)
        self.modulation = AdaLN(inner, inner, 2)
        self.head = nn.Linear(inner, sum(spec.vocab_sizes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers, tables of std 0.02 (of the codes: 1), zero modulations and a zero head.

        The first loss is exactly the mean log of the vocabularies.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, AdaLN):
                module.reset_parameters()
        for table in (self.slots, self.steps):
            nn.init.normal_(table, std=0.02)
        if self.codes is not None:
            nn.init.normal_(self.codes.weight)
        nn.init.zeros_(self.head.weight)

    @staticmethod
    def check(spec: TokenSpec) -> None:
        """Raise UserError when a slot of ``spec`` has a vocabulary that no table of levels has."""
        for size in spec.vocab_sizes:
            published_levels(size)

    @property
    def train_flops(self) -> int:
        """Of a sample, see :attr:`Generator.train_flops`."""
        slots, inner = len(self.vocab_sizes), self.config
        blocks = matrix_flops(slots, self.blocks, self.modulation) + attention_flops(slots, inner.width, inner.depth)
        return self.num_positions * (blocks + matrix_flops(1, self.embedding, self.condition, self.head))

    def arrange(self, ids: Int[Tensor, "B N S"]) -> Int[Tensor, "B N S"]:
        """Codes in the order of the layout, which is that of the backbone."""
        return ids

    def restore(self, ids: Int[Tensor, "B n S"]) -> Int[Tensor, "B n S"]:
        """Inverse of :meth:`arrange`."""
        return ids

    def embed(self, ids: Int[Tensor, "B n S"]) -> Float[Tensor, "B n D"]:
        """Inputs of the backbone."""
        return self.embedding(self.levels[torch.arange(ids.shape[-1], device=ids.device), ids])

    def logits(self, hidden: Float[Tensor, "B n D"], ids: Int[Tensor, "B n S"]) -> Float[Tensor, "B n S V"]:
        """Predictions of each code of ``ids`` from the backbone's output and the codes before it in its position.

        A slot with fewer codes than the largest has the lowest number of its type in the place of those it lacks.
        """
        condition = self.condition(hidden.flatten(0, 1))
        inputs = [condition[:, None]]
        if ids.shape[-1] > 1:
            inputs.append(self._after(ids.flatten(0, 1)[:, :-1], condition))
        outputs = self._run(torch.cat(inputs, dim=1), condition)
        logits = [self._predict(outputs[:, slot], slot) for slot in range(len(self.vocab_sizes))]
        return torch.stack(logits, dim=1).unflatten(0, ids.shape[:2])

    def sample(self, hidden: Float[Tensor, "B2 D"], uniform: Float[Tensor, "B 1 S"], pick: Picker) -> Tensor:
        """Codes ``(B, 1, S)`` of one position."""
        if self.config.guidance == "features":
            hidden = pick.guide(hidden, len(uniform)).to(hidden.dtype)
        condition = self.condition(hidden)
        slots = len(self.vocab_sizes)
        cache = KVCache(len(self.blocks), slots) if pick.options.use_cache else None
        first = condition + self.steps[0] if self.config.step_in_first_input else condition
        inputs, codes = first[:, None], uniform.new_zeros(len(uniform), slots, dtype=torch.int64)
        for slot in range(slots):
            if slot:
                # Both branches, where the logits are guided, go on with the same codes.
                past = codes[:, :slot].repeat(len(condition) // len(codes), 1)
                inputs = torch.cat([first[:, None], self._after(past, condition)], dim=1)
            outputs = self._run(inputs if cache is None else inputs[:, -1:], condition, cache)
            codes[:, slot] = pick(self._predict(outputs[:, -1], slot), uniform[:, 0, slot])
        return codes[:, None]

    def _after(self, codes: Int[Tensor, "M n"], condition: Float[Tensor, "M H"]) -> Float[Tensor, "M n H"]:
        """Inputs of the slots behind each of the first ``codes`` of a position."""
        count = codes.shape[1]
        if self.codes is None:
            return condition[:, None].expand(-1, count, -1)
        return self.codes(codes + self._first_row[:count])

    def _run(
        self, x: Float[Tensor, "M n H"], condition: Float[Tensor, "M H"], cache: KVCache | None = None
    ) -> Float[Tensor, "M n H"]:
        """Inputs -> outputs of the slots from the first or, with a cache, of those after the past."""
        past = 0 if cache is None else cache.length
        here = slice(past, past + x.shape[1])
        x = x + self.slots[here]
        step = condition[:, None] + self.steps[here]
        for index, block in enumerate(self.blocks):
            place = None if cache is None else (cache, index)
            x = block(x, causal=x.shape[1] > 1, cache=place, condition=step)
        if cache is not None:
            cache.advance(x.shape[1])
        scale, shift = self.modulation(step)
        return modulate(self.last_norm(self.norm(x)), shift, scale)

    def _predict(self, outputs: Float[Tensor, "M H"], slot: int) -> Float[Tensor, "M V"]:
        """Logits of one slot."""
        size, first = self.vocab_sizes[slot], sum(self.vocab_sizes[:slot])
        rows = slice(first, first + size)
        logits = F.linear(outputs, self.head.weight[rows], self.head.bias[rows])
        return F.pad(logits, (0, max(self.vocab_sizes) - size), value=torch.finfo(logits.dtype).min)
