"""TokenFlow: a semantic and a pixel vector of each position share one code, on a pyramid of scales.

Qu et al., "TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation", CVPR 2025
(arXiv 2412.03069).

    image --vision transformer--> semantic vectors (B,32,S,S) ┐ one id for each      ┌> features of a teacher
          --CNN-----------------> pixel vectors    (B, 8,S,S) ┴ position of a scale ─┴> image

Both tables of the codebook have a row for every id, and a position takes the id whose two rows are nearest to its two
vectors together. Scales quantize what the coarser ones have left over, and add up on the finest grid. The semantic half
of the sum is trained to say what a frozen teacher sees, the pixel half to give back the image.

The defaults are TokenFlow-B at 224 px; see :data:`PRESETS`. Of the published training, the perceptual and adversarial
losses are added by the task. Departures from the published code: what its XL computes of the vision transformer without
using it (the last block and all behind it) is not built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.interfaces import LossReport, Tokenizer
from vistok.losses.distillation import distillation_loss
from vistok.nn.cnn import CNNDecoder, CNNEncoder
from vistok.nn.frozen import Frozen
from vistok.nn.precision import exact
from vistok.nn.vision_teacher import VisionTeacher, VisionTower, load_teacher
from vistok.quantizers.residual_multiscale import ResidualMultiscale, ScaleCodes, scale_sizes
from vistok.quantizers.shared_dual_vq import SharedDualCodebook
from vistok.quantizers.vq import CodebookOptions
from vistok.rng import SampleRng
from vistok.tokenizers.tokenflow_networks import SemanticDecoder, SemanticEncoder
from vistok.tokens import MultiScale, Tokens, TokenSpec

Branch = Literal["both", "semantic", "pixel"]


@dataclass
class TeacherConfig:
    """The frozen vision transformer whose features the semantic branch learns to say.

    It has the name and the arguments of the semantic encoder, which begins with its weights.

    Args:
        weights: its file, see :func:`~vistok.nn.vision_teacher.load_teacher`.
        weight: factor on the distillation loss.

    Raises:
        UserError: if the weight is not positive.
    """

    weights: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise UserError(
                f"tokenflow: teacher.weight must be positive (teacher=null distils nothing), got {self.weight}"
            )


@dataclass
class Config:
    """Sizes and training choices; the defaults are TokenFlow-B at 224 px.

    Args:
        image_size: side of the images, px.
        scales: sides of the scales; the last is the grid of the semantic encoder.
        vocab_size: rows of each table.
        semantic_dim: channels of the semantic table.
        pixel_dim: channels of the pixel table.
        encoder: timm name of the semantic encoder and of the teacher.
        encoder_args: arguments of ``timm.create_model`` for both; ``img_size`` is ``image_size``.
        penultimate: both give the output of their last block but one, as it is.
        normalize: the semantic encoder sees images normalised as its model wants them. The released B sees them as they
            are, in [-1, 1], though its teacher does not.
        target_width: outputs of the teacher's classifier, which is applied to each patch (CLIP: the projection to the
            space that it shares with texts); None takes its features as they are.
        semantic_decoder_width: channels of the semantic decoder.
        semantic_decoder_depth: its blocks.
        semantic_decoder_heads: its attention heads.
        pixel_size: side of the images of the pixel branch, px, which are resized to it and back; None does not resize.
        multipliers: channels of each level of the CNNs in units of their widths; all but the last halve the side.
        pixel_encoder_width: unit of the pixel encoder.
        pixel_encoder_blocks: residual blocks of each of its levels.
        pixel_decoder_width: unit of the pixel decoder (256 in the "enhanced" one).
        pixel_decoder_blocks: residual blocks of each of its levels (5 in the "enhanced" one).
        z_channels: channels between the CNNs and the pixel vectors.
        norm_num_groups: groups of the CNNs' normalisations.
        pixel_weight: of the pixel distance in the choice of an id, beside 1 of the semantic one.
        codebook: how the codebook is used and learns; the published one by gradients alone.
        scale_drop: how often a training batch goes without one of its scales (never the first).
        teacher: None trains the pixel branch alone.
    """

    image_size: int = 224
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)
    vocab_size: int = 32768
    semantic_dim: int = 32
    pixel_dim: int = 8
    encoder: str = "vit_base_patch16_clip_quickgelu_224"
    encoder_args: dict[str, Any] = field(default_factory=dict)
    penultimate: bool = False
    normalize: bool = False
    target_width: int | None = 512
    semantic_decoder_width: int = 768
    semantic_decoder_depth: int = 3
    semantic_decoder_heads: int = 12
    pixel_size: int | None = None
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    pixel_encoder_width: int = 128
    pixel_encoder_blocks: int = 2
    pixel_decoder_width: int = 128
    pixel_decoder_blocks: int = 3
    z_channels: int = 256
    norm_num_groups: int = 32
    pixel_weight: float = 1.0
    codebook: CodebookOptions = field(default_factory=CodebookOptions)
    scale_drop: float = 0.1
    teacher: TeacherConfig | None = None


_AT_256 = {"image_size": 256, "scales": (1, 2, 4, 6, 8, 10, 12, 14, 16)}
_WIDE = {"normalize": True, "target_width": None, "semantic_decoder_width": 1152}

PRESETS: dict[str, dict[str, Any]] = {
    "b": {},
    "b_256": _AT_256,
    "l": {**_AT_256, **_WIDE, "encoder": "vitamin_xlarge_256"},
    "xl": {
        **_WIDE,
        "image_size": 384,
        "pixel_size": 432,
        "scales": (*range(1, 11), 12, 14, 17, 22, 27),
        "encoder": "vit_so400m_patch14_siglip_384",
        "encoder_args": {"act_layer": "gelu_tanh"},
        "penultimate": True,
    },
}
"""Published sizes, as changes of the defaults. The paper's table 11 has a scale of 3 in its L; its code has none."""

ENHANCED = {"pixel_decoder_width": 256, "pixel_decoder_blocks": 5}
"""The larger pixel decoder of the B that was released for generation."""


class TokenFlow(Tokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        teacher: that ``config.teacher`` distils, or None for no distillation.
    """

    training_only = ("teacher",)

    def __init__(self, config: Config, teacher: VisionTeacher | None = None) -> None:
        super().__init__()
        self.config = config
        _check_ranges(config)
        self.semantic_encoder = SemanticEncoder(config)
        grid = self.semantic_encoder.grid[0]
        factor = 2 ** (len(config.multipliers) - 1)
        self.pixel_size = config.pixel_size or config.image_size
        if self.pixel_size != grid * factor:
            raise UserError(
                f"tokenflow: image_size {config.image_size} makes {grid} x {grid} positions of {config.encoder}, which "
                f"the pixel branch has at {grid * factor} px, not at {self.pixel_size}: give another image_size, or "
                f"pixel_size={grid * factor}"
            )
        self.semantic_decoder = SemanticDecoder(config, grid, config.target_width or self.semantic_encoder.width)
        z, groups = config.z_channels, config.norm_num_groups
        self.pixel_encoder = CNNEncoder(
            3, z, config.pixel_encoder_width, config.multipliers, config.pixel_encoder_blocks, groups=groups
        )
        self.pixel_in = nn.Conv2d(z, config.pixel_dim, 1)
        self.pixel_out = nn.Conv2d(config.pixel_dim, z, 1)
        self.pixel_decoder = CNNDecoder(
            z, 3, config.pixel_decoder_width, config.multipliers, config.pixel_decoder_blocks, groups=groups
        )
        codebook = SharedDualCodebook(
            config.vocab_size, config.semantic_dim, config.pixel_dim, config.pixel_weight, config.codebook
        )
        sizes = scale_sizes(config.scales, grid)
        self.quantizer = ResidualMultiscale(codebook, sizes, drop=config.scale_drop)
        self.spec = TokenSpec(MultiScale(sizes), (config.vocab_size,), codebook.dim, config.image_size)
        self.teacher: Frozen[VisionTeacher] | None = None
        if teacher is None:
            # Nothing tells it what to learn.
            self.semantic_decoder.requires_grad_(False)
        else:
            self._learn_from(teacher)

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> TokenFlow:
        """A released tokenizer, in eval mode.

        Args:
            path_or_hub_id: ``tokenflow_clipb_32k_enhanced.pt``, ``tokenflow_siglip_32k.pt`` or another checkpoint of
                the authors' code; or ``REPOSITORY/FILE`` of the Hugging Face hub, such as
                ``ByteVisionLab/TokenFlow/tokenflow_siglip_32k.pt``.
            image_size: side of the images, px: 224 (default) or 256 for B, whose positions are then interpolated as
                released; the others have one size.

        Raises:
            UserError: naming the file, key, shape or size that is missing or does not fit.
        """
        from vistok.tokenizers.tokenflow_published import load_published

        return load_published(path_or_hub_id, image_size)

    def _learn_from(self, teacher: VisionTeacher) -> None:
        """Take ``teacher`` for distillation, and its weights for a start."""
        outputs = self.semantic_decoder.outputs
        if teacher.width != outputs:
            raise UserError(
                f"tokenflow: the teacher's features have {teacher.width} channels, but the semantic decoder makes "
                f"{outputs}: set target_width"
            )
        self.teacher = Frozen(teacher)
        state = teacher.model.state_dict()
        tower = self.semantic_encoder.tower.model
        tower.load_state_dict({key: state[key] for key in tower.state_dict()})

    @property
    def scale_codes(self) -> ScaleCodes:
        """Code vectors and how scales add up, frozen, for a next-scale generator."""
        return self.quantizer.scale_codes()

    @property
    def last_layer(self) -> Tensor:
        """Weight of the pixel decoder's last convolution."""
        return self.pixel_decoder.conv_out.weight

    @property
    def encoding_tower(self) -> VisionTower:
        """Where the patches of an image can merge, see :mod:`vistok.merging`."""
        return self.semantic_encoder.tower

    @property
    def feature_defaults(self) -> dict[str, Any]:
        """Both branches."""
        return {"branch": "both"}

    # ------------------------------------------------------------------ tokens

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C S S"]:
        """The map before quantization, semantic channels first.

        Raises:
            UserError: for images of another size.
        """
        self.check_images(images)
        semantic = self.semantic_encoder(images)
        pixel = self.pixel_in(self.pixel_encoder(_resized(images, self.pixel_size)))
        return torch.cat([semantic, pixel], dim=1)

    @torch.no_grad()
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Codes of all scales."""
        with exact(images.device):
            return Tokens(self.quantizer.encode(self.encode(images))[:, :, None], self.spec)

    def embed(self, tokens: Tokens) -> Float[Tensor, "B n C"]:
        """The two rows of each token, semantic channels first; :meth:`add_up` makes a map of them."""
        return self.quantizer.embed(tokens.ids[:, :, 0])

    def add_up(self, tokens: Tokens | Float[Tensor, "B n C"]) -> Float[Tensor, "B S*S C"]:
        """What tokens, or their latents, add up to on the finest grid, in raster order.

        Raises:
            UserError: if they end inside a scale.
        """
        latents = self.embed(tokens) if isinstance(tokens, Tokens) else tokens
        return self.quantizer.add_up(latents).flatten(2).mT

    @torch.no_grad()
    def decode(
        self, tokens: Tokens | Float[Tensor, "B n C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images of the first or all scales of a code, or of its latents; nothing is drawn.

        Raises:
            UserError: for any option, or a code that ends inside a scale.
        """
        self.check_decode_options(options)
        codes = self.add_up(tokens)
        with exact(codes.device):
            return self.decode_pixels(codes)

    @torch.no_grad()
    def semantic(self, tokens: Tokens | Float[Tensor, "B n C"]) -> Float[Tensor, "B S*S D"]:
        """What the teacher would see in the images of the first or all scales of a code, or of its latents.

        Raises:
            UserError: for a code that ends inside a scale.
        """
        codes = self.add_up(tokens)
        with exact(codes.device):
            return self.decode_semantic(codes)

    @torch.no_grad()
    def features(
        self, images: Float[Tensor, "B 3 H W"], branch: Branch = "both", **unknown: Any
    ) -> Float[Tensor, "B S*S D"]:
        """What all scales add up to: the reading of a multimodal language model (paper, section 3.3).

        Args:
            images: in [-1, 1].
            branch: which channels of it.
            unknown: refused by name.

        Raises:
            UserError: for an unknown option or branch.
        """
        if unknown:
            raise UserError(f"tokenflow: unknown option {next(iter(unknown))!r} of features (valid: branch)")
        codes = self.add_up(self.tokenize(images))
        if branch == "both":
            return codes
        semantic, pixel = self._branches(codes)
        if branch not in ("semantic", "pixel"):
            raise UserError(f"tokenflow: branch must be one of both, semantic, pixel, got {branch!r}")
        return semantic if branch == "semantic" else pixel

    def decode_pixels(self, codes: Float[Tensor, "B S*S C"]) -> Float[Tensor, "B 3 H W"]:
        """Images, float32, of codes that have been added up."""
        pixel = self._branches(codes)[1].mT.unflatten(2, self.quantizer.sizes[-1])
        return _resized(self.pixel_decoder(self.pixel_out(pixel)).float(), self.config.image_size)

    def decode_semantic(self, codes: Float[Tensor, "B S*S C"]) -> Float[Tensor, "B S*S D"]:
        """The teacher's features of codes that have been added up."""
        return self.semantic_decoder(self._branches(codes)[0])

    def _branches(self, codes: Float[Tensor, "B N C"]) -> tuple[Float[Tensor, "B N s"], Float[Tensor, "B N p"]]:
        semantic, pixel = codes.split([self.config.semantic_dim, self.config.pixel_dim], dim=-1)
        return semantic, pixel

    # ------------------------------------------------------------------ training

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Squared error of the pixels, the codebook's terms, and the distance to what the teacher sees."""
        quantized = self.quantizer(self.encode(images), rng)
        decoded = self.decode_pixels(quantized.codes)
        terms, stats = {"pixel": F.mse_loss(decoded, images.float()), **quantized.terms}, {}
        if self.config.teacher is not None and self.teacher is not None:
            with torch.no_grad():
                target = self.teacher.on(images.device)(images).flatten(1, 2)
            distance = distillation_loss(self.decode_semantic(quantized.codes), target)
            terms["distillation"] = self.config.teacher.weight * distance
            stats["distillation_cosine"] = 1 - distance
        tokens = Tokens(quantized.ids[:, :, None], self.spec)
        return LossReport(torch.stack(list(terms.values())).sum(), terms, stats, tokens, decoded)


def _resized(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 size size"]:
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="bicubic")


def _check_ranges(config: Config) -> None:
    """Raise UserError for a number that no model can have."""
    for name in ("image_size", "semantic_decoder_heads", "pixel_encoder_width", "pixel_decoder_width", "z_channels"):
        if getattr(config, name) < 1:
            raise UserError(f"tokenflow: {name} must be at least 1, got {getattr(config, name)}")
    if config.semantic_decoder_width % config.semantic_decoder_heads:
        raise UserError(
            f"tokenflow: semantic_decoder_width {config.semantic_decoder_width} is no multiple of "
            f"semantic_decoder_heads {config.semantic_decoder_heads}"
        )


def preset(name: str, **changes: Any) -> Config:
    """The config of a published size: a key of :data:`PRESETS`, with ``changes``."""
    return replace(Config(), **{**PRESETS[name], **changes})


from_published = TokenFlow.from_published


def build(config: Config) -> TokenFlow:
    """A TokenFlow with fresh weights; a teacher, if any, is read from its file and gives the semantic encoder its own.

    Raises:
        UserError: if sizes do not fit each other or the teacher cannot be read.
    """
    return TokenFlow(config, _load_teacher(config))


def _load_teacher(config: Config) -> VisionTeacher | None:
    teacher = config.teacher
    if teacher is None:
        return None
    if teacher.weights is None:
        raise UserError(
            f"tokenflow: teacher.weights names no file: give the weights of timm's {config.encoder} "
            "(tokenizer.args.teacher.weights=FILE; tokenizer.args.teacher=null trains the pixel branch alone)"
        )
    args = {**config.encoder_args, "img_size": config.image_size}
    return load_teacher(config.encoder, teacher.weights, config.target_width or 0, config.penultimate, **args)
