"""Semantic binding for generators of codes: the states of a text are edited before they condition the generator.

What :mod:`vistok.merging.sdxl` and :mod:`vistok.merging.flux` do to the text inputs of diffusion models, here to the
condition of any generator of this project, prefix or cross-attention, whatever the text encoder:

    condition = composite(encoder, ["a red circle and a blue square"], [[Entity("circle", ("red",)), ...]])
    tokens = generator.generate(condition, options, rng)

States that know nothing of one another (``bytes``) get to do so in the ``text_depth`` blocks of a generator;
:func:`reading_apart` lets the edits see those.

The losses of the first method need latents that move while they are sampled; codes do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from vistok.checkpoint import module_hash
from vistok.errors import UserError
from vistok.generators.conditions import TextEntry
from vistok.interfaces import Generator, TextCondition, TextEncoder
from vistok.merging.entities import Entity, locate, phrases_of, tokens_within
from vistok.merging.semantic_binding import Group, merge_groups, swap_item


def composite(
    encoder: TextEncoder,
    prompts: Sequence[str],
    entities: Sequence[Sequence[Entity]],
    noun_weight: float = 1.1,
    attribute_weight: float = 1.2,
) -> TextCondition:
    """One state for each entity, see :func:`~vistok.merging.semantic_binding.merge_groups` (arXiv 2411.07132).

    The positions that it empties leave the mask: where SDXL has to read zeros, a generator here reads nothing.

    Args:
        encoder: reads the prompts.
        prompts: texts.
        entities: of each prompt.
        noun_weight: of the states of the noun.
        attribute_weight: of those of its attributes.

    Raises:
        UserError: if an entity is not in its prompt, or shares a state with another one.
    """
    condition = _encode(encoder, prompts, entities)
    states, mask = condition.states.clone(), condition.mask.clone()
    for row, (prompt, found) in enumerate(zip(prompts, entities)):
        groups = []
        for noun, *attributes in _positions(encoder, prompt, found):
            groups.append(Group(noun, tuple(position for part in attributes for position in part)))
            mask[row, [*noun[1:], *groups[-1].attributes]] = False
        states[row] = merge_groups(states[row], groups, noun_weight, attribute_weight)
    return replace(condition, states=states, mask=mask)


def uncontextualised(
    encoder: TextEncoder, prompts: Sequence[str], entities: Sequence[Sequence[Entity]]
) -> TextCondition:
    """The words of each entity as they are when it is read alone, so that they know of no other (arXiv 2504.01137).

    Nothing changes for an encoder whose states know nothing of one another, such as ``bytes``.

    Args:
        encoder: reads the prompts, and each entity's phrase.
        prompts: texts.
        entities: of each prompt.

    Raises:
        UserError: if an entity is not in its prompt, or is spelled by other tokens there than alone.
    """
    condition = _encode(encoder, prompts, entities)
    states = condition.states.clone()
    for row, (prompt, found) in enumerate(zip(prompts, entities)):
        phrases = phrases_of(prompt, found)
        read = encoder.encode(phrases) if phrases else condition[:0]
        for phrase, entity, alone, place in zip(phrases, found, read.states, _positions(encoder, prompt, found)):
            positions, alone_positions = (
                [position for part in parts for position in part]
                for parts in (place, *_positions(encoder, phrase, [entity]))
            )
            states[row] = swap_item(states[row], alone, positions, alone_positions)
    return replace(condition, states=states)


class _Reader(TextEncoder):
    """A text encoder and what a generator makes of its states, as one."""

    def __init__(self, encoder: TextEncoder, entry: TextEntry) -> None:
        super().__init__()
        self.encoder, self.read = encoder, entry.read
        self.width = self.encode([""]).states.shape[-1]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> TextCondition:
        plain = self.encoder.encode(texts)
        states, null = self.read(plain.states, plain.mask), self.read(plain.null_states, plain.null_mask)
        return replace(plain, states=states, null_states=null)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return self.encoder.spans(text)

    @property
    def states_hash(self) -> str:
        return module_hash(self, "read by a generator", self.encoder.states_hash)


@contextmanager
def reading_apart(generator: Generator, encoder: TextEncoder) -> Iterator[TextEncoder]:
    """An encoder whose states are what ``generator``, inside the ``with``, takes as they are.

    It generates the same from them as it did from those of ``encoder``; but now the edits here see what its own blocks
    (``text_depth``) make of a text.

    Raises:
        UserError: for a generator of classes, or one that replaces the empty text by a constant (``own_null``).
    """
    entry = getattr(generator, "condition", None)
    if not isinstance(entry, TextEntry) or getattr(entry, "null_states", None) is not None:
        raise UserError(f"{type(generator).__name__} reads no text of its own whose states could be edited")
    reader, width = _Reader(encoder, entry), generator.text_width
    try:
        entry.read = lambda states, mask: states  # type: ignore[method-assign]
        generator.text_width = reader.width
        yield reader
    finally:
        del entry.read
        generator.text_width = width


def _encode(encoder: TextEncoder, prompts: Sequence[str], entities: Sequence[Sequence[Entity]]) -> TextCondition:
    if len(prompts) != len(entities):
        raise UserError(f"semantic binding: {len(entities)} rows of entities for {len(prompts)} prompts")
    with torch.no_grad():
        return encoder.encode(list(prompts))


def _positions(encoder: TextEncoder, prompt: str, entities: Sequence[Entity]) -> list[list[tuple[int, ...]]]:
    """For each entity the positions of its noun, then of each attribute.

    Raises:
        UserError: as :func:`composite`.
    """
    spelled = encoder.spans(prompt)
    found = [[tokens_within(spelled, prompt, span) for span in spans] for spans in locate(prompt, entities)]
    for entity, parts in zip(entities, found):
        if not all(parts):
            raise UserError(f"semantic binding: {entity.noun!r} is beyond what the text encoder reads of {prompt!r}")
    return found
