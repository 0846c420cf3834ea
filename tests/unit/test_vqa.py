"""DPG-Bench and GenAI-Bench: their files, their rules, the images of their prompts, and the judges."""

import json
import shutil

import pytest
import torch
from PIL import Image

from tiny_models.judges import WORDS, save_judge
from vistok.errors import UserError
from vistok.eval import dpg, genai, vqa
from vistok.eval.judges import BlipVQA, VisionLanguageModel, load_judge
from vistok.eval.vqa import Record

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
HEADER += "question_natural_language"
HAT = 'hat,"a red hat, on a table",'
ROWS = [
    f"{HAT},1,0,entity,whole,entity - whole (hat),Is there a hat?",
    f"{HAT},2,1,attribute,color,attribute - color (hat; red),Is the hat red?",
    f"{HAT},3,0,entity,whole,entity - whole (table),Is there a table?",
    f'{HAT},4,"1, 3",relation,spatial,"relation - spatial (hat, table, on)",Is the hat on the table?',
    f"{HAT},5,4,relation,spatial,relation - spatial (hat; table; centre),Is the hat on the middle of the table?",
    "dusk,dusk,,1,0,global,,global - (dusk),Is it dusk?",
]


def write_csv(tmp_path, rows=ROWS, header=HEADER):
    file = tmp_path / "dpg_bench.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def picture(seed, side=16):
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


# ---- DPG-Bench -------------------------------------------------------------------------------------------------


def test_questions_are_read_with_their_dependencies(tmp_path):
    hat, dusk = dpg.read_questions(write_csv(tmp_path))
    assert (hat.name, hat.text, len(hat.questions)) == ("hat", "a red hat, on a table", 5)
    assert [question.parents for question in hat.questions] == [(), (1,), (), (1, 3), (4,)]
    assert [question.category for question in hat.questions[1:3]] == ["attribute - color", "entity - whole"]
    assert hat.questions[1].broad == "attribute"
    assert dusk.questions == (dpg.Question(1, "Is it dusk?", (), "global"),)
    assert hat.asked[0] == "Is there a hat?"


# Answers to the five questions about the hat, and which of them count.
DEPENDENCIES = {
    "all": ([1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
    "none": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    "no hat": ([0, 1, 1, 1, 1], [0, 0, 1, 0, 0]),  # nor what depends on what depends on it
    "no table": ([1, 1, 0, 1, 1], [1, 1, 0, 0, 0]),  # one parent of two is enough
    "a leaf": ([1, 0, 1, 1, 0], [1, 0, 1, 1, 0]),
}


@pytest.mark.parametrize("case", DEPENDENCIES)
def test_a_question_counts_only_if_what_it_depends_on_does(tmp_path, case):
    hat, _ = dpg.read_questions(write_csv(tmp_path))
    given, counting = DEPENDENCIES[case]
    yes = [0.2 + 0.6 * answer for answer in given]
    assert hat.counting(yes) == list(map(bool, counting))
    assert hat.score(yes) == sum(counting) / 5


def test_half_a_chance_is_no_yes():
    assert dpg.answers([0.5, 0.51]) == [False, True]


def test_scores_are_means_of_prompts_and_categories_means_of_answers(tmp_path):
    bench = dpg.DPGBench(dpg.read_questions(write_csv(tmp_path)))
    hat, dusk = bench.items
    records = [
        Record("hat/0.png", hat, (0.1, 0.9, 0.9, 0.9, 0.9)),  # no hat: 1 of 5 counts
        Record("hat/1.png", hat, (0.9, 0.9, 0.9, 0.1, 0.1)),  # 3 of 5
        Record("dusk/0.png", dusk, (0.9,)),
    ]
    scores = bench.scores(records)
    assert scores == pytest.approx(
        {"attribute": 100, "entity": 75, "global": 100, "relation": 50, "overall": 100 * (0.4 + 1) / 2}
    )
    parts = bench.parts(records)
    assert list(parts) == [
        "attribute", "attribute - color", "entity", "entity - whole", "global", "relation", "relation - spatial"
    ]  # fmt: skip
    assert parts["entity"] == parts["entity - whole"] == {"questions": 4, "score": 75}
    line = json.loads(vqa.result_line(records[0]))
    assert (line["name"], line["score"], line["yes"][0]) == ("hat", 0.2, 0.1)
    assert line["questions"][1] == "Is the hat red?"


BAD_ROWS = {
    "line 3: no 'question_natural_language'": [*ROWS[:1], ROWS[1].replace("Is the hat red?", "")],
    "line 3: more fields than columns": [*ROWS[:1], ROWS[1] + ",and more"],
    "line 2: proposition_id and dependency must be whole numbers, got 'one' and '0'": [ROWS[0].replace(",1,", ",one,")],
    "line 3: question 1 of 'hat' is there already": [ROWS[0], ROWS[0]],
    "question 2 of 'hat' depends on 1, which is not there": ROWS[1:2],
    "holds no questions": [],
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, message):
    with pytest.raises(UserError, match=message):
        dpg.read_questions(write_csv(tmp_path, BAD_ROWS[message]))


def test_files_that_are_no_questions(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv cannot be read"):
        dpg.read_questions(tmp_path / "none.csv")
    with pytest.raises(UserError, match="lacks the column 'dependency'"):
        dpg.read_questions(write_csv(tmp_path, header=HEADER.replace("dependency", "depends")))
    (tmp_path / "dpg_bench.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        dpg.read_questions(tmp_path / "dpg_bench.csv")


def test_prompts_of_a_folder_take_the_place_of_those_of_the_file(tmp_path):
    items = dpg.read_questions(write_csv(tmp_path))
    (tmp_path / "hat.txt").write_text("a hat that is red\n")
    with pytest.raises(UserError, match=r"cannot read the prompt .*dusk\.txt"):
        dpg.read_texts(tmp_path, items)
    (tmp_path / "dusk.txt").write_text("it is dusk")
    rewritten = dpg.read_texts(tmp_path, items)
    assert [item.text for item in rewritten] == ["a hat that is red", "it is dusk"]
    assert vqa.describe(dpg.DPGBench(items)) != vqa.describe(dpg.DPGBench(rewritten))


# ---- GenAI-Bench -----------------------------------------------------------------------------------------------


PROMPTS = {
    "00000": {"prompt": "a red hat", "models": {"DALLE_3": [5, 4, 3], "SDXL": [1, 1, 1]}},
    "00001": {"prompt": "two cups", "models": {"DALLE_3": [2, 2, 2]}},
    "00002": {"prompt": "no cup", "models": {"DALLE_3": [1, 3, 2]}},
    "00003": {"prompt": "a cup"},
}
SKILLS = {"attribute": [0], "counting": [1], "negation": [2], "basic": [0], "advanced": [1, 2], "universal": []}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "genai_image.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "genai_skills.json").write_text(json.dumps(SKILLS))
    return tmp_path / "genai_image.json", tmp_path / "genai_skills.json"


def test_prompts_are_read_with_their_skills(files):
    bench = genai.read_prompts(*files)
    assert [item.name for item in bench.items] == ["00000", "00001", "00002"]  # the fourth has no skill
    assert bench.items[1].skills == ("counting", "advanced")
    assert bench.items[0].asked == ['Does this figure show "a red hat"?']


def test_a_skill_scores_the_mean_of_its_prompts(files):
    bench = genai.read_prompts(*files)
    hat, two, none = bench.items
    records = [Record("0", hat, (0.9,)), Record("1", hat, (0.7,)), Record("2", two, (0.5,)), Record("3", none, (0.0,))]
    assert bench.scores(records) == pytest.approx(
        {"attribute": 0.8, "counting": 0.5, "negation": 0, "basic": 0.8, "advanced": 0.25, "overall": 1.3 / 3}
    )
    assert bench.parts(records)["advanced"] == {"prompts": 2, "score": 0.25}
    assert bench.agreement(records) == {}


def test_agreement_with_people(files):
    bench = genai.read_prompts(*files)
    ratings = genai.read_ratings(files[0], "DALLE_3", bench.items)
    assert ratings == {"00000": 4, "00001": 2, "00002": 2}
    rated = genai.GenAIBench(bench.items, bench.skills, ratings)
    records = [Record(item.name, item, (score,)) for item, score in zip(bench.items, (1.0, 0.25, 0.25))]
    assert rated.agreement(records) == pytest.approx({"pearson": 1, "kendall_tau_b": 1})
    records = [Record(item.name, item, (score,)) for item, score in zip(bench.items, (0.5, 0.0, 1.0))]
    assert rated.agreement(records) == pytest.approx({"pearson": 0, "kendall_tau_b": 0}, abs=1e-9)
    with pytest.raises(UserError, match=r"entry '00001' has no ratings of 'SDXL' \(of: DALLE_3\)"):
        genai.read_ratings(files[0], "SDXL", bench.items)
    with pytest.raises(UserError, match="from two prompts on"):
        genai.read_ratings(files[0], "DALLE_3", bench.items[:1])


BAD_FILES = {
    "genai_image.json, line 2: no JSON": ('{"00000": {"prompt": "a"},\n!}', None),
    "genai_image.json must be one JSON object": ("[]", None),
    "genai_image.json: entry '00001' has no 'prompt'": ('{"00000": {"prompt": "a"}, "00001": {}}', None),
    "genai_skills.json: 'basic' must be a list of numbers": (None, '{"basic": 3}'),
    "genai_skills.json: 'basic' names the prompt 17, which .* does not have": (None, '{"basic": [17]}'),
    "genai_skills.json names no prompt": (None, '{"basic": []}'),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_a_bad_entry_is_named(files, message):
    for file, text in zip(files, BAD_FILES[message]):
        if text is not None:
            file.write_text(text)
    with pytest.raises(UserError, match=message):
        genai.read_prompts(*files)


def test_a_file_that_is_not_there(files):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        genai.read_prompts(files[0].with_name("none.json"), files[1])


# ---- images ----------------------------------------------------------------------------------------------------


def test_images_are_found_by_the_name_of_their_prompt(tmp_path):
    (tmp_path / "images/hat").mkdir(parents=True)
    for name in ("hat/0001.png", "hat/0000.png", "hat/notes.txt", "dusk.jpeg", "other.png"):
        (tmp_path / "images" / name).touch()
    items = dpg.read_questions(write_csv(tmp_path))
    found = vqa.find_images(tmp_path / "images", items)
    assert [[file.name for file in of] for of in found] == [["0000.png", "0001.png"], ["dusk.jpeg"]]
    (tmp_path / "images/dusk.jpeg").unlink()
    with pytest.raises(UserError, match="lacks the images of 1 of 2 prompts: dusk"):
        vqa.find_images(tmp_path / "images", items)
    with pytest.raises(UserError, match="no such folder"):
        vqa.find_images(tmp_path / "none", items)


def test_a_grid_is_four_images(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    grid = Image.new("RGB", (16, 16))
    for index, color in enumerate(colors):
        grid.paste(color, (index % 2 * 8, index // 2 * 8, index % 2 * 8 + 8, index // 2 * 8 + 8))
    grid.save(tmp_path / "hat.png")
    samples = list(vqa.stored_samples([[tmp_path / "hat.png"]], cell_px=8))
    assert [tuple(images["unknown"][:, 3, 3].tolist()) for _, _, images in samples] == colors
    assert all(images["unknown"].shape == (3, 8, 8) for _, _, images in samples)
    assert len({name for _, name, _ in samples}) == 4
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"different size: .*hat.png has 16 x 16 px, .*small.png has 8 x 8 px"):
        list(vqa.stored_samples([[tmp_path / "hat.png"], [tmp_path / "small.png"]]))
    ((_, _, whole),) = vqa.stored_samples([[tmp_path / "hat.png"]])
    assert whole["unknown"].shape == (3, 16, 16)
    with pytest.raises(UserError, match="no grid of 2 x 2 images of 4 px: it has 16 x 16 px"):
        list(vqa.stored_samples([[tmp_path / "hat.png"]], cell_px=4))


def test_every_image_of_every_series_is_judged_by_the_questions_of_its_prompt(tmp_path):
    items = dpg.read_questions(write_csv(tmp_path))
    white, black = torch.full((3, 8, 8), 255, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    seen = []

    def judge(image, questions):
        seen.append((image.getpixel((0, 0))[0], len(questions)))
        return torch.full((len(questions),), image.getpixel((0, 0))[0] / 255)

    samples = [(0, "hat/0.png", {"1": black, "4": white}), (1, "dusk/0.png", {"1": black, "4": black})]
    records = vqa.measure(judge, items, samples)
    assert seen == [(0, 5), (255, 5), (0, 1), (0, 1)]
    assert [record.score for record in records["1"]] == [0, 0]
    assert [record.score for record in records["4"]] == [1, 0]


# ---- judges ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return {kind: save_judge(kind, folder / kind) for kind in ("blip", "llava", "instructblip")}


QUESTIONS = ["Is there a red hat?", "Is there a blue cup?"]


@pytest.mark.parametrize("kind", ["blip", "llava", "instructblip"])
def test_a_judge_tells_probabilities_that_depend_on_image_and_question(judges, kind):
    judge = load_judge(str(judges[kind]))
    answers = judge(picture(0), QUESTIONS)
    assert answers.shape == (2,) and (answers > 0).all() and (answers < 1).all()
    assert answers[0] != answers[1] and (judge(picture(1), QUESTIONS) != answers).all()
    torch.testing.assert_close(judge(picture(0), QUESTIONS[::-1]), answers.flip(0))
    assert judge.identity["name"] == kind and len(judge.identity["sha256"]) == 64


def test_blip_answers_as_its_own_generation_does(judges):
    judge = load_judge(str(judges["blip"]))
    assert isinstance(judge, BlipVQA)
    for question, answer in zip(QUESTIONS, judge(picture(0), QUESTIONS)):
        inputs = judge.processor(images=picture(0), text=question, return_tensors="pt")
        outputs = judge.model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(answer, outputs.logits[0][0].softmax(-1)[WORDS.index("yes")])


def test_a_chatting_judge_is_asked_through_its_template(judges):
    """The answer is that of the model's own forward on ids that are put together by hand."""
    judge = load_judge(str(judges["llava"]))
    assert isinstance(judge, VisionLanguageModel)
    assert judge.identity["asked"] == "USER: <image> {question} Please answer yes or no. ASSISTANT:"
    (answer,) = judge(picture(0), ["Is there a hat?"])
    words = "[CLS] USER : " + "<image> " * 4 + "Is there a hat ? Please answer yes or no . ASSISTANT :"
    ids = torch.tensor([[WORDS.index(word) if word in WORDS else WORDS.index("[UNK]") for word in words.split()]])
    pixels = judge.processor.image_processor(picture(0), return_tensors="pt").pixel_values
    logits = judge.model(input_ids=ids, pixel_values=pixels).logits[0, -1]
    expected = logits.softmax(-1)[[WORDS.index("yes"), WORDS.index("Yes")]].sum()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-6)


def test_an_encoder_decoder_is_asked_for_its_first_word(judges):
    judge = load_judge(str(judges["instructblip"]))
    assert judge.identity["asked"] == "Question: {question} Please answer yes or no. Answer:"
    (answer,) = judge(picture(0), ["Is there a hat?"])
    text = "Question: Is there a hat? Please answer yes or no. Answer:"
    inputs = judge.processor(images=picture(0), text=text, return_tensors="pt")
    logits = judge.model(**inputs, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
    expected = logits.softmax(-1)[[WORDS.index("yes"), WORDS.index("Yes")]].sum()
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_what_prepares_the_images_is_part_of_a_judge(judges, tmp_path, kind):
    changed = shutil.copytree(judges[kind], tmp_path / kind)
    one = load_judge(str(judges[kind]))
    assert load_judge(str(changed)).identity == one.identity
    text = (changed / "processor_config.json").read_text()
    (changed / "processor_config.json").write_text(text.replace('"resample": 3', '"resample": 0'))
    other = load_judge(str(changed))
    assert (one(picture(0, 40), QUESTIONS) != other(picture(0, 40), QUESTIONS)).all()
    assert other.identity["sha256"] != one.identity["sha256"]


def test_judges_that_are_none(judges, tmp_path):
    with pytest.raises(UserError, match="--judge: no such folder"):
        load_judge(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--judge .* cannot be read"):
        load_judge(str(tmp_path))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds bert, which answers no questions about images"):
        load_judge(str(tmp_path / "bert"))
    mute = save_judge("llava", tmp_path / "mute")
    for file in mute.iterdir():
        text = file.read_text() if file.suffix in (".json", ".jinja") else ""
        if file.suffix == ".jinja":
            file.unlink()
        elif "chat_template" in text:
            file.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "chat_template"}))
    with pytest.raises(UserError, match="a llava is asked through its chat template, which is missing"):
        load_judge(str(mute))
