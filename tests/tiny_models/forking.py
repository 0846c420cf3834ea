"""A process that has imported all and runs benchmarks/table.py in forks of itself, and its stages in forks of those.

Importing torch for each of a dozen stages would take minutes. Nothing may be trained before a fork: autograd's threads
do not survive one.

    stdin    ["LOG", "WORD", ...]    a file for the output, and the words of the command line, as JSON
    stdout   the process id, and when it is over its exit code
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from types import SimpleNamespace

from tiny_models.runs import ROOT
from vistok.config import available

PRELOADED = ("vistok.training.run", "vistok.eval.__main__", "matplotlib.figure", "timm", "torch._dynamo")


def fork(command: tuple[str, ...], log: int) -> int:
    """Run ``python COMMAND`` in a fork with its output in the file ``log``."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        module = command[0] == "-m"
        sys.argv = list(command[module:])
        (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start(command: tuple[str, ...], log: int, threads: int) -> SimpleNamespace:
    """In place of the function of benchmarks/stages.py."""
    pid = fork(command, log)
    return SimpleNamespace(pid=pid, send_signal=lambda number: os.kill(pid, number), returncode=None)


def main() -> None:
    """Serve until stdin ends."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    for name in PRELOADED:
        __import__(name)
    for kind in ("tokenizers", "generators", "text_encoders", "data"):  # as the help of train.py does
        available(kind)
    import stages

    stages.start = start
    for line in sys.stdin:
        path, *words = json.loads(line)
        with open(path, "w") as log:
            pid = fork(("benchmarks/table.py", *words), log.fileno())
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
