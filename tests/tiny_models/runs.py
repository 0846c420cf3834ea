"""Runs of the tiny models on digits, on the CPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from vistok.training.run_config import RunConfig, load_config

ROOT = Path(__file__).parents[2]

TIMES = ("images_per_s", "tokens_per_s", "mfu", "data_wait")


def tiny_yaml(folder: Path) -> Path:
    """A config file: 8 updates of the tiny tokenizer, output in ``folder/run``."""
    path = folder / "tiny.yaml"
    config = {
        "output": str(folder / "run"),
        "tokenizer": {"name": "tiny_models.tokenizer"},
        "data": {"name": "digits", "batch_size": 4},
        "optim": {"lr": 1e-2, "warmup_updates": 2},
        "trainer": {"max_updates": 8, "accelerator": "cpu", "val_every_updates": 4},
        "log": {"every_updates": 1, "pictures_every_updates": 100},
        "checkpoint": {"every_updates": 100},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def tiny_run(folder: Path, *overrides: str) -> RunConfig:
    """The run of :func:`tiny_yaml`, with ``key=value`` overrides."""
    return load_config(tiny_yaml(folder), list(overrides))


def read_state(folder: Path) -> dict[str, Any]:
    """Everything that a run left to go on from."""
    return torch.load(folder / "last.ckpt", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` without the columns that measure time."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k[6:] not in TIMES} for row in csv.DictReader(file)]


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the last bit, whatever they hold."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def start_process(*command: str) -> subprocess.Popen:
    """``python COMMAND`` at the root of the repository, with the tiny models importable."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """Check exit code, stdout and stderr of a command line that has said no, in one line that has all ``parts``."""
    code, _, err = result
    line = err.split("\r")[-1]  # what stands before is a progress bar, wiped
    assert code == 2, err
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), err
    assert all(part in line for part in parts), line
