"""``python -m vistok.eval``: measure tokenizers and generators, compare measurements, write a run's report."""

from __future__ import annotations

import argparse

from vistok.cli import ArgumentParser, main
from vistok.errors import UserError
from vistok.eval.commands import (
    compare,
    compbench,
    dpg,
    gallery,
    genai,
    generation,
    geneval,
    probe,
    reconstruction,
    reference,
    report,
    train_features,
    train_teacher,
)
from vistok.eval.processes import num_processes, together

COMMANDS = (
    reconstruction,
    generation,
    reference,
    geneval,
    dpg,
    genai,
    compbench,
    probe,
    compare,
    report,
    gallery,
    train_features,
    train_teacher,
)
SHARED = (reconstruction, generation, reference, geneval, dpg, genai, compbench, probe)
"""Commands that several processes can share out."""


def build_parser() -> argparse.ArgumentParser:
    """All commands of this module."""
    parser = ArgumentParser(
        prog="python -m vistok.eval",
        description=__doc__,
        epilog=_examples(*(example for command in COMMANDS for example in command.EXAMPLES)),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        one = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=_examples(*command.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_flags(one)
        one.set_defaults(run=command.run, shared=command in SHARED, command=name)
    return parser


def run() -> None:
    """Parse the command line and do what it says."""
    with together():
        args = build_parser().parse_args()
        if num_processes() > 1 and not args.shared:
            raise UserError(f"{args.command} is the work of one process: start it without torchrun")
        if getattr(args, "checkpoint", None) and args.out is None:
            args.out = args.checkpoint / "eval"
        args.run(args)


def _examples(*lines: str) -> str:
    return "\n  ".join(("examples:", *lines)) if lines else ""


if __name__ == "__main__":
    main(run)
