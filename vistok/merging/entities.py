"""The entities of a prompt: words that belong together, and the tokens that spell them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vistok.errors import UserError
from vistok.merging.semantic_binding import Group

MODIFIERS = frozenset({"amod", "nmod", "compound", "npadvmod", "advmod", "acomp", "nummod"})
"""Dependencies by which a word describes the one that it hangs on (after SynGen, arXiv 2306.08877)."""

HAVING = frozenset({"wearing", "holding", "carrying", "having"})
"""Participles whose object belongs to the noun that they hang on."""


@dataclass(frozen=True)
class Entity:
    """A noun and what the prompt says of it.

    Args:
        noun: as the prompt has it, such as ``cat``.
        attributes: the same, such as ``("white",)`` or ``("wearing sunglasses",)``.
        phrase: the entity alone; by default the part of the prompt from its first to its last word, with an article.
        group: positions of noun and attributes in the prompt; by default they are looked up.
    """

    noun: str
    attributes: tuple[str, ...] = ()
    phrase: str | None = None
    group: Group | None = None


def num_tokens(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt without the special ones at its ends."""
    return len(tokenizer(prompt, add_special_tokens=False).input_ids)


Span = tuple[int, int]
"""The first and the last character of a part of a prompt, the last one exclusive."""


def find_words(prompt: str, words: str, taken: Sequence[Span] = (), near: int = 0) -> Span:
    """Where ``words`` are in the prompt: of the places that are not ``taken``, the one nearest to a character.

    Raises:
        UserError: if there is none.
    """
    places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, re.IGNORECASE)]
    free = [(start, end) for start, end in places if all(end <= first or last <= start for first, last in taken)]
    if not free:
        raise UserError(f"{words!r} is not in the prompt {prompt!r}" + (" once more" if places else ""))
    return min(free, key=lambda place: abs(place[0] - near))


def locate(prompt: str, entities: Sequence[Entity]) -> list[list[Span]]:
    """Where the noun and the attributes of each entity are; attributes are the mention nearest to their noun.

    Raises:
        UserError: if a word is missing, or entities would share it.
    """
    taken: list[Span] = []
    for entity in entities:
        taken.append(find_words(prompt, entity.noun, taken))
    found = [[noun] for noun in taken]
    for entity, spans in zip(entities, found):
        for words in entity.attributes:
            spans.append(find_words(prompt, words, taken, near=spans[0][0]))
            taken.append(spans[-1])
    return found


def find_tokens(tokenizer: Any, prompt: str, span: Span) -> tuple[int, ...]:
    """The positions of the tokens that spell a part of the prompt, special tokens counted.

    Raises:
        UserError: if a token spells more than that part, or the tokenizer does not tell what its tokens spell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} does not tell what its tokens spell: use its fast version")
    return tokens_within(tokenizer(prompt, return_offsets_mapping=True).offset_mapping, prompt, span)


def tokens_within(spelled: Sequence[Span], prompt: str, span: Span) -> tuple[int, ...]:
    """The positions of the tokens that spell a part of the prompt, where each token spells the characters ``spelled``.

    Raises:
        UserError: if a token spells more than that part.
    """
    positions = []
    for position, (start, end) in enumerate(spelled):
        # Some tokenizers count the space in front of a word to it.
        start += len(prompt[start:end]) - len(prompt[start:end].lstrip())
        if max(start, span[0]) >= min(end, span[1]):
            continue
        if start < span[0] or end > span[1]:
            raise UserError(f"{prompt[slice(*span)]!r} is not a whole number of tokens in {prompt!r}")
        positions.append(position)
    return tuple(positions)


def find_groups(tokenizer: Any, prompt: str, entities: Sequence[Entity]) -> list[Group]:
    """Where the words of the entities stand.

    Raises:
        UserError: if one is missing or is not a whole number of tokens.
    """
    groups = []
    for entity, spans in zip(entities, locate(prompt, entities)):
        nouns, *attributes = (find_tokens(tokenizer, prompt, span) for span in spans)
        groups.append(entity.group or Group(nouns, tuple(position for row in attributes for position in row)))
    return groups


def phrases_of(prompt: str, entities: Sequence[Entity]) -> list[str]:
    """The text of each entity alone."""
    ends = [(min(spans)[0], max(end for _, end in spans)) for spans in locate(prompt, entities)]
    return [entity.phrase or f"a {prompt[start:end]}" for entity, (start, end) in zip(entities, ends)]


def align_item(tokenizer: Any, prompt: str, item: str, alone: str | None = None) -> tuple[tuple[int, ...], ...]:
    """Positions of an item in the prompt and in a text that has it alone (the item itself by default).

    Raises:
        UserError: if it is not in one of them, or is spelled by other tokens there.
    """
    texts = prompt, item if alone is None else alone
    positions = tuple(find_tokens(tokenizer, text, find_words(text, item)) for text in texts)
    ids = [[tokenizer(text).input_ids[position] for position in row] for text, row in zip(texts, positions)]
    if ids[0] != ids[1]:
        raise UserError(f"{item!r} has other tokens in {texts[0]!r} than in {texts[1]!r}")
    return positions


def parse(prompt: str, nlp: Any = None) -> list[Entity]:
    """The nouns of a prompt that something is said of, by a dependency parser.

    An entity has the words that describe its noun (:data:`MODIFIERS`, "that is fluffy"), and what it has on or with it
    ("wearing a hat", "with a hat"), but nothing that another entity has.

    Args:
        prompt: text.
        nlp: a pipeline of spaCy, by default that of :func:`load_spacy`.

    Raises:
        UserError: as :func:`load_spacy`.
    """
    words = list((nlp or load_spacy())(prompt))
    nouns = [word for word in words if word.pos_ in ("NOUN", "PROPN") and word.dep_ not in MODIFIERS]
    owned = {part.i for noun in nouns for part in _belongings(noun)}
    entities = []
    for noun in nouns:
        if noun.i in owned:
            continue
        parts = [part for word in [*_descriptions(noun), *_belongings(noun)] for part in _with_modifiers(word)]
        if parts:
            attributes = tuple(part.text for part in sorted(parts, key=lambda part: part.i))
            spoken = [noun, *parts, *(word for word in noun.children if word.dep_ == "det")]
            first, last = (pick(spoken, key=lambda word: word.idx) for pick in (min, max))
            entities.append(Entity(noun.text, attributes, prompt[first.idx : last.idx + len(last.text)]))
    return entities


def _descriptions(noun: Any) -> list[Any]:
    found = []
    for word in noun.children:
        # An adverb that hangs on a noun says where it is ("next to").
        if word.dep_ in MODIFIERS and word.dep_ != "advmod":
            found.append(word)
        elif word.dep_ == "relcl":
            found += [child for child in word.children if child.dep_ == "acomp"]
    return found


def _belongings(noun: Any) -> list[Any]:
    """Nouns that an entity has: objects of a participle or of "with" that hangs on it, and the participle."""
    found = []
    for word in noun.children:
        objects = [child for child in word.children if child.dep_ in ("dobj", "obj", "pobj")]
        if word.dep_ == "acl" and word.text.lower() in HAVING and objects:
            found += [word, *objects]
        elif word.dep_ == "prep" and word.text.lower() == "with":
            found += objects
    return found


def _with_modifiers(word: Any) -> list[Any]:
    return [word, *(part for child in word.children if child.dep_ in MODIFIERS for part in _with_modifiers(child))]


def load_spacy() -> Any:
    """A pipeline of spaCy for English: ``en_core_web_trf`` or, if that is not installed, ``en_core_web_sm``.

    Raises:
        UserError: without spaCy or a model.
    """
    try:
        import spacy
    except ImportError:
        raise UserError("entities are parsed by spaCy, which is not installed: pip install spacy") from None
    for name in ("en_core_web_trf", "en_core_web_sm"):
        if spacy.util.is_package(name):
            return spacy.load(name)
    raise UserError("spaCy has no English model: python -m spacy download en_core_web_sm")
