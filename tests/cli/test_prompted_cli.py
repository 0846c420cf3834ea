"""``python -m vistok.eval`` of what prompts ask for: GenEval, DPG-Bench, T2I-CompBench, GenAI-Bench and captions."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tiny_models.args import TINY_ARGS, VARIANTS
from tiny_models.detectors import save_clip, save_detector
from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.judges import save_judge
from tiny_models.runs import refused
from tiny_models.text import save_t5


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A generator of 32 px images conditioned on text, whose images show nothing, with all that it needs."""
    root = tmp_path_factory.mktemp("speaking")
    tokenizer = export_tokenizer(root / "tokenizer", image_size=32, patch_size=8)
    save_t5(root / "t5")
    args = {**TINY_ARGS["generators"]["gpt"], **VARIANTS["gpt"]["text"]}
    export_generator(root / "generator", tokenizer, [], **args)
    spec = json.loads((root / "generator/spec.json").read_text())
    spec["text_encoder"] = {"name": "t5", "args": {"path": "./../t5"}}
    (root / "generator/spec.json").write_text(json.dumps(spec))
    return root


def test_geneval_of_a_generator(speaking, evaluate, tmp_path):
    words = ("geneval", "--checkpoint", speaking / "generator", "--data", "shapes", "--most-per-task", 2)
    words = (*words, "--count-per-prompt", 3)
    code, out, err = evaluate(*words, "--out", tmp_path, "--tokens", "2,8", "--save-images", "--batch-size", 7)
    assert code == 0, err
    result = json.loads((tmp_path / "geneval.json").read_text())
    tasks = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert list(result["metrics"]["tokens"]) == ["2", "8"]
    assert list(result["metrics"]["tokens"]["8"]) == [*tasks, "overall"]
    assert result["metrics"]["counts"] == {"prompts": 12, "samples": 36, "held_out": 36}
    assert result["metrics"]["tasks"]["counting"].keys() == {"prompts", "images", "images_right", "prompts_right"}
    assert result["protocol"]["features"] == {"name": "analytic detector of shapes"}
    assert result["protocol"]["definitions"]["rules"]["min_score"] == 0.65
    assert result["protocol"]["settings"]["count_per_prompt"] == 3
    assert result["fingerprint"] in out and all(task in out for task in tasks)
    Image.open(tmp_path / "geneval.png").verify()
    Image.open(tmp_path / "geneval_by_tokens.png").verify()
    images = tmp_path / "geneval_images"
    assert sorted(path.name for path in (images / "00503/samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]

    def lines(path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["prompt"], row["correct"], row["reason"]) for row in rows]

    # The images that were kept are judged as those that were made.
    words = ("geneval", "--data", "shapes", "--most-per-task", 2)
    code, out, err = evaluate(*words, "--images", images)
    assert code == 0, err
    assert lines(images / "geneval_results.jsonl") == lines(tmp_path / "geneval_results.jsonl")
    again = json.loads((images / "geneval.json").read_text())
    assert again["metrics"]["tokens"]["unknown"] == result["metrics"]["tokens"]["8"]
    code, out, err = evaluate("geneval", "--results", tmp_path / "geneval_results.jsonl")
    assert code == 0 and "24 of 24 stored verdicts are what these rules give" in out and "there: 12" in out, err
    stored = json.loads((tmp_path / "geneval_results_eval/geneval.json").read_text())
    assert stored["metrics"]["tokens"]["unknown"] == result["metrics"]["tokens"]["8"]
    assert stored["fingerprint"] in out and "6 of 6 tasks and 12 of 553 prompts were scored" in out

    refused(evaluate(*words, "--checkpoint", speaking / "generator", "--out", tmp_path, "--save-images"), "exists")
    (images / "00306/samples/0001.png").unlink()
    code, _, err = evaluate(*words, "--images", images)
    assert code == 0, err
    # A folder of more prompts will do for some of them.
    code, _, err = evaluate(*words[:-1], 1, "--images", images)
    assert code == 0, err
    assert json.loads((images / "geneval.json").read_text())["metrics"]["counts"] == {"prompts": 6, "samples": 18}
    for file in (images / "00306/samples").iterdir():
        file.unlink()
    refused(evaluate(*words, "--images", images), "lacks the images of 1 of 12 prompts: 00306")
    Image.new("RGB", (32, 32)).save(images / "00306/samples/0000.png")
    Image.new("RGB", (16, 16)).save(images / "00503/samples/0000.png")
    refused(evaluate(*words, "--images", images), "images of different size", "00000/samples", "00503/samples/0000.png")


def test_results_of_the_original_are_scored_again(evaluate, tmp_path):
    """Two published lines of whose verdicts one is wrong, and one about a colour, which stays."""
    cat, dog = ({"class": name, "count": 1} for name in ("cat", "dog"))
    entries = {
        "position": [dog, {**cat, "position": ["left of", 0]}],
        "two_object": [cat, dog],
        "colors": [{**cat, "color": "red"}],
    }
    boxes = {"cat": [[0.0, 0.0, 10.0, 10.0, 0.95]], "dog": [[50.0, 0.0, 60.0, 10.0, 0.5]]}
    rows = [
        {"filename": f"x/{n:05d}/samples/0000.png", "tag": tag, "prompt": tag, "correct": tag != "two_object"}
        | {"reason": "", "metadata": json.dumps({"tag": tag, "prompt": tag, "include": include})}
        | {"details": json.dumps(boxes)}
        for n, (tag, include) in enumerate(entries.items())
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scores(*words):
        code, out, err = evaluate("geneval", "--results", file, "--out", tmp_path / "zz", *words)
        assert code == 0, err
        result = json.loads((tmp_path / "zz/geneval.json").read_text())
        assert result["fingerprint"] in out and "3 of 6 tasks and 3 of 553 prompts were scored" in out
        assert result["run"]["verdicts"] in " ".join(out.split())
        return out, result

    out, result = scores()
    assert result["metrics"]["tokens"]["unknown"] == dict.fromkeys(["two_object", "colors", "position", "overall"], 1.0)
    assert "1 of 2 stored verdicts are what these rules give on the stored boxes; as stored" in out
    assert result["protocol"]["data"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    _, stricter = scores("--min-score", 0.6)
    assert stricter["metrics"]["tokens"]["unknown"] == {"two_object": 0, "colors": 1, "position": 0, "overall": 1 / 3}
    assert stricter["metrics"]["all"] == {"prompts": 3, "images": 3, "images_right": 1 / 3, "prompts_right": 1 / 3}
    assert stricter["fingerprint"] != result["fingerprint"]
    assert not (tmp_path / "zz/geneval_results.jsonl").exists()
    refused(evaluate("geneval", "--results", file, "--detector", "x"), "--detector", "--results")
    file.write_text(json.dumps(rows[0] | {"correct": "false"}))
    refused(evaluate("geneval", "--results", file), "results.jsonl, line 1", "'correct'")


def test_an_image_does_not_depend_on_its_batch_nor_on_other_guidance(speaking, evaluate, tmp_path):
    words = ("geneval", "--checkpoint", speaking / "generator", "--data", "shapes", "--most-per-task", 1)
    words = (*words, "--count-per-prompt", 2, "--save-images")
    for name, more in (("a", ("--cfg-scale", "1,3")), ("b", ("--cfg-scale", 3, "--batch-size", 5))):
        code, out, err = evaluate(*words, *more, "--out", tmp_path / name)
        assert code == 0, err
        assert ("by guidance scale" in out) == (name == "a")

    def pixels(folder):
        return np.stack([np.array(Image.open(path), dtype=int) for path in sorted(folder.rglob("0*.png"))])

    one, three, alone = (pixels(tmp_path / name / "geneval_images") for name in ("a/cfg_1", "a/cfg_3", "b"))
    assert one.shape == (12, 32, 32, 3)
    assert abs(three - alone).max() <= 1
    assert abs(three - one).max() > 1
    fingerprints = {
        json.loads((tmp_path / "a" / name / "geneval.json").read_text())["fingerprint"] for name in ("cfg_1", "cfg_3")
    }
    assert len(fingerprints) == 2


def test_geneval_of_photographs(speaking, evaluate, tmp_path):
    save_detector("mask2former", tmp_path / "detector")
    save_clip(tmp_path / "clip")
    entries = [
        {"tag": "single_object", "prompt": "a photo of a cat", "include": [{"class": "cat", "count": 1}]},
        {"tag": "colors", "prompt": "a photo of a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]},
        {
            "tag": "counting",
            "prompt": "a photo of two people",
            "include": [{"class": "person", "count": 2}],
            "exclude": [{"class": "person", "count": 3}],
        },
    ]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = ("geneval", "--checkpoint", speaking / "generator", "--metadata", metadata, "--out", tmp_path / "out")
    judge = ("--detector", tmp_path / "detector", "--color-model", tmp_path / "clip")
    code, out, err = evaluate(*words, *judge, "--min-score", 0, "--min-counting-score", 0)
    assert code == 0, err
    assert "GenEval by the detector" in out
    result = json.loads((tmp_path / "out/geneval.json").read_text())
    # Before the images are judged, and beside their scores.
    assert out.count(result["run"]["self_test"]) == 2 and "SELF-TEST FAILED" in result["run"]["self_test"]
    assert result["metrics"]["counts"] == {"prompts": 3, "samples": 12}
    assert list(result["metrics"]["tokens"]["8"]) == ["single_object", "counting", "colors", "overall"]
    assert result["protocol"]["features"].keys() == {"name", "sha256", "color_model", "color_sha256"}
    assert result["protocol"]["split"] == "all"

    # Without a detector images are made for one that lives elsewhere, and judged later.
    refused(evaluate(*words), "--detector", "--save-images")
    code, out, err = evaluate(*words, "--save-images")
    assert code == 0 and "12 samples, not judged" in out, err
    images = tmp_path / "out/geneval_images"
    refused(evaluate("geneval", "--images", images), "--detector")
    code, out, err = evaluate("geneval", "--images", images, *judge, "--min-score", 0, "--min-counting-score", 0)
    assert code == 0, err
    scores = json.loads((images / "geneval.json").read_text())["metrics"]["tokens"]["unknown"]
    assert scores == result["metrics"]["tokens"]["8"]
    refused(evaluate("geneval", "--images", images, "--detector", tmp_path / "none"), "--detector", "no such folder")
    refused(evaluate("geneval", "--images", images, *judge[:2], "--min-score", 0), "give --color-model")


def test_geneval_refuses_what_it_cannot_score(runs, speaking, evaluate, tmp_path):
    words = ("geneval", "--checkpoint", speaking / "generator")
    refused(evaluate("geneval"), "--checkpoint", "--images", "--results")
    refused(evaluate(*words), "--data shapes", "--metadata FILE")
    refused(evaluate(*words, "--data", "digits"), "digits knows no prompts")
    refused(evaluate(*words, "--data", "shapes", "--metadata", "m.jsonl"), "not allowed")
    refused(evaluate(*words, "--data", "shapes", "--detector", "x"), "--detector is for photographs")
    refused(evaluate(*words, "--data", "shapes", "--cfg-scale", "1,x"), "--cfg-scale")
    refused(evaluate(*words, "--data", "shapes", "--text-encoder", tmp_path / "none"), "none")
    refused(evaluate(*words, "--metadata", tmp_path / "none.jsonl", "--save-images"), "none.jsonl")
    refused(evaluate("geneval", "--checkpoint", runs / "generator", "--data", "shapes"), "conditioned on classes")
    refused(evaluate("geneval", "--results", tmp_path / "none.jsonl"), "none.jsonl")


def test_generation_from_captions(speaking, evaluate, tmp_path):
    words = ("generation", "--checkpoint", speaking / "generator", "--data", "shapes", "--no-copies")
    data = ("--data-args", "train_count=30", "val_count=8")
    code, _, err = evaluate(*words, *data, "--count", 10, "--cfg-scale", 2, "--out", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "generation.json").read_text())
    assert result["protocol"]["settings"]["captions"] == "val in order"
    assert "classes" not in result["protocol"]["settings"]
    assert not any("accuracy" in name for name in result["metrics"]["tokens"]["8"])
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (10, 32, 32, 3)
    Image.open(tmp_path / "generation.png").verify()
    (tmp_path / "images").mkdir()
    for n in range(8):
        (tmp_path / "images/0").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (20 * n, 0, 0)).save(tmp_path / f"images/0/{n}.png")
    words = (*words[:4], tmp_path / "images", "--features", "shapes", "--data-args", "val_fraction=0.5")
    refused(evaluate(*words), "has no caption")


def test_a_report_tells_geneval(speaking, evaluate, tmp_path):
    words = ("geneval", "--checkpoint", speaking / "generator", "--data", "shapes", "--most-per-task", 1)
    code, _, err = evaluate(*words, "--count-per-prompt", 1, "--out", tmp_path / "generator/eval")
    assert code == 0, err
    code, _, err = evaluate("report", "--run", tmp_path)
    assert code == 0, err
    report = (tmp_path / "report.md").read_text()
    assert "GenEval: overall, share of images right" in report and "generator/eval/geneval.png" in report


def test_dpg_of_a_generator_and_of_its_images(speaking, evaluate, questions, tmp_path):
    words = ("dpg", "--questions", questions, "--judge", save_judge("blip", tmp_path / "blip"))
    out = tmp_path / "generator/eval"
    sampled = ("--checkpoint", speaking / "generator", "--save-images")
    code, said, err = evaluate(*words, *sampled, "--out", out, "--tokens", "2,8", "--batch-size", 3)
    assert code == 0, err
    result = json.loads((out / "dpg.json").read_text())
    assert list(result["metrics"]["tokens"]) == ["2", "8"]
    assert list(result["metrics"]["tokens"]["8"]) == ["attribute", "entity", "overall"]
    assert list(result["metrics"]["parts"]) == ["attribute", "attribute - color", "entity", "entity - whole"]
    assert result["metrics"]["counts"] == {"prompts": 2, "samples": 8}
    assert result["protocol"]["features"]["name"] == "blip"
    assert result["protocol"]["settings"]["count_per_prompt"] == 4
    assert result["fingerprint"] in said and "DPG-Bench by the judge blip" in said
    Image.open(out / "dpg_by_tokens.png").verify()
    records = [json.loads(line) for line in (out / "dpg_results.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["circle"] * 4 + ["square"] * 4
    assert result["metrics"]["tokens"]["8"]["overall"] == pytest.approx(100 * np.mean([r["score"] for r in records]))
    code, _, err = evaluate("report", "--run", tmp_path)
    assert code == 0, err
    assert "DPG-Bench by the judge blip: overall" in (tmp_path / "report.md").read_text()

    # The images that were kept are judged as those that were made, also where four of them are one file.
    kept = out / "dpg_images"
    (tmp_path / "grids").mkdir()
    for name in ("circle", "square"):
        cells = [np.array(Image.open(file)) for file in sorted((kept / name).iterdir())]
        grid = np.concatenate([np.concatenate(cells[:2], axis=1), np.concatenate(cells[2:], axis=1)])
        Image.fromarray(grid).save(tmp_path / "grids" / f"{name}.png")
    for folder, more in ((kept, ()), (tmp_path / "grids", ("--resolution", 32))):
        code, _, err = evaluate(*words, "--images", folder, *more)
        assert code == 0, err
        again = json.loads((folder / "dpg.json").read_text())
        assert again["metrics"]["tokens"]["unknown"] == pytest.approx(result["metrics"]["tokens"]["8"])
        assert (again["protocol"]["count"], again["protocol"]["image_size_px"]) == (8, 32)

    refused(evaluate(*words, *sampled, "--out", out), "exists")
    refused(evaluate(*words, "--images", tmp_path / "grids", "--resolution", 30), "is no grid", "64 x 64 px")
    (tmp_path / "grids/square.png").unlink()
    refused(evaluate(*words, "--images", tmp_path / "grids"), "lacks the images of 1 of 2 prompts: square")


def test_dpg_refuses_what_it_cannot_score(runs, speaking, evaluate, questions, tmp_path):
    words = ("dpg", "--questions", questions)
    sampled = ("--checkpoint", speaking / "generator", "--out", tmp_path / "out")
    refused(evaluate(*words, *sampled), "--judge", "--save-images")
    refused(evaluate(*words, "--images", tmp_path), "--judge")
    refused(evaluate(*words, *sampled, "--judge", tmp_path / "none"), "--judge: no such folder")
    refused(evaluate(*words, "--images", tmp_path, "--judge", "x", "--prompts", tmp_path), "--prompts")
    refused(evaluate(*words, *sampled, "--judge", "x", "--resolution", 64), "--resolution")
    refused(evaluate(*words, *sampled, "--judge", "x", "--prompts", tmp_path), "circle.txt")
    refused(evaluate("dpg", "--questions", tmp_path / "none.csv", *sampled, "--judge", "x"), "none.csv")
    refused(evaluate(*words, "--checkpoint", runs / "generator", "--judge", "x"), "conditioned on classes")
    # Without a judge images are made for one that lives elsewhere.
    code, said, err = evaluate(*words, *sampled, "--save-images", "--most-prompts", 1, "--count-per-prompt", 2)
    assert code == 0 and "2 samples, not judged without --judge" in said, err
    assert len(list((tmp_path / "out/dpg_images/circle").iterdir())) == 2


def test_compbench_by_both_protocols(speaking, evaluate, tmp_path):
    prompts, out = tmp_path / "color.txt", tmp_path / "generator/eval"
    prompts.write_text("a red hat and a blue cup.\ta red\ta hat\ta blue\ta cup\na hat\ta hat\ta cup\ta red\ta blue\n")
    words = ("compbench", "--prompts", prompts, "--judge", save_judge("blip", tmp_path / "blip"))
    sampled = ("--checkpoint", speaking / "generator", "--save-images", "--count-per-prompt", 2, "--out", out)
    code, said, err = evaluate(*words, *sampled)
    assert code == 0, err
    result = json.loads((out / "compbench.json").read_text())
    lines = (out / "compbench_results.jsonl").read_text().splitlines()
    scores = [np.prod(json.loads(line)["yes"]) for line in lines]
    assert result["metrics"]["tokens"]["8"] == pytest.approx({"overall": np.mean(scores)})
    assert result["metrics"]["counts"] == {"prompts": 2, "samples": 4}
    assert result["fingerprint"] in said and "T2I-CompBench by the judge blip" in said

    # The published layout, where the number is behind the whole prompt, is found as the one that is written.
    (tmp_path / "flat").mkdir()
    for file in (out / "compbench_images").glob("*/*.png"):
        stop = "." * file.parent.name.endswith("blue cup")
        shutil.copy(file, tmp_path / "flat" / f"{file.parent.name}{stop}_{int(file.stem):06d}.png")
    code, _, err = evaluate(*words, "--images", tmp_path / "flat")
    assert code == 0, err
    again = json.loads((tmp_path / "flat/compbench.json").read_text())
    assert again["metrics"]["tokens"]["unknown"] == pytest.approx(result["metrics"]["tokens"]["8"])

    bound = (*words, "--protocol", "object-binding", "--images", out / "compbench_images", "--out", out)
    code, said, err = evaluate(*bound)
    assert code == 0, err
    result = json.loads((out / "object-binding.json").read_text())
    lines = [json.loads(line) for line in (out / "object-binding_results.jsonl").read_text().splitlines()]
    assert all(len(line["yes"]) == 6 and line["score"] * 8 % 1 == 0 for line in lines)
    assert result["metrics"]["tokens"]["unknown"]["overall"] == pytest.approx(np.mean([ln["score"] for ln in lines]))
    assert "Object binding by the judge blip" in said
    code, _, err = evaluate("report", "--run", tmp_path / "generator")
    assert code == 0, err
    page = (tmp_path / "generator/report.md").read_text()
    assert "T2I-CompBench by the judge blip: overall" in page and "Object binding by the judge blip: overall" in page

    prompts.write_text("a hat\ta hat\n")
    refused(evaluate(*bound), "object binding needs two subjects", "there is a hat")
    prompts.write_text("a dog\ta dog\n")
    refused(evaluate(*words, "--images", tmp_path / "flat"), "lacks the images of 1 of 1 prompts: a dog")


def test_genai_of_images_that_people_rated(speaking, evaluate, tmp_path):
    prompts, skills = tmp_path / "genai_image.json", tmp_path / "genai_skills.json"
    entries = {"00000": "a red circle", "00001": "a blue square", "00002": "small"}
    ratings = {"00000": [5, 4], "00001": [1, 2], "00002": [3]}
    prompts.write_text(json.dumps({n: {"prompt": t, "models": {"A": ratings[n]}} for n, t in entries.items()}))
    skills.write_text(json.dumps({"attribute": [0, 1], "scene": [2], "basic": [0, 1, 2]}))
    words = ("genai", "--prompts", prompts, "--skills", skills)
    llava, blip = (save_judge(kind, tmp_path / kind) for kind in ("llava", "blip"))
    sampled = ("--checkpoint", speaking / "generator", "--out", tmp_path / "out", "--save-images")
    code, said, err = evaluate(*words, *sampled, "--judge", llava)
    assert code == 0, err
    result = json.loads((tmp_path / "out/genai.json").read_text())
    row = result["metrics"]["tokens"]["8"]
    assert list(row) == ["attribute", "scene", "basic", "overall"]
    assert row["basic"] == pytest.approx(row["overall"]) and 0 < row["overall"] < 1
    assert row["overall"] == pytest.approx((2 * row["attribute"] + row["scene"]) / 3)
    assert result["metrics"]["counts"] == {"prompts": 3, "samples": 3}
    assert "GenAI-Bench by the judge llava" in said and "agreement" not in said

    images = tmp_path / "out/genai_images"
    for judge, name in ((llava, "a"), (blip, "b")):
        code, said, err = evaluate(
            *words, "--images", images, "--rated", "A", "--judge", judge, "--out", tmp_path / name
        )
        assert code == 0, err
        assert "agreement with people: pearson" in said
    first, second = tmp_path / "a/genai.json", tmp_path / "b/genai.json"
    metrics = json.loads(first.read_text())["metrics"]
    assert metrics["tokens"]["unknown"] == pytest.approx(row)
    assert metrics["agreement"].keys() == {"pearson", "kendall_tau_b"}
    refused(evaluate("compare", first, second), "different protocols", "features")
    refused(evaluate(*words, *sampled, "--rated", "A", "--judge", llava), "--rated")
    refused(evaluate(*words, "--images", images, "--rated", "B", "--judge", llava), "no ratings of 'B' (of: A)")
