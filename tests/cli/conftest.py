import importlib
import runpy
import sys

import pytest

from tiny_models.runs import ROOT
from vistok.cli import main


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script at the root of the repository, or ``vistok.<room>``, in this process to save time.

    Gives exit code, stdout and stderr.
    """

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = 0
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                main(importlib.import_module(f"{name}.__main__").run)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run
