"""``python -m vistok.merging.compbench``: do images show attributes on the right objects?

Two protocols, both asked of a judge that answers yes-or-no questions about an image:

- T2I-CompBench (arXiv 2307.06350), attribute binding: every noun phrase of a prompt is a question ("a green bench?");
  an image scores the product of the probabilities of "yes".
- Object binding ("a cat with a hat and a dog with a scarf"): nine levels by what each subject has, as in the
  evaluation of ToMe-SB (arXiv 2411.07132).

The judge of T2I-CompBench is BLIP-VQA; any callable of the same form will do.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from vistok.cli import ArgumentParser, main, positive_int, usable_device
from vistok.errors import UserError, first_line
from vistok.eval.judges import BlipVQA, Judge
from vistok.merging.entities import load_spacy

PLACES = frozenset({"top", "the top", "the side", "the left", "the right"})
"""What a parser takes for a noun phrase, although it names no object."""

EXAMPLES = """examples:
  python -m vistok.merging.compbench --prompts color_val.txt --images DIR --out scores.json
  python -m vistok.merging.compbench --prompts color_val.txt --images DIR --judge models/blip-vqa-base

DIR holds PROMPT_000000.png, PROMPT_000001.png and so on. A line of the prompts may name its noun phrases, separated by
tabs ("a red hat and a blue cup<TAB>a red hat<TAB>a blue cup"); otherwise spaCy finds them.
"""


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file.

    Args:
        text: the prompt.
        phrases: its noun phrases, if the file names them.
    """

    text: str
    phrases: tuple[str, ...] = ()


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a text file of T2I-CompBench, one a line; empty lines are skipped.

    Raises:
        UserError: if the file cannot be read, is empty, or names a prompt twice.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        text, *phrases = (part.strip() for part in line.split("\t"))
        if not text:
            continue
        if text in prompts:
            raise UserError(f"{file}, line {number}: the prompt {text!r} is there already")
        prompts[text] = Prompt(text, tuple(filter(None, phrases)))
    if not prompts:
        raise UserError(f"{file} has no prompt")
    return list(prompts.values())


def noun_phrases(prompt: Prompt, nlp: Any) -> tuple[str, ...]:
    """The phrases that the file names, or those that a pipeline of spaCy finds, without places.

    Raises:
        UserError: if there is none.
    """
    phrases = prompt.phrases or tuple(c.text for c in nlp(prompt.text).noun_chunks if c.text.lower() not in PLACES)
    if not phrases:
        raise UserError(f"no noun phrase in {prompt.text!r}; name them in the prompt file, separated by tabs")
    return phrases


def find_images(folder: Path, prompts: Sequence[Prompt]) -> dict[str, list[Path]]:
    """The images of each prompt in a folder, ``PROMPT_000000.png``.

    T2I-CompBench leaves the full stop of a prompt in the name; names without it are found too.

    Raises:
        UserError: if a prompt has none.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    named = defaultdict(list)
    for file in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(.*)_\d+", file.stem):
            named[match[1]].append(file)
    found = {prompt.text: named.get(prompt.text) or named.get(prompt.text.rstrip(".")) or [] for prompt in prompts}
    if missing := [text for text, files in found.items() if not files]:
        raise UserError(f"{folder}: {len(missing)} of {len(prompts)} prompts have no image, such as {missing[0]!r}")
    return found


def attribute_score(judge: Judge, image: Image.Image, phrases: Sequence[str]) -> float:
    """T2I-CompBench's score of an image: the product of the answers to ``PHRASE?``."""
    return float(judge(image, [f"{phrase}?" for phrase in phrases]).prod())


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
    """Nine levels from 0, both subjects are missing, to 1, both have their own attribute and nothing is swapped."""
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


def object_binding_score(judge: Judge, image: Image.Image, pairs: Sequence[tuple[str, str]]) -> float:
    """The level of an image of two subjects, each with an object: ``[("cat", "hat"), ("dog", "scarf")]``.

    Raises:
        UserError: if there are not two.
    """
    if len(pairs) != 2:
        raise UserError(f"object binding: needs two pairs of subject and object, got {len(pairs)}")
    objects = [item for _, item in pairs]
    questions = []
    for (subject, _), items in zip(pairs, (objects, objects[::-1])):
        questions += [f"is there a {subject}?", *(f"does the {subject} have a {item}?" for item in items)]
    answers = (judge(image, questions) > 0.5).tolist()
    return binding_level(Subject(*answers[:3]), Subject(*answers[3:]))


def open_image(file: Path) -> Image.Image:
    """The image in a file, RGB.

    Raises:
        UserError: naming the file if it is none.
    """
    try:
        return Image.open(file).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None


def run(args: argparse.Namespace) -> None:
    """Score the images of a folder."""
    prompts = read_prompts(args.prompts)[: args.count]
    nlp = None if all(prompt.phrases for prompt in prompts) else load_spacy()
    phrases = {prompt.text: noun_phrases(prompt, nlp) for prompt in prompts}
    files = [(text, file) for text, found in find_images(args.images, prompts).items() for file in found]
    judge = BlipVQA(args.judge, args.device)
    records = []
    for text, file in tqdm(files, desc="judging", unit="image"):
        score = attribute_score(judge, open_image(file), phrases[text])
        records.append({"file": file.name, "prompt": text, "phrases": phrases[text], "score": score})
    mean = sum(record["score"] for record in records) / len(records)
    print(f"BLIP-VQA {mean:.4f}: mean of {len(records)} images of {len(prompts)} prompts")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"blip_vqa": mean, "judge": args.judge, "images": records}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m vistok.merging.compbench",
        description="T2I-CompBench's attribute binding: BLIP-VQA's score of a folder of images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="text file, a prompt a line")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="PROMPT_000000.png and so on")
    parser.add_argument(
        "--judge",
        default="Salesforce/blip-vqa-base",
        metavar="PATH",
        help="folder or repository (default: %(default)s)",
    )
    parser.add_argument("--count", type=positive_int, metavar="N", help="the first N prompts (default: all)")
    parser.add_argument("--device", type=usable_device, default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="scores of every image, JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main(lambda: run(parse_args()))
