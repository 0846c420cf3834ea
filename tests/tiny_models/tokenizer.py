"""A linear tokenizer with everything that makes training hard to repeat: noise, dropout, a counting buffer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vistok.interfaces import LossReport, Tokenizer
from vistok.tokens import Ordered1D, Tokens, TokenSpec

LEVELS = 6


@dataclass
class Config:
    image_size: int = 8
    width: int = 8
    registers: int = 4
    dropout: float = 0.1
    nan_after_images: int | None = None


class TinyTokenizer(Tokenizer):
    def __init__(self, config: Config) -> None:
        super().__init__()
        pixels = 3 * config.image_size**2
        self.config = config
        self.encoder = nn.Sequential(
            nn.Linear(pixels, config.width), nn.Dropout(config.dropout), nn.Linear(config.width, config.registers)
        )
        self.decoder = nn.Linear(config.registers, pixels)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.spec = TokenSpec(Ordered1D(config.registers), (LEVELS,), 1, config.image_size)

    def _encode(self, images):
        continuous = torch.sigmoid(self.encoder(images.flatten(1))) * (LEVELS - 1)
        return continuous + (continuous.round() - continuous).detach()

    @torch.no_grad()
    def tokenize(self, images):
        return Tokens(self._encode(images).round().long()[:, :, None], self.spec)

    def embed(self, tokens):
        return tokens.ids.float()

    @torch.no_grad()
    def decode(self, tokens, rng=None, **options):
        codes = (self.embed(tokens) if isinstance(tokens, Tokens) else tokens)[:, :, 0]
        codes = nn.functional.pad(codes, (0, self.config.registers - codes.shape[1]))
        return self.decoder(codes).unflatten(1, (3, self.config.image_size, self.config.image_size))

    def training_loss(self, images, rng):
        if self.training:
            self.seen += len(images)
        noise = torch.randn(images.shape, generator=rng, device=rng.device)
        codes = self._encode(images + 0.1 * noise)
        decoded = self.decoder(codes).unflatten(1, images.shape[1:])
        pixel = (decoded - images).square().mean()
        limit = self.config.nan_after_images
        if limit is not None and self.training and int(self.seen) > limit:
            pixel = pixel * float("nan")
        spread = 0.01 * codes.square().mean()
        tokens = Tokens(codes.detach().round().long()[:, :, None], self.spec)
        return LossReport(
            pixel + spread, {"pixel": pixel, "spread": spread}, {"mean_code": codes.mean()}, tokens, decoded
        )

    @property
    def last_layer(self):
        return self.decoder.weight


def build(config: Config) -> TinyTokenizer:
    return TinyTokenizer(config)
