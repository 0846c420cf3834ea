"""Commands that need one another, each run once as a process: several at a time, with a log and a record.

NAME.log    what the command has printed, in all its tries
NAME.json   its words, when it last began and ended (null until it succeeds), commits, wall and processor seconds

A stage whose record has an end is not run again, unless one that it needs was, its output is gone or its words differ.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistok.errors import UserError

POLL_S = 0.1


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: such as digits/vqgan/tokenizer.
        command: the words after ``python``.
        makes: a file that is there once it has succeeded.
        needs: names of the stages whose output it reads.
        resumes: an interrupted one goes on where it was, so its words must stay what they were.
        clears: folder that must not be there when it starts: what an earlier try has left is removed.
        alone: nothing may run beside it, because it measures time.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[str, ...] = ()
    resumes: bool = False
    clears: Path | None = None
    alone: bool = False

    @property
    def words(self) -> str:
        """The command as a user types it."""
        return f"python {shlex.join(self.command)}"


@dataclass(frozen=True)
class Running:
    """A process and when it began."""

    stage: Stage
    process: subprocess.Popen
    began: float


class Stages:
    """Runs stages, as many at a time as there are ``jobs``.

    Args:
        stages: in the order in which they start if they can.
        folder: of the logs and records.
        jobs: most processes at a time.
        threads: of each process.

    Raises:
        UserError: if a stage was begun by another command and cannot change it.
    """

    def __init__(self, stages: list[Stage], folder: Path, jobs: int, threads: int) -> None:
        self.stages, self.folder, self.jobs, self.threads = stages, folder, jobs, threads
        self.failed: dict[str, str] = {}
        for stage in stages:
            record = self.record(stage.name)
            if stage.resumes and record.get("command", stage.words) != stage.words:
                raise UserError(
                    f"{folder / stage.name} was begun by another command ({record['command']}): give another --out, "
                    f"or remove it and {self._path(stage.name, 'json')}"
                )

    def record(self, name: str) -> dict[str, Any]:
        """What is known of a stage; empty if it never began."""
        path = self._path(name, "json")
        return json.loads(path.read_text()) if path.is_file() else {}

    def run(self) -> dict[str, str]:
        """Run what is not finished; what failed, and why.

        Stages that need a failed one are not run. Those that must be alone come last.
        """
        for alone in (False, True):
            self._run([stage for stage in self.stages if stage.alone == alone], 1 if alone else self.jobs)
        return self.failed

    def _run(self, waiting: list[Stage], at_once: int) -> None:
        running: list[Running] = []
        ahead = {stage.name for stage in waiting}
        try:
            while waiting or running:
                for stage in list(waiting):
                    if lost := [need for need in stage.needs if need in self.failed]:
                        self._fail(stage, f"needs {lost[0]}")
                    elif ahead.intersection(stage.needs):
                        continue
                    elif not self._finished(stage):
                        if len(running) == at_once:
                            continue
                        running.append(self._start(stage))
                        waiting.remove(stage)
                        continue
                    waiting.remove(stage)
                    ahead.remove(stage.name)
                for one in list(running):
                    pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
                    if pid:
                        running.remove(one)
                        ahead.remove(one.stage.name)
                        self._end(one, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
                time.sleep(POLL_S)
        finally:
            for one in running:
                print(f"stop   {one.stage.name}, the same command goes on", flush=True)
                one.process.send_signal(signal.SIGTERM)
            for one in running:
                _, status, usage = os.wait4(one.process.pid, 0)
                one.process.returncode = os.waitstatus_to_exitcode(status)
                self._spent(one, usage.ru_utime + usage.ru_stime)

    def _finished(self, stage: Stage) -> bool:
        record = self.record(stage.name)
        if not record.get("ended") or record["command"] != stage.words or not stage.makes.exists():
            return False
        return all((self.record(need).get("ended") or 0) <= record["began"] for need in stage.needs)

    def _start(self, stage: Stage) -> Running:
        if stage.clears is not None and stage.clears.exists():
            shutil.rmtree(stage.clears)
        before, began = self.record(stage.name), time.time()
        tried = {"commits": [], "seconds": 0.0, "processor_seconds": 0.0}
        if not before.get("ended") and before.get("command") == stage.words:
            tried = {key: before[key] for key in tried}
        commits = sorted({*tried["commits"], commit()})
        self._write(stage, {**tried, "command": stage.words, "commits": commits, "began": began, "ended": None})
        log = self._path(stage.name, "log")
        with log.open("a") as file:
            print(f"$ {stage.words}", file=file, flush=True)
            process = start(stage.command, file.fileno(), self.threads)
        print(f"begin  {stage.name}", flush=True)
        return Running(stage, process, began)

    def _end(self, one: Running, code: int, processor_s: float) -> None:
        one.process.returncode = code  # so that it does not wait for a process that is gone
        record, stage = self._spent(one, processor_s), one.stage
        if code or not stage.makes.exists():
            last = self._path(stage.name, "log").read_text(errors="replace").replace("\r", "\n").split("\n")
            said = next((line for line in reversed(last) if line.strip()), "")
            self._fail(stage, f"exit code {code}: {said.strip()[:300]}; log: {self._path(stage.name, 'log')}")
            return
        self._write(stage, {**record, "ended": time.time()})
        print(f"end    {stage.name}, {record['seconds']:.0f} s", flush=True)

    def _fail(self, stage: Stage, reason: str) -> None:
        self.failed[stage.name] = reason
        print(f"FAILED {stage.name}: {reason}", flush=True)

    def _spent(self, one: Running, processor_s: float) -> dict[str, Any]:
        record = self.record(one.stage.name)
        record["seconds"] = round(record["seconds"] + time.time() - one.began, 1)
        record["processor_seconds"] = round(record["processor_seconds"] + processor_s, 1)
        self._write(one.stage, record)
        return record

    def _write(self, stage: Stage, record: dict[str, Any]) -> None:
        path = self._path(stage.name, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(path)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / "logs" / f"{name.replace('/', '.')}.{suffix}"


def start(command: tuple[str, ...], log: int, threads: int) -> subprocess.Popen:
    """``python COMMAND`` with its output in a file, out of reach of this terminal's Ctrl-C: it is told to stop once."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "30"},
        start_new_session=True,
    )


def commit() -> str:
    """The state of the code."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"
