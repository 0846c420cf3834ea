"""TokenBridge: any continuous tokenizer becomes discrete after its training.

Wang et al., "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation", 2025 (arXiv 2503.16430).

    image --latent tokenizer, frozen--> latents (B,N,C) --each channel to one of its levels--> ids (B,N,C)

Composition, no model: there is nothing to train. A position has one slot for each channel. The slots stand in the order
in which a generator predicts them, channels of low spatial frequency first; latents keep the channels' own order.

``python -m vistok.discretize`` fits one to given latents. The published one is the KL-16 autoencoder with the published
table and order: there is nothing to fit, only costs to measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from omegaconf import MISSING
from torch import Tensor, nn

from vistok.checkpoint import ExportFolder, export_hash, load_autoencoder
from vistok.errors import UserError
from vistok.interfaces import LatentTokenizer, LossReport, Tokenizer
from vistok.nn.frozen import Frozen
from vistok.nn.precision import exact
from vistok.quantizers.dimensionwise import DimensionwiseQuantizer
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Tokens


@dataclass
class Config:
    """What is quantized, and how finely.

    Args:
        tokenizer: folder of an exported latent tokenizer.
        tokenizer_hash: of the export that the tables were fitted for; None for any.
        levels: of each channel.
        components: quantize so many principal components of the channels in their place (ours, for wide latents: a
            position has as many slots); None quantizes the channels, as published.
    """

    tokenizer: str = MISSING
    tokenizer_hash: str | None = None
    levels: int = 64
    components: int | None = None


class TokenBridge(Tokenizer):
    """See the module docstring; build it with :func:`build`.

    A new one has the published table, and the channels in their own order.

    Latents on a grid may be cached: it reads those in place of images.

    Args:
        config: where ``tokenizer`` was read from, and the number of levels.
        tokenizer: the latent tokenizer.
    """

    order: Tensor
    center: Tensor
    basis: Tensor

    def __init__(self, config: Config, tokenizer: LatentTokenizer) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Frozen(tokenizer)
        channels = tokenizer.spec.latent_dim
        slots = channels if config.components is None else config.components
        if not 1 <= slots <= channels:
            raise UserError(
                f"tokenbridge: components must lie in 1..{channels}, the channels of the latents, got {slots}"
            )
        self.spec = replace(tokenizer.spec, vocab_sizes=(config.levels,) * slots)
        if isinstance(layout := self.spec.layout, Grid2D):
            shape, size = (channels, layout.height, layout.width), self.spec.image_size_px
            # Latents of the shape of images could not be told from them.
            self.latent_shape = None if shape == (3, size, size) else shape
        self.quantizer = DimensionwiseQuantizer(slots, config.levels)
        self.register_buffer("order", torch.arange(slots))
        if config.components is not None:
            self.register_buffer("center", torch.zeros(channels))
            self.register_buffer("basis", torch.eye(channels, slots))

    def set_order(self, order: Sequence[int] | Int[Tensor, " C"]) -> None:
        """Let slot i hold channel (or component) ``order[i]``.

        Raises:
            UserError: unless every channel occurs once.
        """
        order, count = torch.as_tensor(order, device=self.order.device), len(self.order)
        if sorted(order.tolist()) != list(range(count)):
            raise UserError(f"an order must name each of {count} channels once, got {order.tolist()}")
        self.order.copy_(order)

    @torch.no_grad()
    def fit_components(self, latents: Float[Tensor, "... C"]) -> None:
        """Set the principal components, largest variance first, to those of ``latents``."""
        x = latents.reshape(-1, latents.shape[-1]).double()
        center = x.mean(dim=0)
        _, _, components = torch.linalg.svd(x - center, full_matrices=False)
        self.center.copy_(center)
        self.basis.copy_(components[: self.basis.shape[1]].T)

    def project(self, latents: Float[Tensor, "... C"]) -> Float[Tensor, "... S"]:
        """What is quantized: the latents, or their principal components."""
        if self.config.components is None:
            return latents
        with exact(latents.device):
            return (latents.float() - self.center) @ self.basis

    def expand(self, values: Float[Tensor, "... S"]) -> Float[Tensor, "... C"]:
        """Latents of what is quantized: the nearest ones, if components are left out."""
        if self.config.components is None:
            return values
        with exact(values.device):
            return values @ self.basis.T + self.center

    @property
    def encoding_tower(self) -> nn.Module | None:
        """That of the latent tokenizer (UniFlow has one, a KL-VAE has none)."""
        return self.tokenizer.module.encoding_tower

    @property
    def decode_defaults(self) -> dict[str, Any]:
        """Those of the latent tokenizer."""
        return self.tokenizer.module.decode_defaults

    @property
    def frozen_helpers(self) -> dict[str, Any]:
        """The latent tokenizer."""
        return {"tokenizer": ExportFolder(self.config.tokenizer)}

    @property
    def latent_hash(self) -> str:
        """Of the export of the latent tokenizer: tables and order play no part in its latents."""
        return export_hash(self.config.tokenizer)

    @torch.no_grad()
    def encode_latent(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What is quantized, the mode of an encoder that describes a distribution; channels in their own order."""
        self.check_images(images)
        if self.latent_shape is None or self.is_latent(images):
            return images
        return self._encode(images).mT.unflatten(2, self.latent_shape[1:])

    def encode_moments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2*C h w"]:
        """Those of the latent tokenizer."""
        return self.tokenizer.on(images.device).encode_moments(images)

    def decode_latent(self, latent: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Inverse of :meth:`encode_latent`, nothing quantized."""
        return latent if self.latent_shape is None else self.decode(latent.flatten(2).mT)

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Ids of the nearest levels, one slot for each channel."""
        latents = images.flatten(2).mT if self.is_latent(images) else self._encode(images)
        return Tokens(self.quantizer.quantize(self.project(latents))[..., self.order], self.spec)

    def _encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N C"]:
        self.check_images(images)
        with exact(images.device):
            return self.tokenizer.on(images.device).encode(images)

    def embed(self, tokens: Tokens) -> Float[Tensor, "B N C"]:
        """Latents at the levels, channels in their own order."""
        return self.expand(self.quantizer.decode(tokens.ids[..., self.order.argsort()]))

    @torch.no_grad()
    def decode(
        self, tokens: Tokens | Float[Tensor, "B N C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images of ids, or of any latents; options are those of the latent tokenizer."""
        latents = self.embed(tokens) if isinstance(tokens, Tokens) else tokens
        with exact(latents.device):
            return self.tokenizer.on(latents.device).decode(latents, rng, **options)

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError(
            "tokenbridge has nothing to train: it is fitted to a latent tokenizer (python -m vistok.discretize)"
        )


def build(config: Config) -> TokenBridge:
    """A TokenBridge with the published table on the latent tokenizer in ``config.tokenizer``.

    Raises:
        UserError: if that is no continuous tokenizer, or another than the tables were fitted for.
    """
    tokenizer = load_autoencoder(config.tokenizer)
    if not isinstance(tokenizer, LatentTokenizer):
        raise UserError(f"tokenbridge: {config.tokenizer} holds a tokenizer that is discrete already")
    if config.tokenizer_hash is not None and (found := export_hash(config.tokenizer)) != config.tokenizer_hash:
        raise UserError(
            f"tokenbridge: {config.tokenizer} is not the tokenizer that the quantizer was fitted for (hash "
            f"{found[:12]}, expected {config.tokenizer_hash[:12]}): fit it again (python -m vistok.discretize)"
        )
    return TokenBridge(config, tokenizer)
