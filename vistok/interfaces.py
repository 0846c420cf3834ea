"""The contracts between the rooms of the house: tokenizers, generators, conditions and what a loss reports.

Images are float32 ``(B, 3, H, W)`` in [-1, 1] at every boundary; a model's own normalisation happens inside it.
Everything else in the package (data, training, evaluation, command lines) is written against these classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.errors import UserError
from vistok.rng import SampleRng
from vistok.tokens import Tokens, TokenSpec

NULL_CLASS = -1
"""Class id of the unconditional branch."""


@dataclass
class LossReport:
    """What one evaluation of a training loss returns.

    Args:
        total: scalar that is differentiated.
        terms: the weighted scalars that add up to ``total``, by name.
        stats: detached scalars worth a line in the log.
        tokens: codes used in this batch, for codebook statistics.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    stats: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    tokens: Tokens | None = None


@dataclass(frozen=True)
class ClassCondition:
    """Condition on a class label.

    Args:
        class_ids: int64 ``(B,)``; :data:`NULL_CLASS` means unconditional.
    """

    class_ids: Int[Tensor, " B"]

    def __len__(self) -> int:
        return self.class_ids.shape[0]

    def __getitem__(self, rows: slice) -> ClassCondition:
        return ClassCondition(self.class_ids[rows])

    def null(self) -> ClassCondition:
        """The explicit unconditional counterpart."""
        return ClassCondition(torch.full_like(self.class_ids, NULL_CLASS))

    def join(self, other: ClassCondition) -> ClassCondition:
        """Both batches in one, for guidance in a single pass."""
        return ClassCondition(torch.cat([self.class_ids, other.class_ids]))

    def to(self, device: torch.device | str) -> ClassCondition:
        return ClassCondition(self.class_ids.to(device))


Condition = ClassCondition


@dataclass(frozen=True)
class SampleOptions:
    """How a generator samples.

    Args:
        cfg_scale: guidance ``u + cfg_scale * (c - u)``; 1 is the conditional model, 0 the unconditional one.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes whose probability reaches p; 1 keeps all.
        num_tokens: positions to generate; only ordered layouts may ask for fewer than all.
        guided_tokens: guide only the first positions; None guides all.
        use_cache: keep keys and values of past positions (off only to check or time the cache).

    Raises:
        UserError: if a value is outside its range.
    """

    cfg_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_tokens: int | None = None
    guided_tokens: int | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0 (0 keeps all), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.cfg_scale < 0:
            raise UserError(f"cfg_scale must be at least 0, got {self.cfg_scale}")

    def scale_at(self, position: int) -> float:
        """Guidance scale of a position."""
        return self.cfg_scale if self.guided_tokens is None or position < self.guided_tokens else 1.0


class Tokenizer(nn.Module, ABC):
    """Images to discrete tokens and back.

    Laws, tested for every registered tokenizer: ``decode`` returns images of the size it was given; the same seeds
    give the same images; a batch of one equals a row of a batch; frozen helpers are in neither parameters nor state.
    """

    spec: TokenSpec

    @property
    def decode_defaults(self) -> dict[str, Any]:
        """Options of :meth:`decode` that change images, with the values it takes unless told otherwise."""
        return {}

    @property
    def frozen_helpers(self) -> dict[str, Any]:
        """Frozen models that this one cannot work without, by the config argument that names their folder.

        They have diffusers' and transformers' ``save_pretrained(folder)``; exports carry a copy.
        """
        return {}

    @abstractmethod
    def tokenize(self, images: Float[Tensor, "B 3 H W"]) -> Tokens:
        """Codes of ``images`` in [-1, 1]; deterministic, without gradients."""

    @abstractmethod
    def embed(self, tokens: Tokens) -> Float[Tensor, "B N C"]:
        """Latents that ``tokens`` stand for, ``C = spec.latent_dim``."""

    @abstractmethod
    def decode(
        self, tokens: Tokens | Float[Tensor, "B N C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of ``tokens`` or of the latents ``embed(tokens)``.

        Args:
            tokens: codes or latents.
            rng: one stream per image for decoders that sample; None draws fresh ones.
            options: of this tokenizer, see :attr:`decode_defaults`.
        """

    @abstractmethod
    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Loss of one batch; every draw comes from ``rng``."""

    def forward(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """:meth:`training_loss`, so that wrappers of modules (DDP, compile) see the training pass."""
        return self.training_loss(images, rng)

    def check_images(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """Raise UserError unless ``images`` is a float batch of RGB images of this tokenizer's size."""
        size = self.spec.image_size_px
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not images.is_floating_point():
            raise UserError(
                f"this tokenizer reads float images (B, 3, {size}, {size}) in [-1, 1], "
                f"got {images.dtype} {tuple(images.shape)}"
            )


class Generator(nn.Module, ABC):
    """A distribution over the tokens of one :class:`TokenSpec`, given a condition. It never sees pixels."""

    spec: TokenSpec
    num_classes: int

    @classmethod
    @abstractmethod
    def check(cls, spec: TokenSpec) -> None:
        """Raise UserError, with the reason, when this generator cannot model ``spec``."""

    @abstractmethod
    def loss(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """Training loss in nats per code; condition dropout and every other draw come from ``rng``."""

    @abstractmethod
    def generate(
        self,
        condition: Condition,
        options: SampleOptions,
        rng: SampleRng,
        progress: Callable[[int], None] | None = None,
    ) -> Tokens:
        """Sample one code for each row of ``condition``; sample i depends on stream i alone.

        Args:
            condition: one row for each sample.
            options: guidance and filtering.
            rng: one stream per sample.
            progress: called with the number of positions done since the last call.
        """

    def forward(self, tokens: Tokens, condition: Condition, rng: torch.Generator) -> LossReport:
        """:meth:`loss`, so that wrappers of modules (DDP, compile) see the training pass."""
        return self.loss(tokens, condition, rng)

    def check_condition(self, condition: Condition) -> None:
        """Raise UserError for a class id outside the range."""
        ids = condition.class_ids
        if len(ids) and not (int(ids.min()) >= NULL_CLASS and int(ids.max()) < self.num_classes):
            raise UserError(
                f"class ids must lie in 0..{self.num_classes - 1} ({NULL_CLASS} for none), "
                f"got {int(ids.min())}..{int(ids.max())}"
            )
