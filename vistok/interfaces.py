"""The contracts between the rooms of the house: tokenizers, generators, conditions and what a loss reports.

Images are float32 ``(B, 3, H, W)`` in [-1, 1] at every boundary; a model's own normalisation happens inside it.
Everything else in the package (data, training, evaluation, command lines) is written against these classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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
        reconstruction: the batch as decoded, with its gradients, float32: what perceptual and adversarial losses judge.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    stats: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    tokens: Tokens | None = None
    reconstruction: Float[Tensor, "B 3 H W"] | None = None

    def plus(self, name: str, value: Float[Tensor, ""]) -> LossReport:
        """This report with one term more."""
        return replace(self, total=self.total + value, terms={**self.terms, name: value})


class Condition(ABC):
    """What a generator is asked for: one row for each sample, and an explicit null."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> Self: ...

    @abstractmethod
    def null(self) -> Self:
        """The explicit unconditional counterpart."""

    @abstractmethod
    def join(self, other: Self) -> Self:
        """Both batches in one, for guidance in a single pass."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self: ...

    def dropped(self, drop: Bool[Tensor, " B"], null: Self | None = None) -> Self:
        """These rows, ``null`` (None: :meth:`null`) where ``drop``: what one that shall be guided is trained on."""
        rows = torch.arange(len(self), device=drop.device)
        return self.join(self.null() if null is None else null)[torch.where(drop, rows + len(self), rows)]


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Condition on a class label.

    Args:
        class_ids: int64 ``(B,)``; :data:`NULL_CLASS` means unconditional.
    """

    class_ids: Int[Tensor, " B"]

    def __len__(self) -> int:
        return self.class_ids.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> ClassCondition:
        return ClassCondition(self.class_ids[rows])

    def null(self) -> ClassCondition:
        return ClassCondition(torch.full_like(self.class_ids, NULL_CLASS))

    def join(self, other: ClassCondition) -> ClassCondition:
        return ClassCondition(torch.cat([self.class_ids, other.class_ids]))

    def to(self, device: torch.device | str) -> ClassCondition:
        return ClassCondition(self.class_ids.to(device))


@dataclass(frozen=True)
class TextCondition(Condition):
    """Condition on texts, as a frozen :class:`TextEncoder` sees them.

    Args:
        states: float32 ``(B, L, C)``.
        mask: True at the states of the text, ``(B, L)``; what stands elsewhere has no influence.
        null_states: ``(1, L0, C)``, of the empty text "": what unconditional means.
        null_mask: ``(1, L0)``.
        is_negative: unconditional means another text than the empty one, see :meth:`away_from`.
    """

    states: Float[Tensor, "B L C"]
    mask: Bool[Tensor, "B L"]
    null_states: Float[Tensor, "1 L0 C"]
    null_mask: Bool[Tensor, "1 L0"]
    is_negative: bool = False

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> TextCondition:
        return replace(self, states=self.states[rows], mask=self.mask[rows])

    def null(self) -> TextCondition:
        count = len(self)
        return replace(self, states=self.null_states.expand(count, -1, -1), mask=self.null_mask.expand(count, -1))

    def away_from(self, negative: TextCondition) -> TextCondition:
        """The same texts with the only one of ``negative``, a negative prompt, in the place of the empty text."""
        return replace(self, null_states=negative.states, null_mask=negative.mask, is_negative=True)

    def join(self, other: TextCondition) -> TextCondition:
        length = max(self.mask.shape[1], other.mask.shape[1])
        parts = [(part, length - part.mask.shape[1]) for part in (self, other)]
        states = torch.cat([F.pad(part.states, (0, 0, 0, missing)) for part, missing in parts])
        return replace(self, states=states, mask=torch.cat([F.pad(part.mask, (0, missing)) for part, missing in parts]))

    @staticmethod
    def stacked(rows: list[TextCondition]) -> TextCondition:
        """A batch of conditions of one row each, padded on the right; they have one null."""
        parts = ([row.states[0] for row in rows], [row.mask[0] for row in rows])
        states, mask = (pad_sequence(part, batch_first=True) for part in parts)
        return replace(rows[0], states=states, mask=mask)

    def to(self, device: torch.device | str) -> TextCondition:
        parts = ("states", "mask", "null_states", "null_mask")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})


@dataclass(frozen=True)
class SampleOptions:
    """How a generator samples. Where something changes on the way, the share of the codes that are known counts.

    Args:
        cfg_scale: guidance ``u + cfg_scale * (c - u)``; 1 is the conditional model, 0 the unconditional one.
        guidance_interval: guide only while the share lies in [a, b) (Kynkaanniemi et al. 2024): the first k of N codes
            by (0, k / N).
        temperature: divides the logits; 0 takes the most likely code.
        final_temperature: what the temperature moves to with the share, in a straight line; None leaves it.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes whose probability reaches p; 1 keeps all.
        min_p: keep the codes that are at least p times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all.
        num_tokens: positions to generate, one of ``spec.layout.prefixes``; None generates all.
        use_cache: keep keys and values of past positions (off only to check or time the cache).
        compile: run steps of one shape through ``torch.compile``, as CUDA graphs on a GPU; slow to start.
        extra: options of one kind of generator, see :attr:`Generator.sample_defaults`.

    Raises:
        UserError: if a value is outside its range.
    """

    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    final_temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_tokens: int | None = None
    use_cache: bool = True
    compile: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cfg_scale", "temperature", "final_temperature", "top_k"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # nor may it be nan
                raise UserError(f"{name} must be at least 0 and finite, got {value}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], got {self.min_p}")
        first, end = self.guidance_interval
        if not 0 <= first <= end <= 1:
            raise UserError(f"guidance_interval must be two shares, 0 <= a <= b <= 1, got {first:g} and {end:g}")
        if self.compile and not self.use_cache:
            raise UserError("compile needs use_cache: without it every step has another shape")


class Autoencoder(nn.Module, ABC):
    """Images to a code and back: a :class:`Tokenizer` or a :class:`LatentTokenizer`.

    Laws, tested for every registered one: ``decode`` returns images of the size it was given; the same seeds give the
    same images; a batch of one equals a row of a batch; frozen helpers are in neither parameters nor state.
    """

    spec: TokenSpec

    decode: Callable[..., Float[Tensor, "B 3 H W"]]
    """Images around [-1, 1] of a code, see the two kinds."""

    training_only: tuple[str, ...] = ()
    """Parts that only :meth:`training_loss` needs, named alike as config argument and as attribute: not exported."""

    latent_shape: tuple[int, int, int] | None = None
    """``(C, h, w)`` of the latents of a frozen autoencoder, for a tokenizer that reads them in place of images."""

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

    @property
    def latent_hash(self) -> str:
        """Identity of the autoencoder behind :attr:`latent_shape`, hex: cached latents of another do not fit."""
        return ""

    @property
    def encoding_tower(self) -> nn.Module | None:
        """The transformer that reads images, whose tokens :mod:`vistok.merging` can merge; None without one."""
        return None

    @property
    def last_layer(self) -> Tensor | None:
        """Weight of the layer that makes :attr:`LossReport.reconstruction`, for an adaptive adversarial weight."""
        return None

    def encode_latent(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents of ``images``; what has :attr:`latent_shape` already, or has no latents, passes as it is."""
        return images

    def encode_moments(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2*C h w"]:
        """Mean and standard deviation of the latents of ``images``, for an autoencoder that describes a distribution.

        Raises:
            UserError: for one that does not.
        """
        raise UserError(f"{type(self).__name__} draws no latents: it has no moments")

    def decode_latent(self, latent: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Inverse of :meth:`encode_latent`."""
        return latent

    @property
    def feature_defaults(self) -> dict[str, Any]:
        """Options of :meth:`features`, with the values it takes unless told otherwise."""
        return {}

    def features(self, images: Float[Tensor, "B 3 H W"], **options: Any) -> Float[Tensor, "B N D"]:
        """What this model understands of ``images``, one vector per position, without gradients.

        Args:
            images: in [-1, 1].
            options: of this model, see :attr:`feature_defaults`.

        Raises:
            UserError: if it was not made to understand anything.
        """
        raise UserError(f"{type(self).__name__} has no features for understanding")

    @abstractmethod
    def training_loss(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """Loss of one batch; every draw comes from ``rng``."""

    def forward(self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> LossReport:
        """:meth:`training_loss`, so that wrappers of modules (DDP, compile) see the training pass."""
        return self.training_loss(images, rng)

    def check_images(self, images: Float[Tensor, "B 3 H W"]) -> None:
        """Raise UserError unless ``images`` is a float batch of RGB images of this tokenizer's size, or of latents."""
        size = self.spec.image_size_px
        is_image = images.ndim == 4 and images.shape[1:] == (3, size, size)
        if not (is_image or self.is_latent(images)) or not images.is_floating_point():
            latents = f" or latents (B, {', '.join(map(str, self.latent_shape))})" if self.latent_shape else ""
            raise UserError(
                f"this tokenizer reads float images (B, 3, {size}, {size}) in [-1, 1]{latents}, "
                f"got {images.dtype} {tuple(images.shape)}"
            )

    def check_decode_options(self, options: dict[str, Any]) -> None:
        """Raise UserError for one that is not among :attr:`decode_defaults`."""
        for name in options:
            if name not in self.decode_defaults:
                valid = ", ".join(self.decode_defaults) or "it has none"
                raise UserError(f"unknown decode option {name!r} of a {type(self).__name__} (valid: {valid})")

    def is_latent(self, images: Float[Tensor, "B C h w"]) -> bool:
        """Whether a batch holds latents of :attr:`latent_shape` in place of images."""
        return images.ndim == 4 and tuple(images.shape[1:]) == self.latent_shape


class Tokenizer(Autoencoder):
    """Images to discrete tokens and back."""

    @property
    def scale_codes(self) -> nn.Module | None:
        """Of a multi-scale tokenizer, a frozen copy of its :class:`~vistok.quantizers.residual_multiscale.ScaleCodes`.

        A next-scale generator reads what the codes of the coarser scales add up to: it needs their vectors.
        """
        return None

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
        """Images around [-1, 1], not clipped, of ``tokens`` or of the latents ``embed(tokens)``.

        Args:
            tokens: codes or latents.
            rng: one stream per image for decoders that sample; None draws fresh ones.
            options: of this tokenizer, see :attr:`decode_defaults`.
        """


class LatentTokenizer(Autoencoder):
    """Images to continuous latents and back: the same layouts, ``spec.latent_dim`` floats instead of slots.

    Any of these becomes a :class:`Tokenizer` after its training by quantizing its latents (TokenBridge).
    """

    @abstractmethod
    def encode(self, images: Float[Tensor, "B 3 H W"], rng: SampleRng | None = None) -> Float[Tensor, "B N C"]:
        """Float32 latents of ``images`` in [-1, 1], without gradients.

        Args:
            images: a batch.
            rng: one stream per image for encoders that describe a distribution; None takes its mode, which is
                deterministic.
        """

    @abstractmethod
    def decode(
        self, latents: Float[Tensor, "B N C"], rng: SampleRng | None = None, **options: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Images around [-1, 1], not clipped, of ``latents``; arguments as :meth:`Tokenizer.decode`."""


class TextEncoder(nn.Module, ABC):
    """A frozen reader of captions and prompts: no gradients, float32 states under any autocast.

    Laws: the states of a text do not depend on the texts beside it; the empty text has at least one state; a text that
    loses words is told of, or refused, by :class:`vistok.text_encoders.lengths.Limit`.

    Attributes:
        width: channels C of its states.
    """

    width: int

    @abstractmethod
    def encode(self, texts: list[str]) -> TextCondition:
        """One row for each text, on the encoder's device."""

    @abstractmethod
    def spans(self, text: str) -> list[tuple[int, int]]:
        """The characters that each state of a text stands for, the last one exclusive; none for the end of it."""

    @property
    @abstractmethod
    def states_hash(self) -> str:
        """Identity of what :meth:`encode` makes of texts, hex: cached states of another encoder do not fit."""


class Generator(nn.Module, ABC):
    """A distribution over the tokens of one :class:`TokenSpec`, given a condition. It never sees pixels.

    Attributes:
        spec: the tokens.
        num_classes: classes it knows, 0 for none.
        text_width: channels of the text states that it is conditioned on; 0 for a generator of classes.
        text_positions: most states of a text that it has room for; 0 for any number.
    """

    spec: TokenSpec
    num_classes: int
    text_width: int = 0
    text_positions: int = 0

    @property
    def sample_defaults(self) -> dict[str, Any]:
        """Options of :meth:`generate` that only this kind has, with the values they take unless told otherwise."""
        return {}

    steps_are_alike: bool = False
    """Whether the steps of a generation have one shape, as :attr:`SampleOptions.compile` needs it."""

    @property
    def train_flops(self) -> float | None:
        """Floating-point operations of one sample's forward and backward pass; None where nobody counted them.

        By the convention of PaLM (arXiv 2204.02311, appendix B): two for each weight of a matrix product at each
        position and as many for each pair of positions in an attention, hidden ones included; backward twice that.
        Embeddings, norms and whatever an activation checkpoint computes once more do not count.
        """
        return None

    def sample_settings(self, options: SampleOptions) -> dict[str, Any]:
        """:attr:`sample_defaults`, with what ``options.extra`` says in their place.

        Raises:
            UserError: for an option that this generator does not have.
        """
        if options.compile and not self.steps_are_alike:
            raise UserError(f"compile: the steps of a {type(self).__name__} differ in shape; it runs uncompiled only")
        for name in options.extra:
            if name not in self.sample_defaults:
                raise UserError(f"this generator has no sampling option {name!r}: {sorted(self.sample_defaults)}")
        return self.sample_defaults | options.extra

    @classmethod
    @abstractmethod
    def check(cls, spec: TokenSpec) -> None:
        """Raise UserError, with the reason, when this generator cannot model ``spec``."""

    def adopt(self, tokenizer: Tokenizer) -> None:
        """Take over what this generator needs of the tokenizer whose tokens it will model, before its first update.

        It becomes part of the generator's state and is not trained. Most generators need nothing.
        """

    def at_progress(self, share: float) -> None:
        """Told before every update which share of the run's updates is done; most generators do not care."""

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
        """:meth:`loss`, so that wrappers of modules (DDP, compile) see the training pass.

        Raises:
            UserError: for tokens of another tokenizer; a legal prefix of an ordered code is one of this.
        """
        if tokens.spec != self.spec:
            raise UserError(f"this generator models tokens of {self.spec}, got {tokens.spec}")
        return self.loss(tokens, condition, rng)

    def check_condition(self, condition: Condition) -> None:
        """Raise UserError for the other kind of condition, an unknown class, or states of no text or another width."""
        if isinstance(condition, TextCondition):
            self._check_text(condition)
        elif isinstance(condition, ClassCondition):
            self._check_classes(condition.class_ids.tolist())

    def _check_classes(self, ids: list[int]) -> None:
        if self.text_width:
            raise UserError("this generator is conditioned on text: it takes a prompt, no class")
        if ids and not (min(ids) >= NULL_CLASS and max(ids) < self.num_classes):
            raise UserError(
                f"class ids must lie in 0..{self.num_classes - 1} ({NULL_CLASS} for none), got {min(ids)}..{max(ids)}"
            )

    def _check_text(self, condition: TextCondition) -> None:
        if not self.text_width:
            raise UserError("this generator is conditioned on classes: it takes a class, no prompt")
        width = condition.states.shape[-1]
        if width != self.text_width:
            raise UserError(
                f"this generator reads text states of {self.text_width} channels, got {width}: "
                "give it the text encoder that it was trained with"
            )
        if not bool(condition.mask.any(dim=1).all()):
            raise UserError("a text without any state (a row of its mask is all False) cannot condition a generator")
