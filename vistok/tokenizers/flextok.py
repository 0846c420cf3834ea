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

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from vistok.checkpoint import module_hash
from vistok.errors import UserError, first_line
from vistok.flow.guidance import guide, guide_projected
from vistok.flow.path import interpolate, target_velocity
from vistok.flow.solvers import euler
from vistok.flow.time import logit_normal_time, mode_time
from vistok.interfaces import LossReport, Tokenizer
from vistok.losses.alignment import Alignment, AlignmentConfig
from vistok.nn.frozen import Frozen
from vistok.nn.modulation import AdaLN
from vistok.nn.precision import exact
from vistok.nn.vision_teacher import VisionTeacher, load_teacher
from vistok.quantizers.fsq import FSQ
from vistok.rng import SampleRng
from vistok.tokenizers.flextok_networks import Decoder, Encoder
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
        code_std: standard deviation at the start of the weights that embed codes; None is Xavier's, as published. With
            ``token_std`` 1 that is a whisper beside the positions: 1 makes codes heard from the first update.
        steps: Euler steps of ``decode`` unless told otherwise.
        guidance: guidance scale of ``decode`` unless told otherwise (the paper's models: 7.5 with ``apg``).
        apg: whether ``decode`` guides by adaptive projected guidance unless told otherwise.
        alignment: of the decoder's patches with a frozen teacher (REPA); None trains without.
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
    code_std: float | None = None
    steps: int = 25
    guidance: float = 1.0
    apg: bool = False
    alignment: AlignmentConfig | None = None


class FlexTok(Tokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        vae: frozen diffusers ``AutoencoderKL``, or None for pixels.
        teacher: that ``config.alignment`` aligns with, or None for no alignment.
    """

    training_only = ("alignment",)

    def __init__(self, config: Config, vae: Any = None, teacher: VisionTeacher | None = None) -> None:
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
        values = channels * config.patch_size**2
        if values > config.decoder_width:
            warnings.warn(
                f"flextok: a patch has {values} values, more than decoder_width {config.decoder_width}: part of the "
                "noise cannot pass the decoder and stays in its pictures",
                stacklevel=3,
            )
        self.channels = channels
        shape = (channels, self.latent_size, self.latent_size)
        # What looks like an image is taken for one.
        self.latent_shape = None if shape == (3, config.image_size, config.image_size) else shape
        self.vae_scale = self._vae_scale()
        self.quantizer = FSQ(config.fsq_levels)
        self.encoder = Encoder(channels, grid, config)
        self.decoder = Decoder(channels, grid, config)
        layout = Ordered1D(config.num_registers)
        self.spec = TokenSpec(layout, (self.quantizer.codebook_size,), self.quantizer.dim, config.image_size)
        self.reset_parameters()
        # Last, so that the weights of a seed are the same with and without it.
        self.alignment: Alignment | None = None
        if config.alignment is not None and teacher is not None:
            self.alignment = Alignment(config.alignment, teacher, config.decoder_width)

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
        if self.config.code_std is not None:
            nn.init.normal_(decoder.codes_in.weight, std=self.config.code_std)

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
    def encoding_tower(self) -> Encoder:
        """Where the patches of an image can merge, see :mod:`vistok.merging`."""
        return self.encoder

    @property
    def decode_defaults(self) -> dict[str, Any]:
        """Steps and guidance of the config."""
        return {"steps": self.config.steps, "guidance": self.config.guidance, "apg": self.config.apg}

    @property
    def frozen_helpers(self) -> dict[str, Any]:
        """The VAE, if there is one."""
        return {} if self.vae is None else {"vae": self.vae.module}

    @property
    def latent_hash(self) -> str:
        """Of weights and config of the VAE, and of the scale."""
        if self.vae is None:
            return ""
        vae = self.vae.module
        # Without defaults: a later diffusers has more of them.
        defaults = inspect.signature(type(vae)).parameters
        config = {key: value for key, value in vae.config.items() if key in defaults and value != defaults[key].default}
        return module_hash(vae, config, self.vae_scale)

    # ------------------------------------------------------------------ images <-> latents

    def encode_latent(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What encoder and flow work on: the mode of the VAE's posterior, scaled; or the images themselves.

        Raises:
            UserError: for neither images nor latents.
        """
        self.check_images(images)
        if self.vae is None or self.is_latent(images):
            return images
        with torch.no_grad(), exact(images.device):
            return self.vae.on(images.device).encode(images.float()).latent_dist.mode() * self.vae_scale

    def decode_latent(self, latent: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Inverse of :meth:`encode_latent`."""
        if self.vae is None:
            return latent
        with exact(latent.device):
            return self.vae.on(latent.device).decode(latent.float() / self.vae_scale).sample

    # ------------------------------------------------------------------ tokens

    def encode(self, latent: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B N levels"], Int[Tensor, "B N"]]:
        """Codes (straight-through gradients) and their indices."""
        return self.quantizer(self.encoder(latent))

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """All ``num_registers`` tokens of ``images`` or latents; take a :meth:`Tokens.prefix` for fewer."""
        with exact(images.device):
            return Tokens(self.encode(self.encode_latent(images).float())[1][:, :, None], self.spec)

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
            progress: called with 1 after each step; None shows a bar on a terminal when decoding takes over a second.
            unknown: refused by name.

        Raises:
            UserError: for an unknown option or one outside its range.
        """
        self.check_decode_options(unknown)
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        apg = self.config.apg if apg is None else apg
        if steps < 1:
            raise UserError(f"flextok: steps must be at least 1, got {steps}")
        codes = self.embed(tokens) if isinstance(tokens, Tokens) else tokens
        batch, given, _ = codes.shape
        if not 1 <= given <= self.spec.num_positions:
            raise UserError(f"flextok: decodes 1 to {self.spec.num_positions} tokens, got {given}")
        if keep is None:
            keep = torch.full((batch,), given, device=codes.device)
        elif bool((keep < 1).any() | (keep > given).any()):
            raise UserError(f"flextok: keep must lie in 1..{given}, got {int(keep.min())}..{int(keep.max())}")
        shape = (self.channels, self.latent_size, self.latent_size)
        noise = torch.randn(batch, *shape) if rng is None else rng.normal(*shape)
        hidden = progress is not None
        with tqdm(total=steps, desc="decode", unit="step", delay=1, leave=False, disable=hidden or None) as bar:
            latent = self.sample_latent(
                noise.to(codes.device), codes, keep, steps, guidance, apg, progress if hidden else bar.update
            )
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
        condition, distinct = self.decoder.condition(codes, keep, never), keep
        if guidance != 1:
            condition = torch.cat([condition, self.decoder.condition(codes, keep, ~never)])
            distinct = torch.cat([keep, torch.zeros_like(keep)])
        condition, bias = self.decoder.merge(condition, distinct)
        if guidance == 1:
            return euler(lambda x, time: self.decoder(x, time, condition, bias), noise, steps, progress)

        running: Tensor | None = None  # of adaptive projected guidance, from step to step

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            nonlocal running
            both = self.decoder(torch.cat([x, x]), torch.cat([time, time]), condition, bias)
            conditional, null = both.float().chunk(2)
            scale = guidance(float(time[0])) if callable(guidance) else guidance
            if not apg:
                return guide(conditional, null, scale)
            guided, running = guide_projected(conditional, null, scale, running)
            return guided

        return euler(velocity, noise, steps, progress)

    # ------------------------------------------------------------------ training

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Mean squared error of the velocity (about 1 + variance of the latent at the start), plus any alignment.

        Raises:
            UserError: for neither images nor latents, or latents where the teacher needs images.
        """
        if self.alignment is not None and self.is_latent(images):
            raise UserError(
                "flextok: the teacher of the alignment needs images, these are latents: train on images, or set "
                "tokenizer.args.alignment=null"
            )
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
        return self.velocity_loss(latent, noise, time, keep, null, images)

    def velocity_loss(
        self,
        latent: Float[Tensor, "B C h w"],
        noise: Float[Tensor, "B C h w"],
        time: Float[Tensor, " B"],
        keep: Int[Tensor, " B"],
        null: Bool[Tensor, " B"],
        images: Float[Tensor, "B 3 H W"] | None = None,
    ) -> LossReport:
        """The loss for given draws (a pure function of its arguments and the weights).

        Without ``images``, which only the teacher looks at, it is that of the velocity alone.
        """
        codes, ids = self.encode(latent)
        alignment = None if images is None else self.alignment
        layer = None if alignment is None else alignment.config.layer
        condition = self.decoder.condition(codes, keep, null)
        velocity, features = self.decoder.with_features(interpolate(latent, noise, time), time, condition, layer)
        loss = F.mse_loss(velocity.float(), target_velocity(latent, noise).float())
        terms, stats = {"velocity": loss}, {}
        if alignment is not None:
            negative_cosine = alignment(features, images)
            terms["alignment"], stats["alignment_cosine"] = alignment.config.weight * negative_cosine, -negative_cosine
            loss = loss + terms["alignment"]
        return LossReport(loss, terms, stats, Tokens(ids[:, :, None], self.spec))


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
    for name in ("encoder_width", "decoder_width"):
        if getattr(config, name) % 4:
            raise UserError(f"flextok: {name} must be a multiple of 4, got {getattr(config, name)}")
    if config.max_timestep <= 0:
        raise UserError(f"flextok: max_timestep must be positive, got {config.max_timestep}")
    for name in ("token_std", "code_std"):
        if (getattr(config, name) or 0) < 0:
            raise UserError(f"flextok: {name} must be at least 0, got {getattr(config, name)}")
    if not 0 <= config.null_probability <= 1:
        raise UserError(f"flextok: null_probability must lie in [0, 1], got {config.null_probability}")
    if not config.fsq_levels or min(config.fsq_levels) < 2:
        raise UserError(f"flextok: fsq_levels must all be at least 2, got {list(config.fsq_levels)}")
    if config.keep == "pow2" and config.num_registers & (config.num_registers - 1):
        raise UserError(f"flextok: keep=pow2 needs a power of two, not num_registers={config.num_registers}")
    alignment = config.alignment
    if alignment is not None and not 0 <= alignment.layer < config.decoder_depth:
        raise UserError(f"flextok: alignment.layer must lie in 0..{config.decoder_depth - 1}, got {alignment.layer}")
    if alignment is not None and (alignment.weight <= 0 or alignment.projector_width < 1):
        raise UserError("flextok: alignment.weight and alignment.projector_width must be positive")


def vae_downsampling(vae: Any) -> int:
    """Pixels per latent pixel of a diffusers ``AutoencoderKL``."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


from_published = FlexTok.from_published


def build(config: Config) -> FlexTok:
    """A FlexTok with fresh weights; a VAE, if any, is read from its folder, and a teacher from its file.

    Raises:
        UserError: if sizes do not fit each other or the VAE or the teacher cannot be read.
    """
    return FlexTok(config, _load_vae(config), _load_teacher(config))


def _load_vae(config: Config) -> Any:
    if config.vae is None:
        return None
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(config.vae, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"flextok: vae {config.vae!r} is no readable folder of a diffusers AutoencoderKL "
            f"(config.json + diffusion_pytorch_model.safetensors): {first_line(error)}"
        ) from None


def _load_teacher(config: Config) -> VisionTeacher | None:
    alignment = config.alignment
    if alignment is None:
        return None
    if alignment.teacher_weights is None:
        warnings.warn(
            f"alignment is off: alignment.teacher_weights names no file with the weights of {alignment.teacher}",
            stacklevel=2,
        )
        return None
    return load_teacher(alignment.teacher, alignment.teacher_weights, **alignment.teacher_args)
