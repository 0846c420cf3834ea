import itertools
import json
import sys

import pytest
import torch
from PIL import Image

from tiny_models.judges import WORDS, save_judge
from vistok.errors import UserError
from vistok.eval.judges import BlipVQA
from vistok.merging.compbench import (
    Prompt,
    Subject,
    attribute_score,
    binding_level,
    find_images,
    noun_phrases,
    object_binding_score,
    parse_args,
    read_prompts,
    run,
)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return save_judge("blip", tmp_path_factory.mktemp("blip"))


def picture(seed):
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def test_blip_answers_as_its_own_generation_does(blip):
    judge = BlipVQA(str(blip))
    questions = ["a red hat?", "a blue cup?", "hat?"]
    answers = judge(picture(0), questions)
    for question, answer in zip(questions, answers):
        inputs = judge.processor(images=picture(0), text=question, return_tensors="pt")
        outputs = judge.model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(answer, outputs.logits[0][0].softmax(-1)[WORDS.index("yes")])
    assert len(set(answers.tolist())) == 3 and (judge(picture(1), questions) != answers).any()


def test_an_attribute_score_is_the_product_of_the_answers():
    asked = []

    def judge(image, questions):
        asked.extend(questions)
        return torch.tensor([0.5, 0.25])

    assert attribute_score(judge, picture(0), ["a red hat", "a cup"]) == 0.125
    assert asked == ["a red hat?", "a cup?"]


def test_prompts_are_read_line_by_line(tmp_path):
    file = tmp_path / "color.txt"
    file.write_text("a red hat and a cup\ta red hat\ta cup\n\n a blue cup. \n")
    prompts = read_prompts(file)
    assert prompts == [Prompt("a red hat and a cup", ("a red hat", "a cup")), Prompt("a blue cup.")]
    assert noun_phrases(prompts[0], nlp=None) == ("a red hat", "a cup")
    file.write_text("a cup\na hat\na cup\n")
    with pytest.raises(UserError, match="line 3: the prompt 'a cup' is there already"):
        read_prompts(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="has no prompt"):
        read_prompts(file)


def test_images_are_found_by_the_prompt_in_their_name(tmp_path):
    for name in ("a cup_000001.png", "a cup_000000.png", "a hat_000000.png", "notes.png"):
        (tmp_path / name).touch()
    found = find_images(tmp_path, [Prompt("a cup."), Prompt("a hat")])
    assert {text: [file.name for file in files] for text, files in found.items()} == {
        "a cup.": ["a cup_000000.png", "a cup_000001.png"],
        "a hat": ["a hat_000000.png"],
    }
    with pytest.raises(UserError, match="1 of 2 prompts have no image, such as 'a dog'"):
        find_images(tmp_path, [Prompt("a hat"), Prompt("a dog")])


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


def test_a_judge_is_asked_of_each_subject_and_both_objects():
    world = {"is there a cat?", "is there a dog?", "does the cat have a hat?", "does the dog have a hat?"}
    pairs = [("cat", "hat"), ("dog", "scarf")]

    def judge(image, questions):
        assert len(questions) == 6
        return torch.tensor([question in world for question in questions]).float()

    assert object_binding_score(judge, picture(0), pairs) == 0.625
    with pytest.raises(UserError, match="two pairs"):
        object_binding_score(judge, picture(0), pairs[:1])


def test_the_command_line(blip, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "color.txt"
    prompts.write_text("a red hat and a blue cup\ta red hat\ta blue cup\n")
    for index in range(2):
        picture(index).save(tmp_path / f"a red hat and a blue cup_{index:06d}.png")
    out = tmp_path / "out" / "scores.json"
    words = ["compbench", "--prompts", prompts, "--images", tmp_path, "--judge", blip, "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    run(parse_args())
    scores = json.loads(out.read_text())
    judge = BlipVQA(str(blip))
    expected = [attribute_score(judge, picture(index), ["a red hat", "a blue cup"]) for index in range(2)]
    assert [record["score"] for record in scores["images"]] == pytest.approx(expected, rel=1e-5)
    assert f"BLIP-VQA {sum(expected) / 2:.4f}: mean of 2 images of 1 prompts" in capsys.readouterr().out


def test_a_judge_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"--judge .* cannot be read"):
        BlipVQA(str(tmp_path))
