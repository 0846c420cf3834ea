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
from typing import NoReturn

import torch

from vistok.errors import UserError


def main(run: Callable[[], None]) -> None:
    """Run a command; a :class:`UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
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


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """``--data``, ``--data-args`` and ``--workers``, for commands that read images."""
    parser.add_argument("--data", required=True, help="digits, shapes, photos, an image folder or shards")
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
