"""What every command line shares: errors as one line, flags that print numbers the same way."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

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


def quiet_libraries() -> None:
    """Hide library hints that a user cannot act on, so that a stage is one progress line."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _report(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
