import dataclasses
import json

import pytest

from vistok.errors import UserError
from vistok.eval.protocol import EvalProtocol, compare, load_result, save_result

PROTOCOL = EvalProtocol(
    task="reconstruction",
    data={"name": "photos", "crop": "center", "resize": "bicubic"},
    split="val",
    count=8,
    image_size_px=32,
    quantised=True,
    weights={"tokenizer": "ema"},
    settings={"tokens": [1, 2], "decode": {"steps": 8}},
    seed=0,
    features={"name": "digits-cnn", "sha256": "aa"},
    reference={"images": "the originals", "count": 8},
    definitions={"psnr": "mean over images"},
    models={"tokenizer": "1234"},
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", {"name": "photos", "crop": "random", "resize": "bicubic"}),
        ("data", {"name": "photos", "crop": "center", "resize": "lanczos"}),
        ("features", {"name": "digits-cnn", "sha256": "bb"}),
        ("reference", {"images": "the originals", "count": 9}),
        ("settings", {"tokens": [1, 2], "decode": {"steps": 9}}),
        ("weights", {"tokenizer": "raw"}),
        ("count", 9),
        ("quantised", False),
        ("seed", 1),
    ],
)
def test_fingerprint_covers_the_conditions(field, value):
    assert dataclasses.replace(PROTOCOL, **{field: value}).fingerprint != PROTOCOL.fingerprint


def test_fingerprint_ignores_the_model_and_the_order_of_keys():
    data = {"resize": "bicubic", "crop": "center", "name": "photos"}
    assert dataclasses.replace(PROTOCOL, models={"tokenizer": "5678"}, data=data).fingerprint == PROTOCOL.fingerprint
    assert len(PROTOCOL.fingerprint) == 12
    int(PROTOCOL.fingerprint, 16)


def test_of_a_reference_with_pixels_the_fingerprint_covers_these_wherever_they_come_from():
    folder = {"images": "all", "count": 8, "pixels_sha256": "aa", "data": {"name": "folders"}}
    protocol = dataclasses.replace(PROTOCOL, reference=folder)
    same = dataclasses.replace(PROTOCOL, reference=folder | {"images": "train", "data": {"name": "shards"}})
    assert same.fingerprint == protocol.fingerprint and same.differences(protocol) == []
    other = dataclasses.replace(PROTOCOL, reference=folder | {"pixels_sha256": "bb"})
    assert other.differences(protocol) == ['reference / pixels_sha256: "bb" / "aa"']


def test_results_come_back_whole(tmp_path):
    path = tmp_path / "eval" / "result.json"
    save_result(path, PROTOCOL, {"psnr_db": 20.5}, {"command": "measure"})
    assert load_result(path) == (PROTOCOL, {"psnr_db": 20.5}, {"command": "measure"})
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    assert set(json.loads(path.read_text())) == {"protocol", "fingerprint", "metrics", "run"}


def test_compare_models_under_one_protocol(tmp_path):
    save_result(tmp_path / "a.json", PROTOCOL, {"tokens": {"1": {"psnr_db": 20.0}}, "only_a": 1.0})
    other = dataclasses.replace(PROTOCOL, models={})
    save_result(tmp_path / "b.json", other, {"tokens": {"1": {"psnr_db": 21.0}}})
    values = {"tokens / 1 / psnr_db": (20.0, 21.0), "only_a": (1.0, None)}
    assert compare(tmp_path / "a.json", tmp_path / "b.json") == (PROTOCOL, other, values)


def test_compare_refuses_other_protocols_and_names_the_fields(tmp_path):
    save_result(tmp_path / "a.json", PROTOCOL, {"psnr_db": 20.0})
    save_result(tmp_path / "b.json", dataclasses.replace(PROTOCOL, count=9, seed=3), {"psnr_db": 21.0})
    with pytest.raises(UserError, match=r"--force.*count: 8 / 9; seed: 0 / 3") as error:
        compare(tmp_path / "a.json", tmp_path / "b.json")
    assert "\n" not in str(error.value)
    assert "definitions" not in str(error.value)
    *_, values = compare(tmp_path / "a.json", tmp_path / "b.json", force=True)
    assert values == {"psnr_db": (20.0, 21.0)}


def test_only_the_values_that_differ_are_named():
    settings = {"tokens": [1, 2], "decode": {"steps": 9, "apg": True}}
    other = dataclasses.replace(PROTOCOL, settings=settings, features={"name": "none"})
    assert PROTOCOL.differences(other) == [
        "settings / decode / steps: 8 / 9",
        'features / name: "digits-cnn" / "none"',
        'features / sha256: "aa" / absent',
        "settings / decode / apg: absent / true",
    ]
    assert PROTOCOL.differences(dataclasses.replace(PROTOCOL, models={})) == []


def test_load_refuses_what_is_no_result(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        load_result(tmp_path / "none.json")
    (tmp_path / "spec.json").write_text('{"spec": 1}')
    with pytest.raises(UserError, match="not an evaluation result"):
        load_result(tmp_path / "spec.json")
    save_result(tmp_path / "a.json", PROTOCOL, {"psnr_db": 20.0})
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace('"count": 8', '"count": 50000'))
    with pytest.raises(UserError, match="measure again"):
        load_result(tmp_path / "a.json")
