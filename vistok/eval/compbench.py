"""Is what a prompt gives to a thing on that thing? T2I-CompBench (arXiv 2307.06350), and object binding.

Both ask a judge about the noun phrases of a prompt:

- attribute binding, as T2I-CompBench has it: each phrase is a question ("a green bench?"); an image scores the product
  of the probabilities of yes.
- object binding, of two subjects that have an object each ("a cat with a hat and a dog with a scarf"): is each subject
  there, and which of the two objects has it? The answers make one of nine levels, those of the evaluation of ToMe-SB
  (arXiv 2411.07132), where GPT-4o names the level itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vistok.errors import UserError, first_line
from vistok.eval.vqa import Record, at_most
from vistok.merging.entities import load_spacy

PLACES = frozenset({"top", "the top", "the side", "the left", "the right"})
"""What a parser takes for a noun phrase, although it names no object."""


@dataclass(frozen=True)
class Item:
    """A prompt for attribute binding; see :class:`~vistok.eval.vqa.Item`.

    Args:
        text: the prompt.
        phrases: its noun phrases.

    Raises:
        UserError: if there is none.
    """

    text: str
    phrases: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.phrases:
            raise UserError(f"no noun phrase in {self.text!r}; name them in the prompt file, separated by tabs")

    @property
    def name(self) -> str:
        """Images are named after their prompt; T2I-CompBench leaves its full stop in the name, others do not."""
        return self.text.rstrip(".")

    @property
    def asked(self) -> list[str]:
        """Each phrase as a question."""
        return [f"{phrase}?" for phrase in self.phrases]

    def score(self, yes: Sequence[float]) -> float:
        """The product."""
        return math.prod(yes)


class TwoSubjects(Item):
    """A prompt for object binding, whose phrases are a subject, its object, the other subject and its object.

    Raises:
        UserError: for another number of phrases.
    """

    def __post_init__(self) -> None:
        if len(self.phrases) != 4:
            found = ", ".join(self.phrases) or "no noun phrase"
            raise UserError(f"object binding needs two subjects with an object each, in {self.text!r} there is {found}")

    @property
    def asked(self) -> list[str]:
        """Of each subject whether it is there, has its own object, and has that of the other one."""
        first, own, second, other = self.phrases
        return [*_about(first, own, other), *_about(second, other, own)]

    def score(self, yes: Sequence[float]) -> float:
        """See :func:`binding_level`; an answer is yes where that is likelier than anything else."""
        answers = [probability > 0.5 for probability in yes]
        return binding_level(Subject(*answers[:3]), Subject(*answers[3:]))


def _about(subject: str, *items: str) -> list[str]:
    noun = re.sub(r"^(an?|the)\s+", "", subject, flags=re.IGNORECASE)
    return [f"is there {subject}?", *(f"does the {noun} have {item}?" for item in items)]


@dataclass(frozen=True)
class Subject:
    """What a judge saw of one of two subjects.

    Args:
        is_there: in the image at all.
        own: it has what the prompt gives to it.
        other: it has what the prompt gives to the other one.
    """

    is_there: bool
    own: bool
    other: bool


def binding_level(first: Subject, second: Subject) -> float:
    """Nine levels from 0, both subjects are missing, to 1, both have their own object and nothing is swapped."""
    subjects = first, second
    present = sum(subject.is_there for subject in subjects)
    if present < 2:
        return present * 0.125
    own = sum(subject.own for subject in subjects)
    swapped = sum(subject.other for subject in subjects)
    if own == 2:
        return (1.0, 0.875, 0.75)[swapped]
    if own == 1:
        wrong = next(subject for subject in subjects if not subject.own)
        return 0.625 if wrong.other else 0.5
    return 0.375 if swapped else 0.25


@dataclass(frozen=True)
class CompBench:
    """Attribute binding; see :class:`~vistok.eval.vqa.Benchmark`."""

    items: Sequence[Item]

    task, title, counted = "compbench", "T2I-CompBench", "prompts"
    definitions = {  # noqa: RUF012
        "score": "product, over the noun phrases of the prompt, of the probability that the answer to PHRASE? begins "
        "with yes; mean over all images"
    }

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The mean of all images, as in the published script."""
        return {"overall": fmean(record.score for record in records)}

    def parts(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """A prompt file is a category itself."""
        return {}

    def agreement(self, records: Sequence[Record]) -> dict[str, float]:
        """Nobody was asked."""
        return {}


class ObjectBinding(CompBench):
    """Object binding, of :class:`TwoSubjects`; see :class:`~vistok.eval.vqa.Benchmark`."""

    task, title = "object-binding", "Object binding"
    definitions = {  # noqa: RUF012
        "score": "one of nine levels in 0..1 by which subjects are there and have their own object or that of the "
        "other (probability of yes above 0.5); mean over all images"
    }


def read_prompts(path: Path, kind: type[Item] = Item, most: int | None = None) -> list[Item]:
    """The prompts of a text file of T2I-CompBench, one a line; empty lines are skipped.

    Args:
        path: a line may name its noun phrases, separated by tabs ("a red hat and a cup<TAB>a red hat<TAB>a cup"); spaCy
            finds those of the others, without :data:`PLACES`.
        kind: what becomes of a prompt.
        most: at most so many prompts, evenly spaced.

    Raises:
        UserError: if the file cannot be read, is empty, has a prompt twice or one that cannot name images or has other
            noun phrases than its kind needs, or if spaCy is needed and is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    prompts: dict[str, tuple[str, list[str]]] = {}
    for number, line in enumerate(lines, start=1):
        text, *phrases = (part.strip() for part in line.split("\t"))
        name = text.rstrip(".")
        if name in prompts:
            raise UserError(f"{path}, line {number}: the prompt {text!r} is there already")
        if "/" in name:
            raise UserError(f"{path}, line {number}: {text!r} cannot name images: it has a slash")
        if name:
            prompts[name] = text, list(filter(None, phrases))
    if not prompts:
        raise UserError(f"{path} has no prompt")
    chosen = at_most(list(prompts.values()), most)
    nlp: Any = None if all(phrases for _, phrases in chosen) else load_spacy()
    return [kind(text, tuple(phrases or _noun_phrases(nlp(text)))) for text, phrases in chosen]


def _noun_phrases(parsed: Any) -> list[str]:
    return [chunk.text for chunk in parsed.noun_chunks if chunk.text.lower() not in PLACES]
