"""Commands that the pages, the helps and the headers of configs show can be typed as they stand; none is run."""

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
import sys
from functools import cache
from itertools import pairwise
from unittest.mock import patch

import pytest

from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.runs import ROOT
from vistok.cli import usable_device
from vistok.errors import UserError
from vistok.published import released_models
from vistok.training.run_config import load_config

PAGES = ("README.md", "benchmarks/README.md")
CONFIGS = [*ROOT.glob("configs/**/*.yaml")]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("vistok/**/*.py"), *ROOT.glob("benchmarks/*.py")]
COMMAND = re.compile(r"(?:\w+=\S+ )?(?:\bpython|torchrun --nproc-per-node \d+)\s+(?=-m\s+\w|[\w/]+\.py\b)")
WORD = re.compile(r'(?:"[^"]*"|[^\s"])+')
LEFT_OUT = ("...", "…")
BEHIND = re.compile(r"[(#]|(then|or|and|\w+=\S+)? ?python|then$|or$|and$")
"""Words of a sentence behind a command."""
DOWNLOADED = ("weights/flan-t5-xl", "weights/clip-vit-large-patch14")


# ---------------------------------------------------------------------- where commands stand


def commands(text):
    """The commands in a text, each as a tuple of words: up to the punctuation that ends them in a sentence."""
    text = re.sub(r"\\\n[ #]*", " ", text)
    text = re.sub(r"(?<=\s)\[([^][]*)\]", r"\1", text)  # what may be left out
    for start in COMMAND.finditer(text):
        found = []
        for word in WORD.findall(text[start.end() :].split("\n\n")[0]):
            if BEHIND.match(word):
                break
            whole = word if word in LEFT_OUT else word.rstrip("`),.;:")
            found += shlex.split(whole)
            if whole != word:
                break
        yield tuple(found)


def of_page(name):
    """Those of a page: lines of blocks of code that begin with one, and spans of code elsewhere."""
    for number, part in enumerate(re.split(r"^```.*\n", (ROOT / name).read_text(), flags=re.MULTILINE)):
        lines = re.sub(r"\\\n", " ", part).splitlines()
        for span in filter(COMMAND.match, lines) if number % 2 else re.findall(r"`([^`]+)`", part):
            yield from commands(span)


def of_header(config):
    """Those of each field of a config's header."""
    lines = [line[1:] for line in config.read_text().splitlines() if line.startswith("#")]
    for field in re.split(r"\n(?= ?\S)", "\n".join(lines)):
        yield from commands(field)


def of_helps():
    """Those that ``--help`` of each command line shows around its flags, with its name."""
    for path in (path for path in SOURCES if "if __name__" in path.read_text()):
        for parser in family(parser_of(path)):
            text = re.sub(r"\\\n", " ", f"{parser.description}\n{parser.epilog}")
            yield from ((f"{parser.prog} --help", words) for line in text.splitlines() for words in commands(line))


def documented():
    """Every command with the place where it stands."""
    for name in PAGES:
        yield from ((name, words) for words in of_page(name))
    for path in CONFIGS:
        yield from ((str(path.relative_to(ROOT)), words) for words in of_header(path))
    for path in SOURCES:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield from ((str(path.relative_to(ROOT)), words) for words in commands(text))
    yield from of_helps()


# ---------------------------------------------------------------------- what they are checked by


class Parsing(BaseException):
    """Ends a program when its parser is made."""


@cache
def parser_of(path, left_out=False):
    """The parser of a script; with ``left_out`` nothing is required."""

    def stop(parser, *args):
        raise Parsing(parser)

    parsing = dict.fromkeys(("parse_args", "parse_intermixed_args"), stop)
    beside = patch.object(sys, "path", [str(path.parent), *sys.path])
    with patch.multiple(argparse.ArgumentParser, **parsing), beside, pytest.raises(Parsing) as made:
        runpy.run_path(str(path), run_name="__main__")
    (parser,) = made.value.args
    for one in family(parser):
        for action in one._actions:
            if action.type is usable_device:  # a GPU that a command names and this machine may lack
                action.type = str
        for needed in (*one._actions, *one._mutually_exclusive_groups):
            needed.required &= not left_out
    return parser


def family(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from family(one)


@cache
def run_of(path, *overrides):
    return load_config(ROOT / path, list(overrides))


def check(words):
    """Raise unless a command could be typed: files that ship exist; modules, commands, flags and keys are known."""
    shipped = [part for word in words for part in word.split("=") if re.match(r"(configs|tests|benchmarks)/\w", part)]
    assert not (missing := [part for part in shipped if not (ROOT / part).exists()]), f"no {missing}"
    program, *words = words[words[0] == "-m" :]
    if not program.endswith(".py") and not program.startswith("vistok"):
        assert importlib.util.find_spec(program), f"no module {program}"
        return
    file = ROOT / (program if program.endswith(".py") else program.replace(".", "/"))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert file.exists(), f"no {program}"
    left_out = any(word in LEFT_OUT for word in words)
    words = [word for word in words if word not in LEFT_OUT]
    parser = parser_of(file, left_out)
    if "--help" in words or " ".join([program, *words]) in [
        one.prog.removeprefix("python -m ") for one in family(parser)
    ]:
        return  # no more than the name of a command
    if program != "train.py":
        args = parser.parse_args(words)
        assert program != "vistok.published" or args.model in released_models(), f"{args.model} has no release"
        return
    args = parser.parse_intermixed_args(words)
    if args.config.startswith("configs/"):
        unsaid = ["tokenizer=DIR"] if left_out and "\ngenerator:" in (ROOT / args.config).read_text() else []
        run_of(args.config, *unsaid, *args.overrides)


def refusal(words):
    """What is wrong with a command; None if nothing is."""
    try:
        check(words)
    except (UserError, AssertionError, SystemExit) as error:
        return str(error)
    return None


# ---------------------------------------------------------------------- tests


def test_documented_commands_work_as_typed():
    found = set(documented())
    places = {place for place, _ in found}
    configs = {str(path.relative_to(ROOT)) for path in CONFIGS}
    assert {*PAGES, *configs, "python -m vistok.published --help", "python -m vistok.data tokens --help"} <= places
    refused = [f"{place}: {shlex.join(words)}: {why}" for place, words in sorted(found) if (why := refusal(words))]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize(
    "text",
    [
        "python train.py --config configs/digits/none.yaml",
        "python train.py --config configs/digits/gpt.yaml",  # without a tokenizer
        "python train.py --config configs/digits/flextok.yaml optim.learning_rate=1",
        "python sample.py --checkpoint DIR --cfg 2 --top_k 3",
        "python sample.py --out DIR",
        "python -m vistok.eval reconstruct --checkpoint DIR",
        "(python -m vistok.eval probe … --steps 3).",
        "python -m vistok.published gpt2 FILE --out DIR",
        "python -m vistok.nothing",
        "python -m nothing",
        "python benchmarks/nothing.py",
        "OMP_NUM_THREADS=1 python benchmarks/token_shuffle.py --no-such-flag",
        "python -m pytest tests/unit/test_nothing.py",
    ],
)
def test_a_wrong_command_is_found(text):
    (words,) = commands(text)
    assert refusal(words)


def test_pages_make_what_they_read_and_no_folder_twice():
    made, read = {}, set()
    for words in {words for name in PAGES for words in of_page(name) if not set(LEFT_OUT) & set(words)}:
        options = dict(pairwise(words))
        out = options.get("--out", "")
        if words[0] == "train.py" and words[2].startswith("configs/"):
            out = run_of(*words[2:]).output
            assert made.setdefault(out, words) == words, out
        made.setdefault(out, words)
        read |= {word.split("=")[-1] for word in words} - {out}
    of_headers = (words for path in CONFIGS for words in of_header(path) if words[0] == "train.py")
    there = (*DOWNLOADED, "runs/demo", *filter(None, made), *(run_of(*words[2:]).output for words in of_headers))
    folders = [part for part in read if part.startswith(("runs/", "weights/"))]
    assert folders and not [part for part in folders if not part.startswith(there)]


def test_the_python_of_the_readme_runs(tmp_path):
    tokenizer = export_tokenizer(tmp_path / "flextok")
    export_generator(tmp_path / "gpt", tokenizer, [str(digit) for digit in range(10)])
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    there = {}
    exec(block.replace("runs/digits/", f"{tmp_path}/"), there)
    assert there["coarse"].shape == there["images"].shape == (4, 3, 16, 16)
    assert there["samples"].shape == (2, 3, 16, 16)
