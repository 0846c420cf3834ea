"""KL-VAE: a convolutional autoencoder whose latents are kept near a standard normal (diffusers' ``AutoencoderKL``).

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752).

    image (B,3,H,W) --encoder--> mean and variance (B,C,h,w) --scale--> latents (B, h w, C) in raster order

The defaults are KL-16, the autoencoder of MAR and TokenBridge (Li et al. 2024, arXiv 2406.11838): 16 times downsampled,
16 channels, attention in the encoder's last level and in the middle but in no level of the decoder.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float
from torch import Tensor

from vistok.errors import UserError
from vistok.interfaces import LatentTokenizer, LossReport
from vistok.nn.precision import exact
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, TokenSpec

DOWN, DOWN_ATTENTION, UP, UP_ATTENTION = (
    "DownEncoderBlock2D",
    "AttnDownEncoderBlock2D",
    "UpDecoderBlock2D",
    "AttnUpDecoderBlock2D",
)


@dataclass
class Config:
    """Sizes, under diffusers' names, and training choices; the defaults are KL-16 at 256 px.

    Args:
        image_size: side of the images, px.
        block_out_channels: channels of each level; all but the last halve the side.
        encoder_attention: attention in the encoder's last level.
        decoder_attention: attention in the decoder's first level.
        mid_block_add_attention: attention between encoder or decoder and the latents.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: channels C of the latents.
        norm_num_groups: groups of every normalisation.
        use_quant_conv: a 1 x 1 convolution behind the encoder.
        use_post_quant_conv: a 1 x 1 convolution before the decoder.
        scaling_factor: factor on the latents, after ``shift_factor``: meant to give them unit variance.
        shift_factor: what is subtracted from the latents; None subtracts nothing.
        pixel_loss: mean absolute or squared error.
        kl_weight: factor on the KL divergence from the standard normal. Both are sums over an image divided by the
            number of its values, so that the 1e-6 of latent diffusion means the same here.
    """

    image_size: int = 256
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    encoder_attention: bool = True
    decoder_attention: bool = False
    mid_block_add_attention: bool = True
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.2325
    shift_factor: float | None = None
    pixel_loss: Literal["l1", "l2"] = "l1"
    kl_weight: float = 1e-6


OURS = ("image_size", "encoder_attention", "decoder_attention", "pixel_loss", "kl_weight")
"""Fields of :class:`Config` that are no argument of ``AutoencoderKL``."""


class KLVAE(LatentTokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        _check_ranges(config)
        self.side = config.image_size // 2 ** (len(config.block_out_channels) - 1)
        self.spec = TokenSpec(Grid2D(self.side, self.side), (), config.latent_channels, config.image_size)
        self.vae: Any = AutoencoderKL(**vae_arguments(config))

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> KLVAE:
        """A released autoencoder, in eval mode; its ``config.scaling_factor`` is the released one.

        Args:
            path_or_hub_id: MAR's ``kl16.ckpt``; a folder of a diffusers ``AutoencoderKL`` or of a pipeline with one in
                ``vae/``; or a repository of the Hugging Face hub with either.
            image_size: side of the images, px; by default that of the release. Any multiple of the downsampling works.

        Raises:
            UserError: naming the file, key, shape or config value that is missing or does not fit.
        """
        from vistok.tokenizers.klvae_published import load_published

        return load_published(path_or_hub_id, image_size)

    def posterior(self, images: Float[Tensor, "B 3 H W"]) -> DiagonalGaussianDistribution:
        """Mean and variance, float32 ``(B, C, h, w)`` in the autoencoder's own units (not scaled)."""
        return DiagonalGaussianDistribution(self.vae.encode(images).latent_dist.parameters.float())

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"], rng: SampleRng | None = None) -> Float[Tensor, "B N C"]:
        """Scaled latents in raster order: the mode of the posterior, or a sample of it if ``rng`` is given."""
        self.check_images(images)
        with exact(images.device):
            posterior = self.posterior(images.float())
        z = posterior.mean
        if rng is not None:
            z = z + posterior.std * rng.normal(*z.shape[1:]).to(z.device)
        return ((z - self._shift) * self.config.scaling_factor).flatten(2).mT

    @torch.no_grad()
    def encode_moments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2*C h w"]:
        """Mean and standard deviation of the posterior, scaled as the latents are."""
        self.check_images(images)
        with exact(images.device):
            posterior = self.posterior(images.float())
        scale = self.config.scaling_factor
        return torch.cat([(posterior.mean - self._shift) * scale, posterior.std * scale], dim=1)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "B N C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images of ``latents``; nothing is drawn.

        Raises:
            UserError: for any option.
        """
        self.check_decode_options(options)
        z = latents.float().mT.unflatten(2, (self.side, self.side))
        with exact(latents.device):
            return self.vae.decode(z / self.config.scaling_factor + self._shift).sample

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Pixel error of a sample's reconstruction, and the weighted KL divergence."""
        self.check_images(images)
        posterior = self.posterior(images)
        mean = posterior.mean
        noise = torch.randn(mean.shape, generator=rng, device=rng.device).to(mean.device)
        decoded = self.vae.decode(mean + posterior.std * noise).sample.float()
        pixel_error = F.l1_loss if self.config.pixel_loss == "l1" else F.mse_loss
        pixel = pixel_error(decoded, images.float())
        kl = self.config.kl_weight * posterior.kl().mean() / images[0].numel()
        stats = {"latent_std": mean.std(), "posterior_std": posterior.std.mean()}
        return LossReport(pixel + kl, {"pixel": pixel, "kl": kl}, stats, reconstruction=decoded)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return self.vae.decoder.conv_out.weight

    @property
    def _shift(self) -> float:
        return self.config.shift_factor or 0.0


def vae_arguments(config: Config) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKL``."""
    levels = len(config.block_out_channels)
    down, up = [DOWN] * levels, [UP] * levels
    down[-1] = DOWN_ATTENTION if config.encoder_attention else DOWN
    up[0] = UP_ATTENTION if config.decoder_attention else UP
    named = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in OURS}
    return {**named, "down_block_types": down, "up_block_types": up, "sample_size": config.image_size}


def config_of(vae_config: dict[str, Any], image_size: int | None = None) -> Config:
    """The config of a diffusers ``AutoencoderKL``; inverse of :func:`vae_arguments`.

    Args:
        vae_config: its ``config.json``.
        image_size: side of the images, px; None takes ``sample_size``.

    Raises:
        UserError: naming what of it :class:`KLVAE` cannot be.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(AutoencoderKL).parameters.items()}
    given = {name: _listed(vae_config.get(name, default)) for name, default in defaults.items()}
    named = {field.name: given[field.name] for field in fields(Config) if field.name not in OURS}
    config = Config(
        image_size=image_size or given["sample_size"],
        encoder_attention=given["down_block_types"][-1] == DOWN_ATTENTION,
        decoder_attention=given["up_block_types"][0] == UP_ATTENTION,
        **{**named, "block_out_channels": tuple(named["block_out_channels"])},
    )
    ours = {**defaults, **vae_arguments(config)}
    for name, value in given.items():
        # Exempt: the size of its images, and a hint for float16.
        if name not in ("sample_size", "force_upcast") and value != _listed(ours[name]):
            raise UserError(f"klvae: an autoencoder with {name}={value} is not supported")
    return config


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_ranges(config: Config) -> None:
    """Raise UserError for sizes that no model can have."""
    channels, groups = config.block_out_channels, config.norm_num_groups
    for name in ("image_size", "layers_per_block", "latent_channels", "norm_num_groups"):
        if getattr(config, name) < 1:
            raise UserError(f"klvae: {name} must be at least 1, got {getattr(config, name)}")
    if not channels or any(width < 1 or width % groups for width in channels):
        raise UserError(
            f"klvae: block_out_channels must all be multiples of norm_num_groups {groups}, got {list(channels)}"
        )
    factor = 2 ** (len(channels) - 1)
    if config.image_size % factor:
        raise UserError(f"klvae: image_size {config.image_size} is no multiple of {factor} ({len(channels)} levels)")
    if not config.scaling_factor:
        raise UserError("klvae: scaling_factor must not be 0")
    if config.kl_weight < 0:
        raise UserError(f"klvae: kl_weight must be at least 0, got {config.kl_weight}")


from_published = KLVAE.from_published


def build(config: Config) -> KLVAE:
    """A KL-VAE with fresh weights.

    Raises:
        UserError: if sizes do not fit each other.
    """
    return KLVAE(config)
