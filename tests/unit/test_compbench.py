"""T2I-CompBench's attribute binding, and object binding: their prompt files, questions and scores."""

import itertools
from types import SimpleNamespace

import pytest

from vistok.errors import UserError
from vistok.eval import compbench, vqa
from vistok.eval.compbench import CompBench, Item, Subject, TwoSubjects, binding_level, read_prompts
from vistok.eval.vqa import Record

PAIRS = ("a cat", "a hat", "The dog", "a scarf")


@pytest.fixture
def write(tmp_path):
    def write_prompts(text):
        (tmp_path / "color.txt").write_text(text)
        return tmp_path / "color.txt"

    return write_prompts


def test_prompts_are_read_line_by_line(write):
    items = read_prompts(write("a red hat and a cup\ta red hat\ta cup\n\n a blue cup. \ta blue cup\n"))
    assert items == [Item("a red hat and a cup", ("a red hat", "a cup")), Item("a blue cup.", ("a blue cup",))]
    assert items[0].asked == ["a red hat?", "a cup?"] and items[1].name == "a blue cup"
    assert read_prompts(write("a\ta\nb\tb\nc\tc\nd\td\n"), most=2) == [Item("a", ("a",)), Item("c", ("c",))]


def test_noun_phrases_that_the_file_does_not_name_are_found(write, monkeypatch):
    def parser(text):
        return SimpleNamespace(noun_chunks=[SimpleNamespace(text=words) for words in text.split(", ")])

    monkeypatch.setattr(compbench, "load_spacy", lambda: parser)
    items = read_prompts(write("a cup, the left\na hat, a dog\ta hat\n"))
    assert [item.phrases for item in items] == [("a cup",), ("a hat",)]
    with pytest.raises(UserError, match="no noun phrase in 'the top'; name them in the prompt file"):
        read_prompts(write("the top\n"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a cup\na hat\na cup.\n", "line 3: the prompt 'a cup.' is there already"),
        ("a hat\non/off\n", "line 2: 'on/off' cannot name images: it has a slash"),
        ("\n", "has no prompt"),
    ],
)
def test_bad_lines_are_named(write, text, message):
    with pytest.raises(UserError, match=message):
        read_prompts(write(text))


def test_files_that_are_no_prompts(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_images_are_found_by_the_prompt_in_their_name(tmp_path):
    for name in ("a cup._000001.png", "a cup._000000.png", "a hat_000000.png", "notes.png"):
        (tmp_path / name).touch()
    found = vqa.find_images(tmp_path, [Item("a cup.", ("a cup",)), Item("a hat", ("a hat",))])
    assert [[file.name for file in files] for files in found] == [
        ["a cup._000000.png", "a cup._000001.png"],
        ["a hat_000000.png"],
    ]


def test_an_image_scores_the_product_and_the_benchmark_the_mean_of_images():
    hat, cup = Item("a red hat and a cup", ("a red hat", "a cup")), Item("a cup", ("a cup",))
    records = [Record("0", hat, (0.5, 0.25)), Record("1", hat, (1.0, 0.5)), Record("2", cup, (0.5,))]
    assert CompBench([hat, cup]).scores(records) == {"overall": (0.125 + 0.5 + 0.5) / 3}


def test_levels_of_object_binding():
    right, both, wrong, bare = (
        Subject(True, *has) for has in ((True, False), (True, True), (False, True), (False, False))
    )
    gone = Subject(False, False, False)
    expected = {
        (right, right): 1.0,
        (right, both): 0.875,
        (both, both): 0.75,
        (right, wrong): 0.625,
        (right, bare): 0.5,
        (bare, wrong): 0.375,
        (bare, bare): 0.25,
        (right, gone): 0.125,
        (gone, gone): 0.0,
    }
    for (first, second), level in expected.items():
        assert binding_level(first, second) == binding_level(second, first) == level
    levels = {binding_level(*pair) for pair in itertools.product((right, both, wrong, bare, gone), repeat=2)}
    assert levels == set(expected.values())


def test_a_judge_is_asked_of_each_subject_and_both_objects(write):
    (item,) = read_prompts(write("\t".join(["a cat with a hat and the dog with a scarf", *PAIRS])), TwoSubjects)
    world = {"is there a cat?", "is there The dog?", "does the cat have a hat?", "does the dog have a hat?"}
    assert len(item.asked) == 6 and world < set(item.asked)
    assert item.score([0.5 + 0.1 * (question in world) for question in item.asked]) == 0.625


@pytest.mark.parametrize("phrases", [PAIRS[:2], (*PAIRS, "a tree")])
def test_object_binding_needs_two_subjects(write, phrases):
    with pytest.raises(UserError, match=f"in 'a park' there is {', '.join(phrases)}"):
        read_prompts(write("\t".join(["a park", *phrases])), TwoSubjects)
