"""UniFlow: a pretrained vision encoder whose features become pixels again through a flow in each patch.

Yue et al., "UniFlow: A Unified Pixel Flow Tokenizer for Visual Understanding and Generation", ICLR 2026 (arXiv
2510.10575).

    image (B,3,H,W) --timm encoder--> features (B,N,D) --projection--> latents (B,N,C)
    latents --condition tower, global blocks--> condition (B,N,D') --flow of each patch, from noise--> image

The encoder stays what it was by layer-wise self-distillation from a frozen copy; decoder and projection learn from the
velocity of a rectified flow alone. One Euler step gives the mean of the images that fit the latents. Latents have no
fixed scale: what models them standardises their channels (``python -m vistok.discretize`` does).

The release has no training code. From the paper: both losses with weight 1, beta 2. Ours: a time for each patch, and
what :mod:`vistok.losses.distillation` names. Images of another size than the release's: its position tables are
resampled (bicubic; the encoder's as its own code does, the decoder's, which the release cannot, alike).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from omegaconf import MISSING
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.flow.guidance import guide
from vistok.flow.path import interpolate, target_velocity
from vistok.flow.solvers import euler
from vistok.flow.time import fat_logit_normal_time
from vistok.interfaces import LatentTokenizer, LossReport
from vistok.losses.distillation import layer_distances, layer_weights
from vistok.nn.frozen import Frozen
from vistok.nn.patch import patchify, unpatchify
from vistok.nn.precision import exact
from vistok.nn.transformer import MLP
from vistok.nn.vision_teacher import VisionTower, load_teacher, make_tower
from vistok.rng import SampleRng
from vistok.tokenizers.uniflow_networks import ConditionTower, PatchFlow
from vistok.tokens import Grid2D, TokenSpec


@dataclass
class DistillationConfig:
    """Where the encoder starts, and how strongly it is held there.

    Args:
        weights: of the encoder, see :func:`~vistok.nn.vision_teacher.load_teacher`: where the student starts, and the
            frozen teacher.
        weight: factor on the loss; 0 lets the encoder go where pixels pull it.
        beta: how much a layer that has strayed counts more.
    """

    weights: str = MISSING
    weight: float = 1.0
    beta: float = 2.0


@dataclass
class Config:
    """Sizes and training choices; the defaults are the released model (InternViT-300M, 448 px).

    Args:
        image_size: side of the images, px.
        encoder: timm name of a vision transformer.
        encoder_args: more arguments of ``timm.create_model``, such as ``drop_path_rate: 0.1``.
        latent_channels: channels C of the latents.
        global_blocks: of the condition tower; without them patches cannot agree.
        global_heads: attention heads of those.
        flow_blocks: residual blocks of the patches' flow.
        flow_width: its channels; fewer than a patch has values leave noise in every picture.
        steps: Euler steps of ``decode`` unless told otherwise.
        power: of the schedule of steps unless told otherwise, see :func:`~vistok.flow.solvers.euler`.
        null_probability: share of images whose condition is trained as zeros, for guidance; the release has none.
        guidance: scale of the guidance of ``decode`` unless told otherwise; 1 is none.
        distillation: from the pretrained encoder; None starts from random weights, without a teacher.
    """

    image_size: int = 448
    encoder: str = "vit_intern300m_patch14_448"
    encoder_args: dict[str, Any] = field(default_factory=dict)
    latent_channels: int = 64
    global_blocks: int = 6
    global_heads: int = 16
    flow_blocks: int = 12
    flow_width: int = 1024
    steps: int = 1
    power: float = 1.0
    null_probability: float = 0.0
    guidance: float = 1.0
    distillation: DistillationConfig | None = None


class Distillation(nn.Module):
    """The teacher and its loss.

    Args:
        config: see :class:`DistillationConfig`.
        teacher: no part of parameters and state dict.
    """

    def __init__(self, config: DistillationConfig, teacher: VisionTower) -> None:
        super().__init__()
        self.config = config
        self.teacher = Frozen(teacher)

    def forward(self, layers: list[Float[Tensor, "B N D"]], images: Float[Tensor, "B 3 H W"]) -> LossReport:
        """The weighted loss of the student's ``layers``, and how far all and the worst of them have strayed."""
        with torch.no_grad():
            target = self.teacher.on(images.device).with_layers(images)[1]
        distances = layer_distances(layers, target)
        loss = self.config.weight * (layer_weights(distances, self.config.beta) * distances).sum()
        stats = {"cosine_distance": distances.mean(), "worst_layer_distance": distances.max()}
        return LossReport(loss, {"distillation": loss}, stats)


class UniFlow(LatentTokenizer):
    """See the module docstring; build it with :func:`build`.

    Args:
        config: sizes and training choices.
        encoder: the student.
        teacher: that ``config.distillation`` holds it to, or None.
    """

    training_only = ("distillation",)

    def __init__(self, config: Config, encoder: VisionTower, teacher: VisionTower | None = None) -> None:
        super().__init__()
        self.config = config
        _check_ranges(config, encoder)
        width, values = encoder.width, 3 * encoder.patch_size**2
        if config.flow_width < values:
            warnings.warn(
                f"uniflow: a patch has {values} values, more than flow_width {config.flow_width}: the noise cannot "
                f"pass the flow, whose loss stays above {1 - config.flow_width / values:.2f}",
                stacklevel=3,
            )
        self.spec = TokenSpec(Grid2D(*encoder.grid), (), config.latent_channels, config.image_size)
        self.encoder = encoder
        self.project = MLP(width, width, out=config.latent_channels)
        self.tower = ConditionTower(
            config.latent_channels, width, encoder.grid, config.global_blocks, config.global_heads
        )
        self.flow = PatchFlow(values, width, config.flow_width, config.flow_blocks)
        for part in (self.project, self.tower, self.flow):
            part.apply(_init_linear)
        self.distillation: Distillation | None = None
        if config.distillation is not None and teacher is not None:
            self.distillation = Distillation(config.distillation, teacher)

    @classmethod
    def from_published(cls, path_or_hub_id: str, image_size: int | None = None) -> UniFlow:
        """The released tokenizer, in eval mode.

        Args:
            path_or_hub_id: ``model.safetensors``, its folder, or the repository ``yuezhengrong/UniFlow``.
            image_size: side of the images, px, a multiple of the patch; by default that of the release.

        Raises:
            UserError: naming the file, key or shape that is missing or does not fit.
        """
        from vistok.tokenizers.uniflow_published import load_published

        return load_published(path_or_hub_id, image_size)

    @property
    def encoding_tower(self) -> VisionTower:
        """Where the patches of an image can merge while encoding, see :mod:`vistok.merging`; decoding, in ``tower``."""
        return self.encoder

    @property
    def decode_defaults(self) -> dict[str, Any]:
        """Steps, their schedule, and guidance."""
        return {"steps": self.config.steps, "power": self.config.power, "guidance": self.config.guidance}

    @property
    def feature_defaults(self) -> dict[str, Any]:
        """``part``: ``encoder`` for what the encoder sees, ``latents`` for what the projection leaves of it."""
        return {"part": "encoder"}

    @torch.no_grad()
    def features(self, images: Float[Tensor, "B 3 H W"], *, part: str = "encoder", **unknown: Any) -> Tensor:
        """Features ``(B, N, D)`` of the encoder, or the latents ``(B, N, C)``.

        Raises:
            UserError: for another part, or another option.
        """
        if unknown or part not in ("encoder", "latents"):
            raise UserError(f"uniflow: features take part=encoder or part=latents, got {unknown or part!r}")
        self.check_images(images)
        with exact(images.device):
            features = self.encoder(images.float()).flatten(1, 2)
            return features if part == "encoder" else self.project(features)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"], rng: SampleRng | None = None) -> Float[Tensor, "B N C"]:
        """Latents; there is nothing to draw."""
        return self.features(images, part="latents")

    @torch.no_grad()
    def decode(
        self,
        latents: Float[Tensor, "B N C"],
        rng: SampleRng | None = None,
        *,
        steps: int | None = None,
        power: float | None = None,
        guidance: float | None = None,
        progress: Callable[[int], None] | None = None,
        **unknown: Any,
    ) -> Float[Tensor, "B 3 H W"]:
        """Images of ``latents``.

        Args:
            latents: of :meth:`encode`.
            rng: streams of the initial noise.
            steps: Euler steps; one step gives the mean of the images that fit the latents, more give a sample.
            power: of the schedule, see :func:`~vistok.flow.solvers.euler`.
            guidance: scale of the guidance against a condition of zeros; 1 is none.
            progress: called with 1 after each step.
            unknown: refused by name.

        Raises:
            UserError: for an unknown option or one outside its range.
        """
        self.check_decode_options(unknown)
        options = {"steps": steps, "power": power, "guidance": guidance}
        chosen = self.decode_defaults | {name: value for name, value in options.items() if value is not None}
        if chosen["steps"] < 1 or chosen["power"] <= 0:
            raise UserError(
                f"uniflow: steps must be at least 1 and power positive, got {chosen['steps']} and {chosen['power']}"
            )
        shape = (3, self.config.image_size, self.config.image_size)
        noise = torch.randn(len(latents), *shape) if rng is None else rng.normal(*shape)
        pixels = self.sample_pixels(noise.to(latents.device), self.tower(latents), **chosen, progress=progress)
        return self.encoder.images(pixels)

    def sample_pixels(
        self,
        noise: Float[Tensor, "B 3 H W"],
        condition: Float[Tensor, "B N D"],
        steps: int,
        power: float = 1.0,
        guidance: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Pixels as the encoder reads them: the velocity of every patch integrated from ``noise``."""

        def velocity(x: Tensor, time: Float[Tensor, " B"]) -> Tensor:
            time = 1 - time[:, None]  # ours runs from data to noise
            conditional = self.flow(x, time, condition).float()
            if guidance == 1:
                return -conditional
            return -guide(conditional, self.flow(x, time, torch.zeros_like(condition)).float(), guidance)

        patches = euler(velocity, patchify(noise, self.encoder.patch_size), steps, progress, power)
        return unpatchify(patches, self.encoder.patch_size, *self.encoder.grid)

    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Mean squared error of the velocity, and the distance from the teacher if there is one."""
        self.check_images(images)

        def draw(sample: Callable[..., Tensor], *shape: int) -> Tensor:
            return sample(shape, generator=rng, device=rng.device).to(images.device)

        features, layers = self.encoder.with_layers(images)
        condition = self.tower(self.project(features))
        null = draw(torch.rand, len(images), 1, 1) < self.config.null_probability
        condition = condition.masked_fill(null, 0)
        patches = patchify(self.encoder.pixels(images), self.encoder.patch_size)
        grid = patches.shape[:2]
        time = fat_logit_normal_time(draw(torch.randn, *grid), draw(torch.rand, *grid), draw(torch.rand, *grid))
        noise = draw(torch.randn, *patches.shape)
        noised = interpolate(patches.flatten(0, 1), noise.flatten(0, 1), time.flatten()).view_as(patches)
        velocity = -self.flow(noised, 1 - time, condition).float()
        loss = F.mse_loss(velocity, target_velocity(patches, noise))
        terms, stats = {"velocity": loss}, {}
        if self.distillation is not None:
            report = self.distillation(layers, images)
            loss, terms, stats = loss + report.total, terms | report.terms, report.stats
        return LossReport(loss, terms, stats)


def _init_linear(module: nn.Module) -> None:
    """Weights of std 0.02 in all layers, modulations and head included: the released code undoes its zeros."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)
        nn.init.zeros_(module.bias)


def _check_ranges(config: Config, encoder: VisionTower) -> None:
    """Raise UserError for sizes that no model can have."""
    for name in ("latent_channels", "global_heads", "flow_width", "steps"):
        if getattr(config, name) < 1:
            raise UserError(f"uniflow: {name} must be at least 1, got {getattr(config, name)}")
    for name in ("global_blocks", "flow_blocks"):
        if getattr(config, name) < 0:
            raise UserError(f"uniflow: {name} must be at least 0, got {getattr(config, name)}")
    if config.power <= 0 or not 0 <= config.null_probability <= 1:
        raise UserError("uniflow: power must be positive and null_probability lie in [0, 1]")
    if encoder.width % config.global_heads or encoder.width % 4:
        raise UserError(
            f"uniflow: the encoder's width {encoder.width} must be a multiple of 4 and of global_heads "
            f"{config.global_heads}"
        )
    if config.distillation is not None and (config.distillation.weight < 0 or config.distillation.beta < 0):
        raise UserError("uniflow: distillation.weight and distillation.beta must be at least 0")


from_published = UniFlow.from_published


def build(config: Config) -> UniFlow:
    """A UniFlow with a fresh decoder, and an encoder from its file if there is one to start from.

    Raises:
        UserError: if sizes do not fit each other, or the encoder is unknown to timm or cannot be read.
    """
    encoder = make_encoder(config)
    if config.distillation is None:
        return UniFlow(config, encoder)
    teacher = load_teacher(
        config.encoder, config.distillation.weights, **{**config.encoder_args, "img_size": config.image_size}
    )
    state = teacher.model.state_dict()  # with a pooling that the student lacks, if timm has one
    encoder.model.load_state_dict({key: state[key] for key in encoder.model.state_dict()})
    return UniFlow(config, encoder, teacher)


def make_encoder(config: Config) -> VisionTower:
    """The student, with fresh weights.

    Raises:
        UserError: if timm does not know it, or ``image_size`` is no multiple of its patch.
    """
    encoder = make_tower(config.encoder, **{**config.encoder_args, "img_size": config.image_size})
    if config.image_size % encoder.patch_size:
        raise UserError(
            f"uniflow: image_size {config.image_size} is no multiple of the encoder's patch of {encoder.patch_size} px"
        )
    return encoder
