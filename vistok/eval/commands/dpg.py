"""``dpg``: how much of a long prompt images show, by DPG-Bench's questions."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.cli import positive_int
from vistok.errors import UserError
from vistok.eval import vqa
from vistok.eval.commands.vqa import add_vqa_flags, ask
from vistok.eval.dpg import DPGBench, read_questions, read_texts

HELP = "share of the questions about long prompts that a judge answers with yes (DPG-Bench)"
EXAMPLES = (
    "python -m vistok.eval dpg --images DIR --resolution 512 --questions dpg_bench.csv --judge DIR",
    "python -m vistok.eval dpg --checkpoint runs/t2i --questions dpg_bench.csv --judge Qwen/Qwen2.5-VL-7B-Instruct",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_vqa_flags(parser, "dpg", per_prompt=4, published="mPLUG-large of ModelScope, which transformers lacks")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="DPG-Bench's dpg_bench.csv")
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", help="sample from DIR/ITEM.txt, such as rewritten prompts"
    )
    parser.add_argument(
        "--resolution",
        type=positive_int,
        metavar="PX",
        help="--images are grids of 2 x 2 images of this side, as in the published protocol (default: single images)",
    )


def run(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on DPG-Bench."""
    if args.images and args.prompts:
        raise UserError("--prompts is what a generator samples from: --images exist already")
    if args.checkpoint and args.resolution:
        raise UserError("--resolution tells how --images lie in their files: a generator makes single images")
    items = vqa.at_most(read_questions(args.questions), args.most_prompts)
    if args.prompts:
        items = read_texts(args.prompts, items)
    ask(args, DPGBench(items), args.resolution)
