"""FlexTok: images as an ordered sequence of tokens of which any prefix can be decoded.

Bachmann et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", ICML 2025 (arXiv 2502.13967).

    image (B,3,H,W) --frozen VAE or identity--> latent (B,C,h,w)
      encoder   [patches | registers] -> registers (B,N,len(levels)) -> FSQ -> ids (B,N,1)
      decoder   [noised patches | codes] -> velocity (B,C,h,w), integrated from noise to the latent

The encoder's mask lets register i see all patches and registers <= i, and patches see only patches, so a prefix never
depends on what follows. The decoder is trained on random prefixes (nested dropout) and on none (guidance).
There is no pixel, perceptual or adversarial loss: only the velocity of a rectified flow.

Departures from the published code. Without effect on what is computed: batches are plain (B, N, D) tensors instead of
packed sequences; query, key and value, and gate and up, are one projection; the 2D positions are buffers. With effect:
latents are the mode of the VAE's posterior where the published code samples it, so that tokens are deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vistok.errors import UserError, first_line
from vistok.flow.guidance import guide, guide_projected
from vistok.flow.path import interpolate, target_velocity
from vistok.flow.solvers import euler
from vistok.flow.time import logit_normal_time, mode_time
from vistok.interfaces import LossReport, Tokenizer
from vistok.nn.frozen import Frozen
from vistok.nn.modulation import AdaLN, TimestepEmbedding, modulate
from vistok.nn.patch import patchify, sincos_2d, unpatchify
from vistok.nn.transformer import Block
from vistok.quantizers.fsq import FSQ
from vistok.rng import SampleRng
from vistok.tokens import Ordered1D, Tokens, TokenSpec


@dataclass
class Config:
    """Sizes and training choices; the defaults are the d12-d12 model on the latents of its VAE, 256 px.

    Args:
        image_size: side of the images, px.
        vae: folder of a diffusers ``AutoencoderKL``; None works on pixels.
        vae_scale: factor on the VAE's latents; None takes ``scaling_factor`` of its config.
        patch_size: side of a patch, in latent pixels.
        num_registers: tokens of a full code.
        encoder_width: channels of the encoder.
        encoder_depth: blocks of the encoder.
        decoder_width: channels of the decoder.
        decoder_depth: blocks of the decoder.
        head_dim: channels of an attention head.
        fsq_levels: levels of each code channel.
        keep: how many tokens nested dropout keeps: ``uniform`` 1..N; ``pow2`` equally likely powers of two;
            ``uniform_pow2`` a uniform draw rounded up to a power of two; ``all`` never drops any.
        null_probability: share of samples trained without tokens, for guidance.
        time_density: density of training times.
        mode_scale: parameter of the ``mode`` density.
        logit_mean: mean of the ``logit_normal`` density; positive means more noise.
        max_timestep: scale of the time embedding, see :class:`TimestepEmbedding`.
        token_std: standard deviation of registers, positions and learned tokens at the start. The paper's is 0.02;
            small models trained for minutes learn to use their codes much sooner with 1.
        steps: Euler steps of ``decode`` unless told otherwise.
        guidance: guidance scale of ``decode`` unless told otherwise (the paper's models: 7.5 with ``apg``).
        apg: whether ``decode`` guides by adaptive projected guidance unless told otherwise.
    """

    image_size: int = 256
    vae: str | None = None
    vae_scale: float | None = None
    patch_size: int = 2
    num_registers: int = 256
    encoder_width: int = 768
    encoder_depth: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    head_dim: int = 64
    fsq_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    keep: Literal["uniform", "pow2", "uniform_pow2", "all"] = "uniform"
    null_probability: float = 0.1
    time_density: Literal["mode", "logit_normal"] = "mode"
    mode_scale: float = 0.25
    logit_mean: float = 0.0
    max_timestep: float = 1.0
    token_std: float = 0.02
    steps: int = 25
    guidance: float = 1.0
    apg: bool = False


_layer_norm = partial(nn.LayerNorm, eps=1e-5, elementwise_affine=False)


def _make_blocks(width: int, depth: int, head_dim: int, **modulation: Any) -> nn.ModuleList:
    hidden = int(2 * (4 * width) / 3)
    # muP attention: the logit scale is 8 / head_dim, which equals the usual one at a head of 64.
    make = partial(Block, width, width // head_dim, hidden, _layer_norm, qk_norm=True, scale=8 / head_dim)
    return nn.ModuleList(make(**modulation) for _ in range(depth))


def registers_mask(patches: int, registers: int) -> Bool[Tensor, "n n"]:
    """The encoder's mask on ``[patches | registers]``: a key is open if it is a patch or not later than the query."""
    index = torch.arange(patches + registers)
    return (index[None] < patches) | (index[:, None] >= index[None])


class Encoder(nn.Module):
    """Latent -> unquantized register codes, from the sequence ``[patches | registers]``."""

    positions: Tensor

    def __init__(self, channels: int, grid: int, config: Config) -> None:
        super().__init__()
        width = config.encoder_width
        self.patch_size = config.patch_size
        self.patch_in = nn.Linear(channels * config.patch_size**2, width)
        self.register_buffer("positions", sincos_2d(grid, grid, width))
        self.registers = nn.Parameter(torch.empty(config.num_registers, width))
        self.blocks = _make_blocks(width, config.encoder_depth, config.head_dim)
        self.norm = _layer_norm(width)
        self.head = nn.Linear(width, len(config.fsq_levels))
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, latent: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N levels"]:
        height, width = (side // self.patch_size for side in latent.shape[-2:])
        x = self.patch_in(patchify(latent, self.patch_size)) + self.positions[:height, :width].flatten(0, 1)
        patches = x.shape[1]
        x = torch.cat([x, self.registers.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        mask = self._mask(patches, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, patches:]))

    def _mask(self, patches: int, device: torch.device) -> Bool[Tensor, "n n"]:
        key = (patches, device)
        if key not in self._masks:
            self._masks[key] = registers_mask(patches, len(self.registers)).to(device)
        return self._masks[key]


class Decoder(nn.Module):
    """Noised latent, time and codes -> velocity, from the sequence ``[noised patches | codes]``."""

    positions: Tensor

    def __init__(self, channels: int, grid: int, config: Config) -> None:
        super().__init__()
        width = config.decoder_width
        self.patch_size = config.patch_size
        self.codes_in = nn.Linear(len(config.fsq_levels), width)
        self.register_positions = nn.Parameter(torch.empty(config.num_registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.null_token = nn.Parameter(torch.empty(width))
        self.patch_in = nn.Linear(channels * config.patch_size**2, width)
        self.register_buffer("positions", sincos_2d(grid, grid, width))
        self.time = TimestepEmbedding(width, max_timestep=config.max_timestep)
        # Patches and registers are modulated by vectors of their own.
        self.blocks = _make_blocks(width, config.decoder_depth, config.head_dim, condition_dim=width, segments=2)
        self.norm = _layer_norm(width)
        self.head_modulation = AdaLN(width, width, 2)
        self.head = nn.Linear(width, channels * config.patch_size**2)

    def condition(
        self, codes: Float[Tensor, "B n levels"], keep: Int[Tensor, " B"], null: Bool[Tensor, " B"]
    ) -> Float[Tensor, "B N D"]:
        """The register stream: ``keep`` embedded codes, then mask tokens; null tokens only where ``null``.

        Both tokens replace code and position, so the sequence always has N registers, and what stands at and behind
        ``keep`` has no influence.
        """
        missing = len(self.register_positions) - codes.shape[1]
        stream = self.codes_in(F.pad(codes, (0, 0, 0, missing)).to(self.codes_in.weight.dtype))
        return self.drop(stream + self.register_positions, keep, null)

    def drop(
        self, stream: Float[Tensor, "B N D"], keep: Int[Tensor, " B"], null: Bool[Tensor, " B"]
    ) -> Float[Tensor, "B N D"]:
        """Nested dropout, then the null condition."""
        kept = torch.arange(stream.shape[1], device=stream.device) < keep[:, None]
        stream = torch.where(kept[:, :, None], stream, self.mask_token.to(stream.dtype))
        return torch.where(null[:, None, None], self.null_token.to(stream.dtype), stream)

    def forward(
        self, noised: Float[Tensor, "B C h w"], time: Float[Tensor, " B"], condition: Float[Tensor, "B N D"]
    ) -> Float[Tensor, "B C h w"]:
        height, width = (side // self.patch_size for side in noised.shape[-2:])
        x = self.patch_in(patchify(noised.to(self.patch_in.weight.dtype), self.patch_size))
        x = torch.cat([x + self.positions[:height, :width].flatten(0, 1), condition.to(x.dtype)], dim=1)
        lengths = (height * width, condition.shape[1])
        time_vector = self.time(time)
        for block in self.blocks:
            x = block(x, condition=time_vector, lengths=lengths)
        shift, scale = self.head_modulation(time_vector)
        x = self.head(modulate(self.norm(x[:, : height * width]), shift, scale))
        return unpatchify(x, self.patch_size, height, width)


class FlexTok(Tokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        vae: frozen diffusers ``AutoencoderKL``, or None for pixels.
    """

    def __init__(self, config: Config, vae: Any = None) -> None:
        super().__init__()
        self.config = config
        self.vae: Any = None if vae is None else Frozen(vae)
        _check_ranges(config)
        channels, factor = (3, 1) if vae is None else (vae.config.latent_channels, vae_downsampling(vae))
        self.latent_size, rest = divmod(config.image_size, factor)
        grid, patch_rest = divmod(self.latent_size, config.patch_size)
        if rest or patch_rest or not grid:
            raise UserError(
                f"flextok: image_size {config.image_size} is no multiple of "
                f"{factor * config.patch_size} px (VAE factor {factor} x patch_size {config.patch_size})"
            )
        for name in ("encoder_width", "decoder_width"):
            if getattr(config, name) % config.head_dim:
                raise UserError(f"flextok: {name} {getattr(config, name)} is no multiple of head_dim {config.head_dim}")
        self.channels = channels
        self.vae_scale = self._vae_scale()
        self.quantizer = FSQ(config.fsq_levels)
        self.encoder = Encoder(channels, grid, config)
        self.decoder = Decoder(channels, grid, config)
        layout = Ordered1D(config.num_registers)
        self.spec = TokenSpec(layout, (self.quantizer.codebook_size,), self.quantizer.dim, config.image_size)
        self.reset_parameters()

    @classmethod
    def from_published(cls, path_or_hub_id: str) -> FlexTok:
        """A released tokenizer with its VAE, in eval mode, decoding as its authors do (25 steps, APG at 7.5).

        Args:
            path_or_hub_id: a folder with ``model.safetensors`` (and ``config.json``), such a file, or a repository of
                the Hugging Face hub such as ``EPFL-VILAB/flextok_d12_d12_in1k``.

        Raises:
            UserError: naming the file, key, shape or config value that is missing or does not fit.
        """
        from vistok.tokenizers.flextok_published import load_published

        return load_published(path_or_hub_id)

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers, zero heads and modulations, learned tokens of std ``token_std``.

        At the start every code is zero and the velocity is exactly zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, AdaLN):
                module.reset_parameters()
        for head in (self.encoder.head, self.decoder.head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        decoder = self.decoder
        for token in (self.encoder.registers, decoder.register_positions, decoder.mask_token, decoder.null_token):
            nn.init.normal_(token, std=self.config.token_std)

    def _vae_scale(self) -> float:
        """Factor on the latents.

        Raises:
            UserError: if neither the config nor the VAE states one.
        """
        if self.vae is None:
            return 1.0
        scale = self.vae.module.config.scaling_factor if self.config.vae_scale is None else self.config.vae_scale
        if not scale:
            raise UserError("flextok: the VAE's config states no scaling_factor: give vae_scale")
        return float(scale)

    @property
    def decode_defaults(self) -> dict[str, Any]:
        """Steps and guidance of the config."""
        return {"steps": self.config.steps, "guidance": self.config.guidance, "apg": self.config.apg}

    @property
    def frozen_helpers(self) -> dict[str, Any]:
        """The VAE, if there is one."""
        return {} if self.vae is None else {"vae": self.vae.module}

    # ------------------------------------------------------------------ images <-> latents

    def encode_latent(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What encoder and flow work on: the mode of the VAE's posterior, scaled; or the images themselves."""
        if self.vae is None:
            return images
        with torch.no_grad(), self.vae.exact(images.device):
            return self.vae.on(images.device).encode(images.float()).latent_dist.mode() * self.vae_scale

    def decode_latent(self, latent: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Inverse of :meth:`encode_latent`."""
        if self.vae is None:
            return latent
        with self.vae.exact(latent.device):
            return self.vae.on(latent.device).decode(latent.float() / self.vae_scale).sample

    # ------------------------------------------------------------------ tokens

    def encode(self, latent: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B N levels"], Int[Tensor, "B N"]]:
        """Codes (straight-through gradients) and their indices."""
        return self.quantizer(self.encoder(latent))

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """All ``num_registers`` tokens of ``images``; take a :meth:`Tokens.prefix` for fewer."""
        self.check_images(images)
        return Tokens(self.encode(self.encode_latent(images))[1][:, :, None], self.spec)

    def embed(self, tokens: Tokens) -> Float[Tensor, "B n levels"]:
        """FSQ codes in [-1, 1] of any prefix."""
        return self.quantizer.decode(tokens.ids[:, :, 0])

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens | Float[Tensor, "B n levels"],
        rng: SampleRng | None = None,
        *,
        keep: Int[Tensor, " B"] | None = None,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | None = None,
        apg: bool | None = None,
        progress: Callable[[int], None] | None = None,
        **unknown: Any,
    ) -> Float[Tensor, "B 3 H W"]:
        """Sample images of a prefix of tokens.

        Args:
            tokens: 1 to ``num_registers`` tokens, or their codes.
            rng: streams of the initial noise.
            keep: tokens used of each row, for batches of mixed lengths; None uses all that are given.
            steps: Euler steps; one step gives the mean of the images that fit the tokens, more give a sample.
            guidance: scale of the guidance against the null condition, or a function of the time; 1 is none.
            apg: adaptive projected guidance instead of classifier-free guidance.
            progress: called with 1 after each step.
            unknown: refused by name.

        Raises:
            UserError: for an unknown option or one outside its range.
        """
        if unknown:
            raise UserError(f"flextok: unknown decode option {next(iter(unknown))!r} (valid: steps, guidance, apg)")
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        apg = self.config.apg if apg is None else apg
        if steps < 1:
            raise UserError(f"flextok: steps must be at least 1, got {steps}")
        codes = self.embed(tokens) if isinstance(tokens, Tokens) else tokens
        batch, given, _ = codes.shape
        if keep is None:
            keep = torch.full((batch,), given, device=codes.device)
        shape = (self.channels, self.latent_size, self.latent_size)
        noise = torch.randn(batch, *shape) if rng is None else rng.normal(*shape)
        latent = self.sample_latent(noise.to(codes.device), codes, keep, steps, guidance, apg, progress)
        return self.decode_latent(latent)

    def sample_latent(
        self,
        noise: Float[Tensor, "B C h w"],
        codes: Float[Tensor, "B n levels"],
        keep: Int[Tensor, " B"],
        steps: int,
        guidance: float | Callable[[float], float],
        apg: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """Integrate the guided velocity from ``noise``; conditional and null branch run as one batch."""
        never = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        condition = self.decoder.condition(codes, keep, never)
        if guidance == 1:
            return euler(lambda x, time: self.decoder(x, time, condition), noise, steps, progress)
        both = torch.cat([condition, self.decoder.condition(codes, keep, ~never)])

        running: Tensor | None = None  # of adaptive projected guidance, from step to step

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            nonlocal running
            conditional, null = self.decoder(torch.cat([x, x]), torch.cat([time, time]), both).float().chunk(2)
            scale = guidance(float(time[0])) if callable(guidance) else guidance
            if not apg:
                return guide(conditional, null, scale)
            guided, running = guide_projected(conditional, null, scale, running)
            return guided

        return euler(velocity, noise, steps, progress)

    # ------------------------------------------------------------------ training

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Mean squared error of the velocity (about 1 + variance of the latent at the start)."""
        self.check_images(images)
        latent = self.encode_latent(images)
        batch, device = len(latent), latent.device

        def draw(sample: Callable[..., Tensor], *shape: int) -> Tensor:
            return sample(shape, generator=rng, device=rng.device).to(device)

        config = self.config
        if config.time_density == "mode":
            time = mode_time(draw(torch.rand, batch), config.mode_scale)
        else:
            time = logit_normal_time(draw(torch.randn, batch), config.logit_mean)
        noise = draw(torch.randn, *latent.shape)
        keep = kept_tokens(draw(torch.rand, batch), config.num_registers, config.keep)
        null = draw(torch.rand, batch) < config.null_probability
        return self.velocity_loss(latent, noise, time, keep, null)

    def velocity_loss(
        self,
        latent: Float[Tensor, "B C h w"],
        noise: Float[Tensor, "B C h w"],
        time: Float[Tensor, " B"],
        keep: Int[Tensor, " B"],
        null: Bool[Tensor, " B"],
    ) -> LossReport:
        """The loss for given draws (a pure function of its arguments and the weights)."""
        codes, ids = self.encode(latent)
        velocity = self.decoder(interpolate(latent, noise, time), time, self.decoder.condition(codes, keep, null))
        loss = F.mse_loss(velocity.float(), target_velocity(latent, noise).float())
        return LossReport(loss, {"velocity": loss}, tokens=Tokens(ids[:, :, None], self.spec))


def kept_tokens(uniform: Float[Tensor, " B"], registers: int, mode: str) -> Int[Tensor, " B"]:
    """Tokens that nested dropout keeps, from draws in [0, 1): see ``Config.keep``."""
    if mode == "all":
        return torch.full_like(uniform, registers, dtype=torch.int64)
    if mode == "pow2":
        choices = int(math.log2(registers)) + 1
        return 2 ** (uniform * choices).long().clamp(max=choices - 1)
    keep = 1 + (uniform * registers).long().clamp(max=registers - 1)
    return round_up_to_pow2(keep) if mode == "uniform_pow2" else keep


def round_up_to_pow2(keep: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The smallest power of two that is at least ``keep`` (it may exceed the registers: then all are kept)."""
    return 2 ** torch.ceil(torch.log2(keep.double())).long()


def _check_ranges(config: Config) -> None:
    """Raise UserError for a number that no model can have."""
    sizes = ("image_size", "patch_size", "num_registers", "encoder_width", "decoder_width", "head_dim", "steps")
    for name in sizes:
        if getattr(config, name) < 1:
            raise UserError(f"flextok: {name} must be at least 1, got {getattr(config, name)}")
    for name in ("encoder_depth", "decoder_depth"):
        if getattr(config, name) < 0:
            raise UserError(f"flextok: {name} must be at least 0, got {getattr(config, name)}")
    if not 0 <= config.null_probability <= 1:
        raise UserError(f"flextok: null_probability must lie in [0, 1], got {config.null_probability}")
    if not config.fsq_levels or min(config.fsq_levels) < 2:
        raise UserError(f"flextok: fsq_levels must all be at least 2, got {list(config.fsq_levels)}")
    if config.keep == "pow2" and config.num_registers & (config.num_registers - 1):
        raise UserError(f"flextok: keep=pow2 needs a power of two, not num_registers={config.num_registers}")


def vae_downsampling(vae: Any) -> int:
    """Pixels per latent pixel of a diffusers ``AutoencoderKL``."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


from_published = FlexTok.from_published


def build(config: Config) -> FlexTok:
    """A FlexTok with fresh weights; a VAE, if any, is read from its folder.

    Raises:
        UserError: if sizes do not fit each other or the VAE folder cannot be read.
    """
    if config.vae is None:
        return FlexTok(config)
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(config.vae, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"flextok: vae {config.vae!r} is no readable folder of a diffusers AutoencoderKL "
            f"(config.json + diffusion_pytorch_model.safetensors): {first_line(error)}"
        ) from None
    return FlexTok(config, vae)
