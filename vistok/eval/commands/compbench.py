"""``compbench``: whether images show attributes, or objects, on what the prompt gives them to."""

from __future__ import annotations

import argparse
from pathlib import Path

from vistok.eval.commands.vqa import add_vqa_flags, ask
from vistok.eval.compbench import CompBench, Item, ObjectBinding, TwoSubjects, read_prompts

HELP = "how surely a judge sees attributes on the right things (T2I-CompBench), or whose objects are whose"
EXAMPLES = (
    "python -m vistok.eval compbench --images DIR --prompts color_val.txt --judge Salesforce/blip-vqa-base",
    "python -m vistok.eval compbench --checkpoint runs/t2i --prompts FILE --protocol object-binding --judge DIR",
)
PROTOCOLS: dict[str, tuple[type[CompBench], type[Item]]] = {
    "attribute-binding": (CompBench, Item),
    "object-binding": (ObjectBinding, TwoSubjects),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_vqa_flags(parser, "{compbench,object-binding}", per_prompt=10, published="BLIP-VQA; GPT-4o for object binding")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="one a line, such as T2I-CompBench's color_val.txt; a line may go on with the noun phrases of its prompt, "
        "each behind a tab (default: spaCy finds them). The NAME of images is their prompt",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="attribute-binding",
        help="attribute-binding: of every noun phrase (default); object-binding: of two subjects with an object each, "
        '"a cat with a hat and a dog with a scarf"',
    )


def run(args: argparse.Namespace) -> None:
    """Score a generator, or images that lie in a folder, on T2I-CompBench or on object binding."""
    benchmark, kind = PROTOCOLS[args.protocol]
    ask(args, benchmark(read_prompts(args.prompts, kind, args.most_prompts)))
