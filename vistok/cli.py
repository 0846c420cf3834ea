"""What every command line shares: mistakes as one line, words that are numbers, counts or devices."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, NoReturn

import torch

from vistok.errors import UserError


def main(run: Callable[[], None]) -> None:
    """Run a command; a :class:`UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    A warning becomes one line too.
    """
    # One line, as a mistake is, without the source that warns.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    # A pipe that closes early (| head) is no error worth a traceback.
    try:
        run()
    except UserError as error:
        sys.exit(_report(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(_report(f"cannot write {error.filename or 'a file'}: {error.strerror}"))


class ArgumentParser(argparse.ArgumentParser):
    """The standard one, with a mistake as one line instead of the whole usage; run it inside :func:`main`."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message} (see --help)")


def add_data_flags(parser: argparse.ArgumentParser, default: str | None = None, required: bool = True) -> None:
    """``--data``, ``--data-args`` and ``--workers``, for commands that read images."""
    text = "digits, shapes, photos, an image folder or shards"
    text = text if default is None else f"{text} (default: {default})"
    parser.add_argument("--data", required=required and default is None, default=default, help=text)
    parser.add_argument(
        "--data-args",
        nargs="*",
        default=[],
        metavar="key=value",
        help="as data.args of train.py, such as on_error=skip val_fraction=0.1",
    )
    parser.add_argument(
        "--workers", type=non_negative_int, default=0, metavar="N", help="loader processes (default: %(default)s)"
    )


SAMPLING = ("guidance_interval", "temperature", "final_temperature", "top_k", "top_p", "min_p", "compile")
"""Flags of :func:`add_sampling_flags`, as attributes of the parsed command line and of ``SampleOptions``."""


def add_sampling_flags(parser: argparse._ActionsContainer) -> list[argparse.Action]:
    """How codes are drawn, for commands that take a generator (``--cfg-scale`` is their own); None where not given."""
    add = parser.add_argument
    interval_help = "guide only while this share of the codes is known (default: 0,1)"
    final_help = "what it moves to by the last code (default: the same)"
    min_help = "keep codes with this share of the likeliest's; 0 keeps all (default)"
    return [
        add("--guidance-interval", type=interval, metavar="A,B", help=interval_help),
        add("--temperature", type=float, metavar="T", help="0 takes the likeliest code (default: 1)"),
        add("--final-temperature", type=float, metavar="T", help=final_help),
        add("--top-k", type=int, metavar="K", help="keep the k likeliest codes; 0 keeps all (default: 0)"),
        add("--top-p", type=float, metavar="P", help="keep this much probability; 1 keeps all (default: 1)"),
        add("--min-p", type=float, metavar="P", help=min_help),
        add("--compile", action="store_const", const=True, help="compile the steps of a gpt; on a GPU, as CUDA graphs"),
    ]


def sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of :func:`add_sampling_flags` that were given, as arguments of ``SampleOptions``."""
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}


def interval(text: str) -> tuple[float, float]:
    """Two numbers with a comma between, as a ``type`` for argparse."""
    try:
        first, end = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two numbers such as 0,0.5, got {text!r}") from None
    return first, end


@contextmanager
def flag_for(key: str, flag: str) -> Iterator[None]:
    """Let the UserErrors of a command name its ``flag`` for a ``key`` of a run's config, which other rooms name."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(key, flag)) from error


def positive_int(text: str) -> int:
    """A whole number of at least 1, as a ``type`` for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0, as a ``type`` for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def token_counts(text: str) -> list[int]:
    """Whole numbers between commas, as a ``type`` for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 1,4,16, got {text!r}") from None


def usable_device(text: str) -> str:
    """A device that this machine has, as a ``type`` for argparse."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {shorten(str(error), 200)}") from None
    return text


def quiet_libraries() -> None:
    """Hide library hints that a user cannot act on, so that a stage is one progress line."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _report(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
