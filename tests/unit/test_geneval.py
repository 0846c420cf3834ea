"""GenEval's rules on hand-made detections, its files, and both kinds of detectors."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny_models.detectors import save_clip, save_detector
from vistok.data import shapes
from vistok.data.shapes import Scene, SceneObject, render
from vistok.errors import UserError
from vistok.eval import detectors, geneval
from vistok.eval.detectors import LearnedDetector, WorldDetector
from vistok.eval.pretrained import summary_of
from vistok.geneval_rules import TASKS, Detection, Rules, counted, faults, relations, spread
from vistok.pictures import to_uint8

GENEVAL = Rules()


def found(name, score=0.95, box=(0, 0, 10, 10), color=""):
    return Detection(name, score, tuple(map(float, box)), color)


def told(group):
    return [detection.color for detection in group]


def check(detections, include, exclude=(), tag="two_object", rules=GENEVAL, colors=told):
    return faults(detections, {"tag": tag, "include": include, "exclude": list(exclude)}, rules, colors)


CAT, TWO_CATS = {"class": "cat", "count": 1}, {"class": "cat", "count": 2}
DOG = {"class": "dog", "count": 1}
RED_CAT = {**CAT, "color": "red"}
LEFT_CAT = {**CAT, "position": ["left of", 0]}
LEFT, RIGHT = (0, 0, 10, 10), (50, 0, 60, 10)

# detections, include, exclude, task, beginnings of the faults
CASES = {
    "nothing": ([], [CAT], [], "single_object", ["cat: 1 wanted, 0 found"]),
    "there": ([found("cat")], [CAT], [], "single_object", []),
    "another class": ([found("dog")], [CAT], [], "single_object", ["cat: 1 wanted"]),
    "both": ([found("cat"), found("dog")], [CAT, DOG], [], "two_object", []),
    "one of two": ([found("dog")], [CAT, DOG], [], "two_object", ["cat: 1 wanted"]),
    "neither": ([], [CAT, DOG], [], "two_object", ["cat: 1 wanted", "dog: 1 wanted"]),
    "too few": ([found("cat")], [TWO_CATS], [], "counting", ["cat: 2 wanted, 1 found"]),
    "exactly": ([found("cat")] * 2, [TWO_CATS], [{**CAT, "count": 3}], "counting", []),
    "too many": ([found("cat")] * 3, [TWO_CATS], [{**CAT, "count": 3}], "counting", ["cat: fewer than 3 wanted"]),
    "more without exclude": ([found("cat")] * 3, [CAT], [], "single_object", []),
    "just unsure": ([found("cat", 0.3)], [CAT], [], "single_object", ["cat: 1 wanted"]),
    "just sure": ([found("cat", 0.31)], [CAT], [], "single_object", []),
    "unsure count": ([found("cat", 0.9)] * 2, [TWO_CATS], [], "counting", ["cat: 2 wanted, 0 found"]),
    "sure count": ([found("cat", 0.91)] * 2, [TWO_CATS], [], "counting", []),
    "unsure do not exceed": (
        [found("cat")] * 2 + [found("cat", 0.89)], [TWO_CATS], [{**CAT, "count": 3}], "counting", []
    ),
    "color": ([found("cat", color="red")], [RED_CAT], [], "colors", []),
    "another color": ([found("cat", color="blue")], [RED_CAT], [], "colors", ["cat: red wanted, blue found"]),
    "the surest has another color": (
        [found("cat", 0.5, color="red"), found("cat", 0.6, color="blue")], [RED_CAT], [], "colors", ["cat: red wanted"]
    ),
    "the surest has the color": (
        [found("cat", 0.5, color="blue"), found("cat", 0.6, color="red")], [RED_CAT], [], "colors", []
    ),
    "one of two has the color": (
        [found("cat", color="red"), found("cat", color="blue")], [{**RED_CAT, "count": 2}], [], "colors", ["cat: red"]
    ),
    "colors swapped": (
        [found("cat", color="blue"), found("dog", color="red")],
        [RED_CAT, {**DOG, "color": "blue"}],
        [],
        "color_attr",
        ["cat: red wanted, blue", "dog: blue wanted, red"],
    ),
    "left": ([found("dog", box=RIGHT), found("cat", box=LEFT)], [DOG, LEFT_CAT], [], "position", []),
    "right": (
        [found("dog", box=LEFT), found("cat", box=RIGHT)], [DOG, LEFT_CAT], [], "position",
        ["cat: left of dog wanted, right of found"],
    ),
    "nothing to be left of": ([found("cat")], [DOG, LEFT_CAT], [], "position", ["dog: 1 wanted", "cat: nothing there"]),
    "in the same place": (
        [found("dog"), found("cat")], [DOG, LEFT_CAT], [], "position", ["cat: left of dog wanted, neither side"]
    ),
    "one of two is left": (
        [found("dog", box=(30, 0, 40, 10)), found("cat", box=LEFT), found("cat", box=RIGHT)],
        [DOG, {**LEFT_CAT, "count": 2}],
        [],
        "position",
        ["cat: left of"],
    ),
    "a wrong color hides the target": (
        [found("dog", color="red", box=RIGHT), found("cat", box=LEFT)],
        [{**DOG, "color": "blue"}, LEFT_CAT],
        [],
        "position",
        ["dog: blue wanted", "cat: nothing there"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_rule(case):
    detections, include, exclude, tag, wanted = CASES[case]
    lines = check(detections, include, exclude, tag)
    assert len(lines) == len(wanted), lines
    assert all(line.startswith(beginning) for line, beginning in zip(lines, wanted)), lines


def test_colors_are_asked_for_what_counts_alone():
    asked = []

    def colors(group):
        asked.append(group)
        return ["red"] * len(group)

    cats = [found("cat", score) for score in (0.5, 0.7, 0.6)]
    assert not check([*cats, found("dog")], [DOG, {**RED_CAT, "count": 2}], colors=colors)
    assert asked == [[cats[1], cats[2]]]


def test_sixteen_of_a_class_and_overlaps():
    many = [found("cat", 0.5 + n / 100) for n in range(20)]
    kept = counted(many, "two_object", Rules())["cat"]
    assert [detection.score for detection in kept] == sorted((cat.score for cat in many), reverse=True)[:16]
    # Ten pixels wide: the last ones belong to the boxes.
    pair = [found("cat", 0.9, (0, 0, 9, 9)), found("cat", 0.8, (5, 0, 14, 9))]
    overlap = 50 / 150
    for nms_iou, count in ((1.0, 2), (overlap + 0.001, 2), (overlap, 1), (0.1, 1)):
        assert len(counted(pair, "two_object", Rules(nms_iou=nms_iou))["cat"]) == count
    assert not check([found("cat")] * 2, [CAT], [{**CAT, "count": 2}], rules=Rules(nms_iou=0.5))


def at(x, y, size=10):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        (-50, 0, ["left of"]),
        (50, 0, ["right of"]),
        (0, -50, ["above"]),
        (0, 50, ["below"]),
        (-50, 50, ["left of", "below"]),
        (0, 0, []),
        (2, 0, []),  # a tenth of both widths
        (3.9, 0, []),  # shortened to 1.9, less than half of the offset
        (4.1, 0, ["right of"]),
        (-20, 8, ["left of"]),  # 6 of 21.5 below
    ],
)  # fmt: skip
def test_relations(x, y, wanted):
    assert relations(at(x, y), at(0, 0)) == wanted


def test_a_larger_margin_needs_a_larger_offset():
    assert relations(at(10, 0), at(0, 0)) == ["right of"]
    assert relations(at(10, 0), at(0, 0), margin=0.4) == []
    assert check([found("dog", box=at(10, 0)), found("cat", box=at(0, 0))], [DOG, LEFT_CAT]) == []
    assert check(
        [found("dog", box=at(10, 0)), found("cat", box=at(0, 0))], [DOG, LEFT_CAT], rules=Rules(position_margin=0.4)
    )


def test_spread_takes_evenly():
    assert spread(list("abc"), 7) == list("aaabbcc")
    assert spread(list(range(120)), 100)[::25] == [0, 30, 60, 90]
    assert spread(list("abc"), 3) == list("abc")


# ---- the procedural world --------------------------------------------------------------------------------------


PLACES = {"left of": (0.2, 0.5), "right of": (0.8, 0.5), "above": (0.5, 0.2), "below": (0.5, 0.8)}


def drawn(entry, size_px=64):
    """An image that shows what ``entry`` asks for."""
    free = iter([(0.2, 0.2), (0.8, 0.2), (0.8, 0.8)])
    things = []
    for clause in entry["include"]:
        for _ in range(clause["count"]):
            place = PLACES[clause["position"][0]] if "position" in clause else next(free)
            if entry["tag"] == "position" and "position" not in clause:
                place = (0.5, 0.5)
            things.append(SceneObject(clause["class"], clause.get("color", "blue"), "small", *place))
    return render(Scene(tuple(things), 0.1, ""), size_px)


def world(split="val"):
    return shapes.build(shapes.Config(), split, 64)


def benchmark(most=None):
    tasks = world().geneval_prompts()
    entries = [entry for task, count in TASKS.items() for entry in spread(tasks[task], count)]
    return entries if most is None else [*geneval.some_of_each(numbered(entries), most).values()]


def numbered(entries):
    return dict(enumerate(entries))


def test_the_world_has_as_many_prompts_as_geneval():
    entries = benchmark()
    assert len(entries) == 553
    sides = [entry["include"][1]["position"][0] for entry in entries if entry["tag"] == "position"]
    assert {side: sides.count(side) for side in sides} == dict.fromkeys(PLACES, 25)


def test_perfect_images_are_all_right_and_those_of_the_next_prompt_are_not():
    entries = benchmark(8)
    detector = WorldDetector(world())
    perfect = [to_uint8(drawn(entry)) for entry in entries]
    samples = (
        (number, geneval.sample_name(number, index), {"wrong": perfect[number - 8], "right": perfect[number]})
        for number in range(len(entries))
        for index in range(2)
    )
    done = []
    records, picture = geneval.measure_geneval(detector, numbered(entries), samples, done.append)
    assert sum(done) == 96
    assert geneval.scores(records["right"]) == dict.fromkeys([*TASKS, "overall"], 1.0)
    # A red circle and another thing is also a picture of a circle; never the other way round.
    assert geneval.scores(records["wrong"])["overall"] < 0.4
    wrong = [record for record in records["wrong"] if not record["correct"]]
    assert (
        all(record["reason"] for record in wrong) and json.loads(wrong[0]["metadata"])["prompt"] == wrong[0]["prompt"]
    )
    assert picture.width > 2 * 64 and picture.height > 18 * 64
    pixels = np.array(picture).reshape(-1, 3)
    assert (pixels == (50, 205, 50)).all(1).any() and not (pixels == (220, 20, 60)).all(1).any()


def test_the_world_judges_by_its_own_threshold_unless_told():
    assert WorldDetector(world()).rules == Rules(0.65, 0.65)
    assert WorldDetector(world(), {"min_score": 0.9}).rules == Rules(0.9, 0.65)


def record(tag, number, index, correct):
    return {"filename": f"x/{number:0>5}/samples/{index:04d}.png", "tag": tag, "correct": correct}


def test_scores_are_means_of_images_and_the_overall_score_of_tasks():
    rows = [record("position", 1, index, index == 0) for index in range(4)]
    rows += [record("position", 2, index, False) for index in range(4)]
    rows += [record("colors", 3, 0, True), record("colors", 4, 0, True)]
    assert geneval.scores(rows) == {"colors": 1.0, "position": 0.125, "overall": 0.5625}
    assert geneval.by_task(rows)["position"] == {
        "prompts": 2, "images": 8, "images_right": 0.125, "prompts_right": 0.5
    }  # fmt: skip
    assert geneval.tally(rows) == {"prompts": 4, "images": 10, "images_right": 0.3, "prompts_right": 0.75}


def test_a_part_of_the_benchmark_is_called_one():
    whole = [record(tag, f"{tag}{n}", 0, True) for tag, count in TASKS.items() for n in range(count)]
    assert geneval.shortfall(whole) == ""
    assert geneval.shortfall(whole[1:]).startswith("6 of 6 tasks and 552 of 553 prompts were scored")
    assert geneval.shortfall(whole[80:]).startswith("5 of 6 tasks and 473 of 553 prompts")


# ---- files -----------------------------------------------------------------------------------------------------


def keep(folder, entries, per_prompt=2):
    samples = (
        (number, geneval.sample_name(number, index), {"4": torch.zeros(3, 8, 8, dtype=torch.uint8)})
        for number in range(len(entries))
        for index in range(per_prompt)
    )
    return list(geneval.kept_samples(samples, folder, numbered(entries)))


def test_samples_lie_as_the_original_wants_them(tmp_path):
    entries = benchmark(1)
    keep(tmp_path, entries)
    assert json.loads((tmp_path / "00003/metadata.jsonl").read_text()) == entries[3]
    found_entries, files = geneval.read_samples(tmp_path)
    assert found_entries == numbered(entries)
    assert [file.name for file in files[5]] == ["0000.png", "0001.png"]
    # What the original's samplers leave beside.
    (tmp_path / "00000/grid.png").write_bytes(b"")
    (tmp_path / "00000/samples/best.png").write_bytes(b"")
    (tmp_path / "geneval.json").write_text("{}")
    assert geneval.read_samples(tmp_path, found_entries)[1] == files


def test_missing_and_foreign_samples_are_refused(tmp_path):
    entries = benchmark(1)
    keep(tmp_path, entries)
    with pytest.raises(UserError, match=r"was made for 'a circle', not for 'a cross'"):
        geneval.read_samples(tmp_path, numbered(entries) | {0: dict(entries[0], prompt="a cross")})
    with pytest.raises(UserError, match=r"lacks the images of 2 of 8 prompts: 00006, 00007"):
        geneval.read_samples(tmp_path, numbered(entries + entries[:2]))
    (tmp_path / "00001/samples/0000.png").unlink()
    (tmp_path / "00001/samples/0001.png").unlink()
    (tmp_path / "00004/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"lacks the images of 2 of 6 prompts: 00001, 00004 .*metadata.jsonl"):
        geneval.read_samples(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        geneval.read_samples(tmp_path / "none")


def bad_entry(**parts):
    return json.dumps({"tag": "colors", "prompt": "", "include": []} | parts)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"tag": "colors"', "no JSON: "),
        ("[1]", "no JSON object"),
        ('{"tag": "colors", "include": []}', "needed are 'tag' and 'prompt'"),
        ('{"tag": "colours", "prompt": "", "include": []}', "no task 'colours'"),
        (bad_entry(include={"class": "cat", "count": 1}), "needed are .*'include'"),
        (bad_entry(exclude={"class": "cat", "count": 1}), "'exclude' .lists"),
        (bad_entry(include=["cat"]), "a clause needs a class and a count, got cat"),
        (bad_entry(include=[{"class": "cat"}]), "a clause needs a class and a count"),
        (bad_entry(include=[{"class": "cat", "count": "1"}]), "a clause needs a class and a count"),
        (bad_entry(include=[{"class": ["cat"], "count": 1}]), "a clause needs a class and a count"),
        (bad_entry(include=[{"class": "cat", "count": 0}]), "a clause needs a class and a count"),
        (bad_entry(exclude=["cat"]), "a clause needs a class and a count, got cat"),
        (bad_entry(include=[{"class": "cat", "count": 1, "color": ["red"]}]), "a color is text"),
        *(
            (bad_entry(include=[DOG, {**CAT, "position": position}]), "position must be one of .* to an earlier clause")
            for position in ("left of", ["left of"], 3, None, [], ["left of", "0"], ["left of", 1], ["near", 0])
        ),
    ],
)
def test_bad_metadata_is_one_line(tmp_path, line, part):
    good = json.dumps({"tag": "position", "prompt": "a", "include": [DOG, LEFT_CAT]})
    (tmp_path / "m.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=f"m.jsonl, line 3: .*{part}") as refused:
        geneval.read_metadata(tmp_path / "m.jsonl")
    assert "\n" not in str(refused.value)
    (tmp_path / "m.jsonl").write_text(f"{good}\n")
    assert geneval.read_metadata(tmp_path / "m.jsonl") == [json.loads(good)]


def test_results_of_others_are_read(tmp_path):
    path = tmp_path / "results.jsonl"
    geneval.save_results(path, [record("position", 0, 0, True)])
    assert geneval.read_results(path) == [record("position", 0, 0, True)]
    path.write_text("")
    with pytest.raises(UserError, match="holds no results"):
        geneval.read_results(path)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"filename": None}, "has 'filename'"),
        ({"correct": "false"}, "'correct' .true or false"),
        ({"tag": "colours"}, "no task 'colours'"),
        ({"metadata": {"tag": "position"}}, "must be JSON text"),
        ({"details": "{'cat'"}, "must be JSON text"),
        ({"metadata": bad_entry(include=["cat"])}, "metadata: a clause needs"),
        ({"details": "[]"}, "must be boxes of classes"),
        ({"details": '{"cat": [[0, 0, 1, 1]]}'}, "must be boxes of classes"),
        ({"details": '{"cat": [[0, 0, 1, 1, "0.9"]]}'}, "must be boxes of classes"),
        ({"details": '{"cat": 1}'}, "must be boxes of classes"),
    ],
)
def test_a_bad_result_is_one_line(tmp_path, parts, said):
    path = tmp_path / "results.jsonl"
    geneval.save_results(path, [record("position", 0, 0, True), record("position", 0, 1, True) | parts])
    with pytest.raises(UserError, match=f"results.jsonl, line 2: .*{said}") as refused:
        geneval.read_results(path)
    assert "\n" not in str(refused.value)


# A line as the original writes it: boxes of every class, likeliest first.
PUBLISHED = {
    "filename": "images/00000/samples/0000.png",
    "tag": "position",
    "prompt": "a photo of a cat left of a dog",
    "correct": True,
    "reason": "",
    "metadata": json.dumps({"tag": "position", "prompt": "", "include": [DOG, LEFT_CAT]}),
    "details": json.dumps({"dog": [[50.0, 0.0, 60.0, 10.0, 0.99]], "cat": [[0, 0, 10, 10, 0.5], [90, 0, 99, 9, 0.4]]}),
}


def test_stored_boxes_are_judged_again():
    assert geneval.verdict(PUBLISHED, Rules(0, 0)) is True
    assert geneval.verdict(PUBLISHED, Rules(0.6, 0.6)) is False
    swapped = PUBLISHED["details"].replace("dog", "x").replace("cat", "dog").replace("x", "cat")
    assert geneval.verdict(PUBLISHED | {"details": swapped}, Rules(0, 0)) is False
    colored = json.dumps({"tag": "colors", "prompt": "", "include": [RED_CAT]})
    assert geneval.verdict(PUBLISHED | {"metadata": colored}, Rules(0, 0)) is None
    assert geneval.verdict(record("position", 0, 0, True), Rules(0, 0)) is None


def test_what_counted_is_in_the_record_and_gives_the_same_verdict(tmp_path):
    """Every hand-made case, by the boxes in its results file."""

    class Detector:
        rules = GENEVAL

        def detect(self, image, entry):
            return CASES[entry["prompt"]][0]

        def colors(self, image, group):
            return told(group)

    path, image = tmp_path / "results.jsonl", torch.zeros(3, 8, 8, dtype=torch.uint8)
    entries = [
        {"tag": tag, "prompt": case, "include": include, "exclude": exclude}
        for case, (_, include, exclude, tag, _) in CASES.items()
    ]
    geneval.save_results(path, [geneval.judge(Detector(), image, entry, "0/samples/0.png") for entry in entries])
    rows = {row["prompt"]: row for row in geneval.read_results(path)}
    assert [*rows["too many"]] == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(rows["too many"]["details"]) == {"cat": [[0, 0, 10, 10, 0.95]] * 3}
    assert json.loads(rows["unsure do not exceed"]["details"]) == {"cat": [[0, 0, 10, 10, 0.95]] * 2}
    assert json.loads(rows["just unsure"]["details"]) == {}
    for case, row in rows.items():
        of_color = any("color" in clause for clause in CASES[case][1])
        assert geneval.verdict(row, Rules(0, 0)) is (None if of_color else row["correct"]), case


def test_images_of_different_size_are_refused_and_damaged_ones_named(tmp_path):
    keep(tmp_path, benchmark(1))
    _, files = geneval.read_samples(tmp_path)
    assert len(list(geneval.stored_samples(files))) == 12
    odd = tmp_path / "00002/samples/0001.png"
    Image.new("RGB", (8, 16)).save(odd)
    with pytest.raises(UserError, match=r"00000/samples/0000.png has 8 x 8 px, .*00002/samples/0001.png has 8 x 16 px"):
        list(geneval.stored_samples(files))
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(odd)
    with pytest.raises(UserError, match=r"0001.png has more than 8 bits"):
        list(geneval.stored_samples(files))
    Image.fromarray(np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)).save(odd)
    data = odd.read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 1)
    odd.write_bytes(data[:second] + b"\0\1\2\3" + data[second + 4 :])
    with pytest.raises(SyntaxError):
        Image.open(odd).load()
    with pytest.raises(UserError, match=r"cannot read .*0001.png: broken PNG file"):
        list(geneval.stored_samples(files))


# ---- learned detectors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    save_clip(root / "clip")
    for kind in ("mask2former", "detr", "owlv2", "grounding_dino"):
        save_detector(kind, root / kind)
    return root


LOW = {"min_score": 0.05, "min_counting_score": 0.06}
ENTRY = {"tag": "colors", "prompt": "", "include": [RED_CAT], "exclude": [{"class": "person", "count": 2}]}


def photo():
    return torch.randint(256, (3, 80, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["mask2former", "detr", "owlv2", "grounding_dino"])
def test_a_learned_detector_finds_named_boxes(folders, kind):
    detector = LearnedDetector(str(folders / kind), str(folders / "clip"), thresholds=LOW)
    objects = detector.detect(photo(), ENTRY)
    assert objects
    fixed = {"person", "cat", "computer mouse", "cup"}
    assert {thing.name for thing in objects} <= (fixed if kind in ("mask2former", "detr") else {"cat", "person"})
    for thing in objects:
        left, top, right, bottom = thing.box
        assert 0 <= left <= right <= 64 and 0 <= top <= bottom <= 80 and thing.score > 0.05
        assert (thing.mask is not None) == (kind == "mask2former")
    assert all(color in detectors.COLORS for color in detector.colors(photo(), objects[:3]))
    assert detector.identity.keys() == {"name", "sha256", "color_model", "color_sha256"}
    assert geneval.judge(detector, photo(), ENTRY, "a.png")["tag"] == "colors"


def test_a_mask_is_inside_its_box(folders):
    detector = LearnedDetector(str(folders / "mask2former"), None)
    detector.rules = Rules(0.0, 0.0)
    for thing in detector.detect(photo(), ENTRY):
        left, top, right, bottom = map(int, thing.box)
        assert thing.mask.shape == (80, 64)
        assert thing.mask[top:bottom, left:right].sum() == thing.mask.sum() > 0
        assert thing.mask[top].any() and thing.mask[bottom - 1].any() and thing.mask[:, right - 1].any()


def test_crops_are_grey_outside_the_mask():
    image = Image.new("RGB", (8, 6), "red")
    mask = np.zeros((6, 8), dtype=bool)
    mask[2, 3] = True
    cut = np.array(detectors.crop(image, Detection("cat", 1.0, (2.0, 1.0, 5.0, 4.0), mask=mask)))
    assert cut.shape == (3, 3, 3)
    assert cut[1, 1].tolist() == [255, 0, 0] and cut[0, 0].tolist() == [153, 153, 153]
    assert (cut == 153).all(axis=-1).sum() == 8
    whole = detectors.crop(image, Detection("cat", 1.0, (2.0, 1.0, 5.0, 4.0)))
    assert (np.array(whole) == (255, 0, 0)).all()
    assert detectors.crop(image, Detection("cat", 1.0, (2.0, 1.0, 2.0, 1.0))).size == (1, 1)


def test_a_color_is_the_nearest_of_the_mean_sentences(folders):
    """CLIP's own features, put together by hand."""
    namer = detectors.ColorNamer(str(folders / "clip"))
    image = Image.fromarray(photo().permute(1, 2, 0).numpy())
    boxes = [Detection("cat", 1.0, box) for box in ((0.0, 0.0, 30.0, 30.0), (20.0, 30.0, 64.0, 80.0))]
    said = namer(image, boxes)
    for box, color in zip(boxes, said):
        vision = namer.processor(images=image.crop(tuple(map(int, box.box))), return_tensors="pt")
        a = summary_of(namer.model.get_image_features(**vision))[0]
        similarity = {}
        for name in detectors.COLORS:
            texts = [f"a photo of a {name} cat", f"a photo of a {name}-colored cat", f"a photo of a {name} object"]
            rows = [namer.processor(text=[text], return_tensors="pt") for text in texts]
            features = [summary_of(namer.model.get_text_features(**row))[0] for row in rows]
            mean = torch.stack([feature / feature.norm() for feature in features]).mean(0)
            similarity[name] = (a @ mean / mean.norm()).item()
        assert max(similarity, key=similarity.get) == color


def test_what_prepares_the_images_is_in_the_hash_and_where_it_lies_is_not(folders, tmp_path):
    def identity(detector, clip):
        return LearnedDetector(str(detector), str(clip)).identity

    moved = [shutil.copytree(folders / name, tmp_path / name) for name in ("mask2former", "clip")]
    assert identity(*moved) == (before := identity(folders / "mask2former", folders / "clip"))
    for folder, file, key in zip(moved, ("preprocessor_config.json", "processor_config.json"), ("", "color_")):
        text = (folder / file).read_text()
        assert '"resample": ' in text
        (folder / file).write_text(re.sub(r'"resample": \d', '"resample": 0', text))
        after = identity(*moved)
        assert after == before | {f"{key}sha256": after[f"{key}sha256"]} != before
        before = after


def test_phrases_stand_for_classes():
    wanted = ["computer mouse", "cat", "computer keyboard"]
    assert detectors._class_of("cat", wanted) == detectors._class_of("cat.", wanted) == "cat"
    assert detectors._class_of("mouse", wanted) == "computer mouse"
    assert detectors._class_of("computer", wanted) == detectors._class_of("", wanted) == ""


def test_a_detector_that_sees_nothing_fails_its_self_test(folders):
    detector = LearnedDetector(str(folders / "mask2former"), None)
    assert "SELF-TEST FAILED" in detectors.self_test(detector)
    detector.detect = lambda image, entry: [found(entry["include"][0]["class"], 0.9)]
    assert detectors.self_test(detector).endswith("passed: person 0.90, cat 0.90, cup 0.90")


def test_detectors_that_cannot_judge_are_refused(folders, tmp_path):
    def refused(source, color_model=None, thresholds=LOW):
        with pytest.raises(UserError) as error:
            LearnedDetector(str(source), color_model, thresholds=thresholds)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--detector: no such folder" in refused(tmp_path / "none")
    assert "model.safetensors" in refused(tmp_path / "none")
    assert "cannot be read" in refused(tmp_path)
    assert "detects no objects" in refused(folders / "clip")
    assert "give --min-score and --min-counting-score" in refused(folders / "detr", thresholds=None)
    holed = shutil.copytree(folders / "clip", tmp_path / "clip")
    weights = load_file(holed / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, holed / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights of a CLIPModel, such as logit_scale" in refused(folders / "mask2former", str(holed))
    with pytest.raises(UserError, match="knows no 'dog'"):
        LearnedDetector(str(folders / "mask2former"), None).check([{"include": [DOG, CAT]}])
    with pytest.raises(UserError, match="give --color-model"):
        LearnedDetector(str(folders / "mask2former"), None).check([{"include": [RED_CAT]}])
    with pytest.raises(UserError, match="ask for 'teal'"):
        LearnedDetector(str(folders / "mask2former"), str(folders / "clip")).check(
            [{"include": [{**CAT, "color": "teal"}]}]
        )
