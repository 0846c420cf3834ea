"""VQGAN: a convolutional autoencoder around a learned codebook, on one grid or on a pyramid of scales.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021 (arXiv 2012.09841).

    image (B,3,H,W) --encoder, quant_conv--> map (B,C,h,w) --codebook--> ids --post_quant_conv, decoder--> image

The defaults are VQ-16 of LlamaGen (Sun et al. 2024, arXiv 2406.06525): l2-normalised codes of 8 channels, 16 times
downsampled. With ``scales`` every scale quantizes what the coarser ones left over, as in VAR (Tian et al. 2024, arXiv
2404.02905). The perceptual and the adversarial loss belong to the run, not to this net.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.interfaces import LossReport, Tokenizer
from vistok.nn.cnn import CNNDecoder, CNNEncoder
from vistok.nn.precision import exact
from vistok.quantizers.residual_multiscale import Mode, ResidualMultiscale, ScaleCodes, scale_sizes
from vistok.quantizers.vq import Codebook, CodebookOptions
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, MultiScale, Tokens, TokenSpec


@dataclass
class Config:
    """Sizes and training choices; the defaults are LlamaGen's VQ-16 at 256 px.

    Args:
        image_size: side of the images, px.
        width: channels next to the images.
        multipliers: channels of each level in units of ``width``; all but the last halve the side.
        blocks: residual blocks of an encoder level; a decoder level has one more.
        groups: of every normalisation.
        z_channels: channels between the networks and the convolutions around the codebook.
        quant_kernel: side of the kernels of those convolutions, odd.
        vocab_size: entries of the codebook.
        code_dim: channels of an entry.
        codebook: how it is used and learns.
        scales: sides of the scales of a multi-scale code, coarse first, the last is the grid; None for one grid.
        mode: what a scale is to the others, ``cascade`` (TokenFlow) or ``residual`` (VAR), see
            :data:`~vistok.quantizers.residual_multiscale.Mode`.
        phi: convolutions that refine the scales.
        phi_ratio: share of the convolution in what it refines.
        scale_drop: how often a training batch goes without one of its scales.
        pixel_loss: mean absolute or squared error.
    """

    image_size: int = 256
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    z_channels: int = 256
    quant_kernel: int = 1
    vocab_size: int = 16384
    code_dim: int = 8
    codebook: CodebookOptions = field(default_factory=CodebookOptions)
    scales: tuple[int, ...] | None = None
    mode: Mode = "cascade"
    phi: int = 0
    phi_ratio: float = 0.5
    scale_drop: float = 0.0
    pixel_loss: Literal["l1", "l2"] = "l2"


class VQGAN(Tokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.

    Raises:
        UserError: if sizes do not fit each other.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check_ranges(config)
        self.config = config
        width, multipliers, blocks, groups = config.width, config.multipliers, config.blocks, config.groups
        kernel, padding = config.quant_kernel, config.quant_kernel // 2
        side = config.image_size // 2 ** (len(multipliers) - 1)
        # One grid is a pyramid of one scale.
        scales = scale_sizes([side] if config.scales is None else config.scales, side)
        codebook = Codebook(config.vocab_size, config.code_dim, config.codebook)
        self.encoder = CNNEncoder(3, config.z_channels, width, multipliers, blocks, groups=groups)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, kernel, padding=padding)
        self.quantizer = ResidualMultiscale(
            codebook, scales, config.phi, config.mode, config.phi_ratio, config.scale_drop
        )
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, kernel, padding=padding)
        self.decoder = CNNDecoder(config.z_channels, 3, width, multipliers, blocks + 1, groups=groups)
        layout = Grid2D(side, side) if config.scales is None else MultiScale(scales)
        self.spec = TokenSpec(layout, (config.vocab_size,), config.code_dim, config.image_size)

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> VQGAN:
        """A released tokenizer, in eval mode.

        Args:
            path_or_hub_id: LlamaGen's ``vq_ds16_c2i.pt``, ``vq_ds16_t2i.pt`` or ``vq_ds8_c2i.pt``, or VAR's
                ``vae_ch160v4096z32.pth``; or where the Hugging Face hub has it: ``OWNER/REPOSITORY/FILE``.
            image_size: side of the images, px; by default 256. Of LlamaGen any multiple of the downsampling works,
                of VAR those sizes whose scales were released: 256, 512 and 1024.

        Raises:
            UserError: naming the file, key, shape or size that is missing or does not fit.
        """
        from vistok.tokenizers.vqgan_published import load_published

        return load_published(path_or_hub_id, image_size)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution: what an adaptive adversarial weight compares gradients at."""
        return self.decoder.conv_out.get_parameter("weight")

    @property
    def scale_codes(self) -> ScaleCodes | None:
        """Of a multi-scale code, what a generator reads of it."""
        return None if self.config.scales is None else self.quantizer.scale_codes()

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Ids of the nearest entries, in raster order; those of a multi-scale code scale by scale."""
        self.check_images(images)
        with exact(images.device):
            ids = self.quantizer.encode(self.encode_map(images.float()))
        return Tokens(ids[:, :, None], self.spec)

    def embed(self, tokens: Tokens) -> Float[Tensor, "B N C"]:
        """The entry of each token."""
        return self.quantizer.embed(tokens.ids[:, :, 0])

    @torch.no_grad()
    def decode(
        self, tokens: Tokens | Float[Tensor, "B N C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images of ``tokens``, or of the first scales of a multi-scale code; nothing is drawn.

        Raises:
            UserError: for any option, or codes that end inside a scale.
        """
        self.check_decode_options(options)
        codes = self.embed(tokens) if isinstance(tokens, Tokens) else tokens.float()
        with exact(codes.device):
            return self.decode_map(self.quantizer.add_up(codes))

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Pixel error of the reconstruction, and the terms of the codebook."""
        self.check_images(images)
        h = self.encode_map(images)
        quantized = self.quantizer(h, rng)
        decoded = self.decode_map(quantized.codes.mT.unflatten(2, h.shape[2:])).float()
        pixel_error = F.l1_loss if self.config.pixel_loss == "l1" else F.mse_loss
        terms = {"pixel": pixel_error(decoded, images.float()), **quantized.terms}
        tokens = Tokens(quantized.ids[:, :, None], self.spec)
        return LossReport(torch.stack(list(terms.values())).sum(), terms, tokens=tokens, reconstruction=decoded)

    def encode_map(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What the codebook is to quantize."""
        return self.quant_conv(self.encoder(images))

    def decode_map(self, h: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images of what the codebook made of :meth:`encode_map`."""
        return self.decoder(self.post_quant_conv(h))


def _check_ranges(config: Config) -> None:
    """Raise UserError for sizes that no model can have."""
    for name in ("image_size", "width", "blocks", "groups", "z_channels", "quant_kernel", "vocab_size", "code_dim"):
        if getattr(config, name) < 1:
            raise UserError(f"vqgan: {name} must be at least 1, got {getattr(config, name)}")
    channels = [config.width * multiplier for multiplier in config.multipliers]
    if not channels or any(count < 1 or count % config.groups for count in [config.width, *channels]):
        raise UserError(
            f"vqgan: width {config.width} and its multiples {list(config.multipliers)} must be multiples of groups "
            f"{config.groups}"
        )
    factor = 2 ** (len(channels) - 1)
    if config.image_size % factor:
        raise UserError(f"vqgan: image_size {config.image_size} is no multiple of {factor} ({len(channels)} levels)")
    if config.quant_kernel % 2 == 0:
        raise UserError(f"vqgan: quant_kernel must be odd, got {config.quant_kernel}")
    if config.phi < 0:
        raise UserError(f"vqgan: phi must be at least 0, got {config.phi}")


from_published = VQGAN.from_published


def build(config: Config) -> VQGAN:
    """A VQGAN with fresh weights.

    Raises:
        UserError: if sizes do not fit each other.
    """
    return VQGAN(config)
