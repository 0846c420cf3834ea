"""The two transformers of FlexTok: images' latents to register codes, and noise and codes to a velocity."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vistok.nn.modulation import AdaLN, TimestepEmbedding, modulate
from vistok.nn.patch import patchify, sincos_2d, unpatchify
from vistok.nn.transformer import Block

if TYPE_CHECKING:
    from vistok.tokenizers.flextok import Config

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
    """Latent -> unquantized register codes, from the sequence ``[patches | registers]``.

    Attributes:
        num_patches: of a latent of the model's size.
        num_suffix_tokens: registers. They never merge (see :mod:`vistok.merging`), and the mask of the blocks treats
            all patches alike.
        reads_grid: False: the codes are those of the registers, so that patches may be fewer behind each block.
    """

    positions: Tensor
    reads_grid = False

    def __init__(self, channels: int, grid: int, config: Config) -> None:
        super().__init__()
        width = config.encoder_width
        self.patch_size = config.patch_size
        self.num_patches, self.num_suffix_tokens = grid**2, config.num_registers
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
        mask = self._mask(x.shape[1], x.device)
        x = torch.cat([x, self.registers.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, -len(self.registers) :]))

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

    @staticmethod
    def merge(
        condition: Float[Tensor, "B N D"], distinct: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B n"] | None]:
        """The same condition in fewer registers, for sampling.

        Mask tokens carry no position, so those of a row are equal and remain so in every block: one of them, with the
        logarithm of their number on its attention logits, does the work of all, up to rounding. The same holds for the
        null tokens of a row without codes.

        Args:
            condition: from :meth:`condition`.
            distinct: registers at the front of each row that are not equal to all that follow: ``keep``, or 0 for null.

        Returns:
            The registers, and what to add to the logits of their keys; None if there is nothing to add.
        """
        registers = condition.shape[1]
        longest = int(distinct.max())
        if longest == registers and bool((distinct == registers).all()):
            return condition, None
        place = torch.arange(min(longest + 1, registers), device=condition.device)
        number = torch.where(place == distinct[:, None], registers - place, (place < distinct[:, None]).long())
        return condition[:, : len(place)], number.log()

    def forward(
        self,
        noised: Float[Tensor, "B C h w"],
        time: Float[Tensor, " B"],
        condition: Float[Tensor, "B n D"],
        bias: Float[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """The velocity, with ``bias`` (see :meth:`merge`) on the logits of the registers."""
        return self.with_features(noised, time, condition, bias=bias)[0]

    def with_features(
        self,
        noised: Float[Tensor, "B C h w"],
        time: Float[Tensor, " B"],
        condition: Float[Tensor, "B n D"],
        layer: int | None = None,
        bias: Float[Tensor, "B n"] | None = None,
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B rows columns D"] | None]:
        """The velocity, and the patches behind block ``layer`` (from 0) if that is not None."""
        features = None
        height, width = (side // self.patch_size for side in noised.shape[-2:])
        x = self.patch_in(patchify(noised.to(self.patch_in.weight.dtype), self.patch_size))
        x = torch.cat([x + self.positions[:height, :width].flatten(0, 1), condition.to(x.dtype)], dim=1)
        lengths = (height * width, condition.shape[1])
        mask = None if bias is None else F.pad(bias, (lengths[0], 0))[:, None, None].to(x.dtype)
        time_vector = self.time(time)
        for index, block in enumerate(self.blocks):
            x = block(x, mask, condition=time_vector, lengths=lengths)
            if index == layer:
                features = x[:, : height * width].unflatten(1, (height, width))
        shift, scale = self.head_modulation(time_vector)
        x = self.head(modulate(self.norm(x[:, : height * width]), shift, scale))
        return unpatchify(x, self.patch_size, height, width), features
