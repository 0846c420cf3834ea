"""Imports point down only (the rooms of the house)."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vistok
from vistok.config import available

ROOT = Path(vistok.__file__).parent
BASE = {"errors", "tokens", "rng", "interfaces", "config", "files", "key_maps", "checkpoint", "cli"}
PARTS = {"nn", "quantizers", "flow", "losses"}
ALLOWED = {
    "errors": set(),
    "rng": set(),
    "tokens": {"errors"},
    "interfaces": {"errors", "rng", "tokens"},
    "config": {"errors"},
    "cli": {"errors"},
    "geneval_rules": set(),
    "files": {"errors"},
    "key_maps": {"errors"},
    "checkpoint": {"errors", "tokens", "interfaces", "config", "files", "key_maps"},
    **dict.fromkeys(PARTS, BASE | {"nn"}),
    "nn": BASE,
    "tokenizers": BASE | PARTS,
    "generators": BASE | PARTS,
    "text_encoders": BASE | {"nn"},
    "merging": BASE | PARTS | {"generators", "data"},
    "pictures": {"errors", "files"},
    "pipeline": BASE | {"pictures"},
    "published": {"errors", "tokens", "cli", "files", "checkpoint", "config"},
    "data": BASE | {"pictures", "geneval_rules"},
    "eval": BASE | {"nn", "losses", "merging", "data", "pictures", "pipeline", "geneval_rules"},
    "discretize": BASE | {"data", "eval", "quantizers", "tokenizers"},
    "training": BASE | {"nn", "losses", "data", "eval", "pictures", "pipeline"},
}


def test_what_is_allowed_has_no_cycle():
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"vistok.{a.name}" for a in node.names] if node.module == "vistok" else [node.module]
        yield from (name.split(".")[1] for name in names if name.startswith("vistok."))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below_it(path):
    relative = path.relative_to(ROOT)
    if relative.name == "__init__.py" and len(relative.parts) == 1:
        return
    room = relative.parts[0].removesuffix(".py")
    foreign = set(imports(path)) - ALLOWED[room] - {room}
    assert not foreign, f"{relative} imports {sorted(foreign)}"


def test_the_training_room_names_no_model():
    names = {name for kind in ("tokenizers", "generators", "text_encoders") for name in available(kind)}
    for path in [*(ROOT / "training").glob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "data").glob("*.py")]:
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & names, f"{path.name} names {words & names}"
