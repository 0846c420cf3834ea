"""A generator that knows the class and nothing else: one table of logits for each position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vistok.errors import UserError
from vistok.interfaces import Generator, LossReport
from vistok.tokens import Tokens


@dataclass
class Config:
    num_classes: int = 10


class TinyGenerator(Generator):
    def __init__(self, config: Config, spec) -> None:
        super().__init__()
        self.check(spec)
        self.spec, self.num_classes = spec, config.num_classes
        self.table = nn.Embedding(config.num_classes + 1, spec.num_positions * spec.vocab_sizes[0])

    @classmethod
    def check(cls, spec):
        if spec.num_slots != 1:
            raise UserError("this generator models one slot")

    def _logits(self, condition):
        self.check_condition(condition)
        logits = self.table(condition.class_ids % (self.num_classes + 1))
        return logits.unflatten(1, (self.spec.num_positions, self.spec.vocab_sizes[0]))

    def loss(self, tokens, condition, rng):
        logits = self._logits(condition).transpose(1, 2)
        nats = nn.functional.cross_entropy(logits, tokens.ids[:, :, 0])
        return LossReport(nats, {"nats": nats}, tokens=tokens)

    @torch.no_grad()
    def generate(self, condition, options, rng, progress=None):
        return Tokens(self._logits(condition).argmax(-1)[:, :, None], self.spec)


def build(config: Config, spec) -> TinyGenerator:
    return TinyGenerator(config, spec)
