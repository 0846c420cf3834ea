"""``genai``: how surely a judge sees each prompt in its images, by the skills of GenAI-Bench."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from vistok.errors import UserError
from vistok.eval import vqa
from vistok.eval.commands.vqa import add_vqa_flags, ask
from vistok.eval.genai import read_prompts, read_ratings

HELP = "VQAScore: how surely a judge sees the prompt in its images, by skill (GenAI-Bench)"
EXAMPLES = (
    "python -m vistok.eval genai --images DIR --prompts genai_image.json --skills genai_skills.json --judge DIR",
    "python -m vistok.eval genai --images DALLE_3 --rated DALLE_3 --prompts FILE --skills FILE --judge DIR",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_vqa_flags(parser, "genai", per_prompt=1, published="CLIP-FlanT5-XXL, which transformers lacks")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="GenAI-Bench's genai_image.json")
    parser.add_argument("--skills", type=Path, required=True, metavar="FILE", help="GenAI-Bench's genai_skills.json")
    parser.add_argument(
        "--rated", metavar="MODEL", help="--images are those of this model: also how far people's ratings agree"
    )


def run(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on GenAI-Bench."""
    if args.checkpoint and args.rated:
        raise UserError("--rated is for --images that people have rated: nobody saw what a generator makes now")
    benchmark = read_prompts(args.prompts, args.skills)
    items = vqa.at_most(benchmark.items, args.most_prompts)
    ratings = read_ratings(args.prompts, args.rated, items) if args.rated else {}
    ask(args, replace(benchmark, items=items, ratings=ratings))
