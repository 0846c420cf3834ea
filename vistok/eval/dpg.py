"""DPG-Bench (arXiv 2403.05135): which of many questions about a long prompt its images answer with yes.

Questions depend on others: what colour a hat has counts only where there is a hat. An image scores the share of its
questions that count, a prompt the mean of its images, the benchmark the mean of its prompts, in percent.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vistok.errors import UserError, first_line
from vistok.eval.vqa import Record, grouped

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
"""Of ``dpg_bench.csv``, those that are read."""


@dataclass(frozen=True)
class Question:
    """A row of the file.

    Args:
        number: names it within its prompt.
        text: the question.
        parents: numbers of the questions that must be answered with yes for this one to count.
        category: "attribute - color", or "global" alone: level 2 is all of it, level 1 what stands before the dash.
    """

    number: int
    text: str
    parents: tuple[int, ...]
    category: str

    @property
    def broad(self) -> str:
        """The category at level 1."""
        return self.category.partition("-")[0].strip()


@dataclass(frozen=True)
class Item:
    """A prompt and its questions; see :class:`~vistok.eval.vqa.Item`."""

    name: str
    text: str
    questions: tuple[Question, ...]

    @property
    def asked(self) -> list[str]:
        """The text of each question."""
        return [question.text for question in self.questions]

    def score(self, yes: Sequence[float]) -> float:
        """The share of the questions that count."""
        return fmean(self.counting(yes))

    def counting(self, yes: Sequence[float]) -> list[bool]:
        """Which questions are answered with yes, as are those that they depend on.

        As in the published script, in the order of the file: a question that does not count takes those with it that
        depend on it and come later.
        """
        counts = {question.number: answer for question, answer in zip(self.questions, answers(yes), strict=True)}
        for question in self.questions:
            counts[question.number] &= all(counts[parent] for parent in question.parents)
        return list(counts.values())


def answers(yes: Sequence[float]) -> list[bool]:
    """Whether yes is likelier than anything else."""
    return [probability > 0.5 for probability in yes]


@dataclass(frozen=True)
class DPGBench:
    """See :class:`~vistok.eval.vqa.Benchmark`."""

    items: list[Item]

    task, title, counted = "dpg", "DPG-Bench", "questions"
    definitions = {  # noqa: RUF012
        "score": "share of an image's questions that are answered with yes (probability above 0.5), as are those that "
        "they depend on; mean over the images of a prompt, then over prompts, in percent",
        "categories": "share of answers that are yes, whatever they depend on, over all images, in percent",
    }

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The score and the categories of level 1."""
        prompts = grouped((record.item.name, record.score) for record in records)
        broad = _shares(records, "broad")
        overall = 100 * fmean(map(fmean, prompts.values()))
        return {name: part["score"] for name, part in sorted(broad.items())} | {"overall": overall}

    def parts(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """The categories of level 1, each followed by its own of level 2."""
        return dict(sorted((_shares(records, "broad") | _shares(records, "category")).items()))

    def agreement(self, records: Sequence[Record]) -> dict[str, float]:
        """Nobody was asked."""
        return {}


def _shares(records: Sequence[Record], level: str) -> dict[str, dict[str, float]]:
    """``{"questions", "score"}`` of each category.

    The published script, too, counts answers here before dependencies; but only those about the last image of a prompt.
    """
    pairs = (
        (getattr(question, level), float(answer))
        for record in records
        for question, answer in zip(record.item.questions, answers(record.yes), strict=True)
    )
    return {name: {"questions": len(of), "score": 100 * fmean(of)} for name, of in grouped(pairs).items()}


def read_questions(path: Path) -> list[Item]:
    """The prompts of ``dpg_bench.csv``, every row of it (the published script passes over the first).

    Raises:
        UserError: if the file cannot be read, lacks a column, or has a row that is no question, which is named.
    """
    items: dict[str, Item] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
                raise UserError(f"{path} lacks the column {missing[0]!r} (needed: {', '.join(COLUMNS)})")
            for row in rows:
                try:
                    question = _question(row)
                    name = row["item_id"].strip()
                    item = items.setdefault(name, Item(name, row["text"].strip(), ()))
                    if any(question.number == other.number for other in item.questions):
                        raise ValueError(f"question {question.number} of {item.name!r} is there already")
                except ValueError as error:
                    raise UserError(f"{path}, line {rows.line_num}: {error}") from None
                items[item.name] = replace(item, questions=(*item.questions, question))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not items:
        raise UserError(f"{path} holds no questions")
    for item in items.values():
        numbers = {question.number for question in item.questions}
        for question in item.questions:
            if unknown := sorted(set(question.parents) - numbers):
                raise UserError(
                    f"{path}: question {question.number} of {item.name!r} depends on {unknown[0]}, which is not there"
                )
    return list(items.values())


def read_texts(folder: Path, items: list[Item]) -> list[Item]:
    """``items`` with the prompts of a folder, ``NAME.txt``, such as rewritten ones.

    Raises:
        UserError: if one is missing or cannot be read.
    """
    texts = []
    for item in items:
        try:
            texts.append((folder / f"{item.name}.txt").read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt {folder / item.name}.txt: {first_line(error)}") from None
    return [replace(item, text=text) for item, text in zip(items, texts, strict=True)]


def _question(row: dict[Any, Any]) -> Question:
    """The question in a row of the file; ValueError says why there is none."""
    empty = [column for column in COLUMNS if not (row[column] or "").strip()]
    if empty or None in row:
        raise ValueError(f"no {empty[0]!r}" if empty else "more fields than columns")
    values = {column: str(row[column]).strip() for column in COLUMNS}
    try:
        number = int(values["proposition_id"])
        parents = tuple(parent for text in values["dependency"].split(",") if (parent := int(text)))
    except ValueError:
        raise ValueError(
            f"proposition_id and dependency must be whole numbers, got {values['proposition_id']!r} and "
            f"{values['dependency']!r}"
        ) from None
    # Global questions have a dash and nothing behind it.
    category = values["tuple"].partition("(")[0].strip(" -")
    return Question(number, values["question_natural_language"], parents, category)
