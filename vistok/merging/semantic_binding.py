"""Text-side edits that bind attributes to their objects, as functions on tensors.

Two methods, neither of which trains anything:

- *Token Merging for Training-Free Semantic Binding in Text-to-Image Synthesis* (arXiv 2411.07132): the tokens of an
  entity ("white cat") are summed into one composite token; what stands behind the end of the prompt is taken from a
  prompt without attributes; two losses move the composite token and the latents while the first steps are sampled.
- *Follow the Flow* (arXiv 2504.01137): an image is made from some of the contextual token states, the others being
  those of the empty prompt; an item that picked up the meaning of another one gets the states that it has alone.

Positions count the tokens of an encoded prompt: 0 is the first token, for CLIP the begin-of-text token.
:mod:`vistok.merging.entities` finds them, :mod:`vistok.merging.sdxl` and :mod:`vistok.merging.flux` apply the methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vistok.errors import UserError

FRAME = 32.0
"""Side of the frame that places are told in, whatever the resolution of the maps."""


@dataclass(frozen=True)
class Group:
    """Where the words of one entity stand.

    Args:
        nouns: positions of the noun; the first one becomes the composite token.
        attributes: positions of what belongs to it.
    """

    nouns: tuple[int, ...]
    attributes: tuple[int, ...] = ()

    @property
    def head(self) -> int:
        """The position of the composite token."""
        return self.nouns[0]


def check_groups(groups: Sequence[Group], tokens: int) -> None:
    """Refuse groups that are empty, overlap, or lie outside a prompt of ``tokens`` tokens (after the first, at 0).

    Raises:
        UserError: naming the position.
    """
    taken: set[int] = set()
    for group in groups:
        if not group.nouns:
            raise UserError("semantic binding: every group needs the position of a noun")
        for position in (*group.nouns, *group.attributes):
            if not 1 <= position <= tokens:
                raise UserError(f"semantic binding: position {position} is outside the prompt's 1 to {tokens}")
            if position in taken:
                raise UserError(f"semantic binding: position {position} is in two groups, or twice in one")
            taken.add(position)


def merge_groups(
    states: Float[Tensor, "N C"], groups: Iterable[Group], noun_weight: float = 1.1, attribute_weight: float = 1.2
) -> Float[Tensor, "N C"]:
    """Put one composite token in place of each group.

    ``noun_weight * sum(nouns) + attribute_weight * sum(attributes)`` at the first noun; the other positions of the
    group become zero. The weights are those of the published code; the paper has a plain sum.
    """
    merged = states.clone()
    for group in groups:
        nouns, attributes = list(group.nouns), list(group.attributes)
        merged[nouns + attributes] = 0
        merged[group.head] = noun_weight * states[nouns].sum(0) + attribute_weight * states[attributes].sum(0)
    return merged


def substitute_end(
    states: Float[Tensor, "*B N C"], clean: Float[Tensor, "*B N C"], tokens: int
) -> Float[Tensor, "*B N C"]:
    """Take everything behind the ``tokens`` tokens of the prompt from the ``clean`` one: end of text and padding."""
    return torch.cat([states[..., : tokens + 1, :], clean[..., tokens + 1 :, :]], dim=-2)


def noun_distributions(
    maps: Float[Tensor, "P N"], nouns: Sequence[int], tokens: int, temperature: float = 0.5
) -> Float[Tensor, "K P"]:
    """Where the nouns are in the picture: one distribution over pixels for each.

    The maps of the prompt's own tokens compete by a softmax at each pixel (of probabilities, as published); then each
    noun's map is shifted to a minimum of 0 and divided by its sum. The distribution of a constant map is uniform.

    Args:
        maps: cross-attention, averaged over layers and heads; row 0 is the begin-of-text token.
        nouns: positions.
        tokens: tokens of the prompt, without the begin and the end of text.
        temperature: of the softmax.
    """
    competing = (maps.float()[:, 1 : tokens + 1] / temperature).softmax(dim=1)
    chosen = competing[:, [noun - 1 for noun in nouns]].T
    # The tiny share keeps a constant map, and its gradient, finite.
    above = chosen - chosen.amin(dim=1, keepdim=True) + 1e-8
    return above / above.sum(dim=1, keepdim=True)


def entropy_loss(distributions: Float[Tensor, "K P"]) -> Float[Tensor, ""]:
    """Twice the sum of the entropies, nats: 0 for points, ``2 K ln P`` for uniform ones."""
    return -2 * (distributions * (distributions + 1e-5).log()).sum()


def centroids(distributions: Float[Tensor, "K P"], grid: tuple[int, int]) -> Float[Tensor, "K 2"]:
    """Centres of mass (x, y) in a frame of 32 x 32, its corners at the centres of the corner pixels of the grid."""
    height, width = grid
    weights = distributions.unflatten(1, (height, width))
    axes = (torch.linspace(0, FRAME, side, device=weights.device) for side in (width, height))
    return torch.stack([(weights.sum(dim) * axis).sum(1) for dim, axis in zip((1, 2), axes)], dim=1)


def layout_loss(centres: Float[Tensor, "K 2"], targets: Float[Tensor, "K 2"]) -> Float[Tensor, ""]:
    """How far the entities are from where they shall be, after layout guidance (arXiv 2306.00986)."""
    return 0.2 * (centres - targets).square().mean(1).sum()


def binding_loss(anchor: Float[Tensor, "K c h w"], token: Float[Tensor, "K c h w"]) -> Float[Tensor, " K"]:
    """How far what a composite token predicts is from what the phrase of its entity predicts."""
    return (anchor - token).square().mean(dim=(1, 2, 3))


def patch(
    states: Float[Tensor, "B N C"], empty: Float[Tensor, "#B N C"], keep: Sequence[int]
) -> Float[Tensor, "B N C"]:
    """The states at the positions ``keep``; at all others those of the empty prompt, at the same index.

    Raises:
        UserError: if the lengths differ or a position is outside.
    """
    length = states.shape[1]
    if empty.shape[1:] != states.shape[1:]:
        raise UserError(f"patch: states {tuple(states.shape)} and empty states {tuple(empty.shape)} differ")
    if outside := [position for position in keep if not 0 <= position < length]:
        raise UserError(f"patch: position {outside[0]} is outside 0 to {length - 1}")
    kept: Bool[Tensor, " N"] = torch.zeros(length, dtype=torch.bool, device=states.device)
    kept[list(keep)] = True
    return torch.where(kept[:, None], states, empty)


def swap_item(
    states: Float[Tensor, "N C"], alone: Float[Tensor, "M C"], positions: Sequence[int], alone_positions: Sequence[int]
) -> Float[Tensor, "N C"]:
    """Replace an item's states by those that it has when it is encoded ``alone``.

    Raises:
        UserError: if the item is not as long in both, or lies outside.
    """
    if len(positions) != len(alone_positions):
        raise UserError(f"swap: the item has {len(positions)} tokens in the prompt but {len(alone_positions)} alone")
    for name, rows, where in (("prompt", states, positions), ("item", alone, alone_positions)):
        if outside := [position for position in where if not 0 <= position < len(rows)]:
            raise UserError(f"swap: position {outside[0]} is outside the {len(rows)} rows of the {name}")
    swapped = states.clone()
    swapped[list(positions)] = alone[list(alone_positions)].to(states.dtype)
    return swapped
