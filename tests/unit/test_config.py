from dataclasses import dataclass, field

import pytest

from vistok.config import Component, available, build, component_module, parse_overrides, read_yaml, to_yaml, typed
from vistok.errors import UserError


@dataclass
class Inner:
    width: int = 3
    levels: tuple[int, ...] = (8, 5)


@dataclass
class Outer:
    seed: int = 0
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    part: Component = field(default_factory=lambda: Component("y"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sed": 1}, ["'sed'", "did you mean 'seed'"]),
        ({"inner": {"widht": 1}}, ["'inner.widht'", "did you mean 'width'"]),
        ({"inner": {"width": "wide"}}, ["inner.width", "wide"]),
        ({"inner": {"width": 1.5}}, ["inner.width", "1.5"]),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_place(data, words):
    with pytest.raises(UserError) as caught:
        typed(Outer, data, "file.yaml")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("file.yaml: ")
    assert all(word in message for word in words)


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match="part of a run: missing value for name"):
        typed(Component, {"args": {"width": 1}}, "part of a run")


def test_the_command_line_wins_and_is_blamed_for_its_own_mistakes():
    config = typed(Outer, {"seed": 1, "name": "a"}, "file.yaml", parse_overrides(["seed=2", "inner.levels=[1,2,3]"]))
    assert (config.seed, config.name, tuple(config.inner.levels)) == (2, "a", (1, 2, 3))
    with pytest.raises(UserError, match=r"^command line: unknown key 'sed'"):
        typed(Outer, {}, "file.yaml", parse_overrides(["sed=2"]))


@pytest.mark.parametrize("word", ["seed", "=3", "--seed=3"])
def test_words_that_are_no_overrides(word):
    with pytest.raises(UserError, match="key=value"):
        parse_overrides([word])


def test_yaml_round_trip(tmp_path):
    (tmp_path / "c.yaml").write_text(to_yaml(Outer(seed=5)))
    assert typed(Outer, read_yaml(tmp_path / "c.yaml"), "c") == typed(Outer, {"seed": 5}, "c")


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_yaml(tmp_path / "none.yaml")
    for text in ("a: [1", "- 1\n- 2\n", "\x00"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml"):
            read_yaml(tmp_path / "bad.yaml")


def test_components_are_found_by_name():
    assert "flextok" in available("tokenizers") and "sampling" not in available("generators")
    with pytest.raises(UserError, match="did you mean 'flextok'"):
        component_module("tokenizers", "flextoc")
    with pytest.raises(UserError, match=r"tokenizers\.flextok: unknown key 'widht'"):
        build("tokenizers", Component("flextok", {"widht": 3}))
