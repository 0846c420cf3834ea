"""GenAI-Bench (arXiv 2406.13743): the VQAScore (arXiv 2404.01291) of images of prompts, skill by skill.

The VQAScore of an image is the probability that a judge answers yes when asked whether the image shows the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vistok.errors import UserError
from vistok.eval.judges import INSTRUCTION
from vistok.eval.vqa import Record, grouped


@dataclass(frozen=True)
class Item:
    """A prompt; see :class:`~vistok.eval.vqa.Item`.

    Args:
        name: its number, five digits.
        text: the prompt.
        skills: what it asks of a generator, at least one.
    """

    name: str
    text: str
    skills: tuple[str, ...]

    @property
    def asked(self) -> list[str]:
        """The one question; what follows it, :data:`~vistok.eval.judges.INSTRUCTION`, is up to the judge."""
        return [f'Does this figure show "{self.text}"?']

    def score(self, yes: Sequence[float]) -> float:
        """The probability itself."""
        return yes[0]


@dataclass(frozen=True)
class GenAIBench:
    """See :class:`~vistok.eval.vqa.Benchmark`.

    Args:
        items: the prompts.
        skills: names of all skills, in order.
        ratings: what people gave the image of each prompt, by its name; empty if they were not asked.
    """

    items: list[Item]
    skills: list[str]
    ratings: dict[str, float] = field(default_factory=dict)

    task, title, counted = "genai", "GenAI-Bench", "prompts"
    definitions = {  # noqa: RUF012
        "score": f'VQAScore: probability that the answer to "Does this figure show "TEXT"? {INSTRUCTION}" begins with '
        "yes; mean over the images of a prompt, then over the prompts of a skill",
        "overall": "mean over all prompts that have a skill",
    }

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """The mean of each skill, and ``overall``."""
        row = {skill: part["score"] for skill, part in self.parts(records).items()}
        return row | {"overall": fmean(prompt_scores(records).values())}

    def parts(self, records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Each skill that a prompt has."""
        of_prompt = prompt_scores(records)
        of_skill = grouped((skill, of_prompt[item.name]) for item in self.items for skill in item.skills)
        return {
            skill: {"prompts": len(of_skill[skill]), "score": fmean(of_skill[skill])}
            for skill in self.skills
            if skill in of_skill
        }

    def agreement(self, records: Sequence[Record]) -> dict[str, float]:
        """Correlation of the prompts' scores with their ratings, if there are any: Pearson's, and Kendall's tau-b."""
        if not self.ratings:
            return {}
        from scipy.stats import kendalltau, pearsonr  # slow to import

        ours = prompt_scores(records)
        pairs = [*ours.values()], [self.ratings[name] for name in ours]
        return {"pearson": float(pearsonr(*pairs).statistic), "kendall_tau_b": float(kendalltau(*pairs).statistic)}


def prompt_scores(records: Sequence[Record]) -> dict[str, float]:
    """The mean score of the images of each prompt, by its name."""
    prompts = grouped((record.item.name, record.score) for record in records)
    return {name: fmean(scores) for name, scores in prompts.items()}


def read_prompts(prompts: Path, skills: Path) -> GenAIBench:
    """The prompts of ``genai_image.json`` that ``genai_skills.json`` names.

    As in the published script, prompts without a skill (seven of 1,600) count nowhere; they are left out.

    Args:
        prompts: ``{"00000": {"prompt": ...}, ...}``.
        skills: ``{"counting": [0, 17, ...], ...}``.

    Raises:
        UserError: if a file cannot be read or has an entry of another form, which is named.
    """
    entries, numbers = _read(prompts), _read(skills)
    texts = {}
    for name, entry in entries.items():
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{prompts}: entry {name!r} has no 'prompt'")
        texts[name] = text.strip()
    having: dict[str, list[str]] = {name: [] for name in texts}
    for skill, listed in numbers.items():
        if not isinstance(listed, list) or not all(isinstance(number, int | str) for number in listed):
            raise UserError(f"{skills}: {skill!r} must be a list of numbers of prompts")
        for number in listed:
            name = f"{number:05d}" if isinstance(number, int) else number
            if name not in having:
                raise UserError(f"{skills}: {skill!r} names the prompt {number}, which {prompts} does not have")
            having[name].append(skill)
    items = [Item(name, texts[name], tuple(of)) for name, of in having.items() if of]
    if not items:
        raise UserError(f"{skills} names no prompt")
    return GenAIBench(items, list(numbers))


def read_ratings(prompts: Path, model: str, items: Sequence[Item]) -> dict[str, float]:
    """The mean of people's ratings, 1 to 5, of the image that ``model`` made for each prompt.

    Raises:
        UserError: if the file has none, naming the models that it knows, or there is one prompt only.
    """
    if len(items) < 2:
        raise UserError("agreement with people is told from two prompts on")
    entries, means = _read(prompts), {}
    for item in items:
        rated = entries[item.name].get("models") or entries[item.name].get("HumanRatings") or {}
        if not (ratings := rated.get(model)):
            known = ", ".join(rated) or "none"
            raise UserError(f"{prompts}: entry {item.name!r} has no ratings of {model!r} (of: {known})")
        means[item.name] = fmean(ratings)
    return means


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: no JSON: {error.msg}") from None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path} must be one JSON object with an entry for each of its names")
    return entries
