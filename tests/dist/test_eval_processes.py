"""``python -m vistok.eval`` under two processes, as torchrun starts them: shares, order, and the figures of one process."""

import contextlib
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tiny_models.args import VARIANTS
from tiny_models.exports import export_generator, export_tokenizer
from tiny_models.judges import save_judge
from tiny_models.models import component_of, make_tokenizer
from tiny_models.text import save_t5
from vistok.checkpoint import export
from vistok.cli import main
from vistok.data.datamodule import load_images
from vistok.errors import UserError
from vistok.eval import processes
from vistok.eval.__main__ import run
from vistok.eval.images import PixelHash, image_batches
from vistok.eval.protocol import flatten
from vistok.pictures import to_pil

UNREADABLE = "b/02.png"  # the last image of the first of two processes, in batches of 5


def start(function, *args):
    """Run ``function(rank, *args)`` in two processes, in the environment that torchrun gives them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.start_processes(_process, (str(store.port), function, *args), nprocs=2, start_method="fork")


def _process(rank, port, function, *args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    function(rank, *args)


def evaluate(*words):
    """Exit code, stdout and stderr of ``python -m vistok.eval words``."""
    sys.argv = ["vistok.eval", *map(str, words)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(run)
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue().split("\r")[-1]}


def _evaluate(rank, folder, *words):
    (folder / f"said_{rank}.json").write_text(json.dumps(evaluate(*words)))


def evaluate_together(folder, *words):
    """The same of each of two processes; ``folder`` is for their use."""
    start(_evaluate, folder, *words)
    return [json.loads((folder / f"said_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, generators of classes and of texts, and 23 training and 11 held-out images of two classes."""
    root = tmp_path_factory.mktemp("made")
    rng = torch.Generator().manual_seed(0)
    for split, counts in (("train", {"a": 12, "b": 12}), ("val", {"a": 5, "b": 6})):
        for name, count in counts.items():
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=rng)
                to_pil(image).resize((16, 16), 0).save(root / "data" / split / name / f"{index:02d}.png")
    (root / "data/train" / UNREADABLE).write_bytes(b"no image")
    tokenizer = export_tokenizer(root / "tokenizer")
    export_generator(root / "generator", tokenizer, ["a", "b"], num_classes=2)
    model = make_tokenizer("tokenflow")
    export(root / "tokenflow", "tokenizer", component_of(model), model.spec, model.state_dict())
    large = export_tokenizer(root / "large", image_size=32, patch_size=8)
    export_generator(root / "speaking", large, [], **VARIANTS["gpt"]["text"])
    spec = json.loads((root / "speaking/spec.json").read_text())
    save_t5(root / "t5")
    spec["text_encoder"] = {"name": "t5", "args": {"path": "./../t5"}}
    (root / "speaking/spec.json").write_text(json.dumps(spec))
    save_judge("blip", root / "blip")
    (root / "dpg_bench.csv").write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "a,a red hat,1,0,entity - whole (hat),Is there a hat?\n"
        "a,a red hat,2,1,attribute - color (hat; red),Is the hat red?\n"
        "b,a cup,1,0,entity - whole (cup),Is there a cup?\n"
    )
    return root


def words_of(task, made):
    data = ("--data", made / "data", "--data-args", "on_error=skip")
    network, batches = ("--features", "digits"), ("--batch-size", 5)
    return {
        "reconstruction": (task, "--checkpoint", made / "tokenizer", *data, *network, *batches, "--steps", "1,2"),
        "generation": (
            *(task, "--checkpoint", made / "generator", *data, *network, *batches),
            *("--count", 14, "--tokens", "2,8", "--temperature", 2),
        ),
        "geneval": (
            *(task, "--checkpoint", made / "speaking", "--data", "shapes", *batches),
            *("--most-per-task", 1, "--count-per-prompt", 2, "--save-images"),
        ),
        "dpg": (
            *(task, "--checkpoint", made / "speaking", "--questions", made / "dpg_bench.csv", *batches),
            *("--judge", made / "blip", "--save-images"),
        ),
        "probe": (task, "--checkpoint", made / "tokenflow", *data, *batches),
    }[task]


def said_nothing(said):
    return said == {"code": 0, "out": "", "err": said["err"]} and "error" not in said["err"]


@pytest.mark.parametrize("task", ["reconstruction", "generation", "geneval", "dpg", "probe"])
def test_two_processes_write_what_one_does(made, tmp_path, task):
    words = words_of(task, made)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = evaluate(*words, "--out", one)
    first, second = evaluate_together(tmp_path, *words, "--out", two)
    assert alone["code"] == first["code"] == 0, (alone, first)
    assert said_nothing(second)
    assert first["out"].count("saved: ") == 1
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".png" and "by_" not in file.name:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
    results = [json.loads((folder / f"{task}.json").read_text()) for folder in (one, two)]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert results[0]["protocol"] == results[1]["protocol"]
    assert [result["run"]["processes"] for result in results] == [1, 2]
    metrics, together = (flatten(result["metrics"]) for result in results)
    assert list(together) == list(metrics)
    assert together == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    if task == "generation":
        assert metrics["counts / samples"] == 14
        assert metrics["counts / reference"] == 23, "the unreadable one is left out, none counts twice"
        assert {"KID-14", "IS-14", "recall-14"} < {name.split(" / ")[-1].split(" (")[0] for name in metrics}
        assert (np.load(one / "samples.npz")["arr_0"] == np.load(two / "samples.npz")["arr_0"]).all()
    if task in ("geneval", "dpg"):
        lines = [(folder / f"{task}_results.jsonl").read_text() for folder in (one, two)]
        assert lines[0] == lines[1]


def test_samples_that_exist_against_a_reference_file(made, tmp_path):
    """The file that two processes write is that of one; samples are of a folder, of which each reads a part."""
    files = [tmp_path / name / "stats.npz" for name in ("one", "two")]
    more = ("--protocol", "adm16", "--features", "digits", "--batch-size", 5)
    words = ("reference", "--data", made / "data", "--data-args", "on_error=skip", *more)
    assert evaluate(*words, "--out", files[0])["code"] == 0
    first, second = evaluate_together(tmp_path, *words, "--out", files[1])
    assert first["code"] == 0 and "23 images of 16 px" in first["out"], first
    assert said_nothing(second)
    one, two = ({key: value for key, value in np.load(file).items()} for file in files)
    assert one.keys() == two.keys() and len(one["arr_0"]) == 23
    for key in ("arr_0", "features", "vistok_reference"):
        assert (one[key] == two[key]).all(), key
    for key in ("mu", "sigma"):
        np.testing.assert_allclose(one[key], two[key], rtol=1e-9, atol=1e-12)

    words = ("generation", "--images", made / "data/val/b", "--reference", files[0], *more[2:4], "--batch-size", 3)
    assert evaluate(*words, "--out", tmp_path / "one")["code"] == 0
    assert evaluate_together(tmp_path, *words, "--out", tmp_path / "two")[0]["code"] == 0
    results = [json.loads((tmp_path / name / "generation.json").read_text()) for name in ("one", "two")]
    assert results[0]["protocol"] == results[1]["protocol"]
    assert flatten(results[1]["metrics"]) == pytest.approx(flatten(results[0]["metrics"]), rel=1e-6, abs=1e-9)


def test_what_cannot_be_shared_is_one_line(made, tmp_path):
    for words, line in (
        (("gallery", "--runs", made, "--out", tmp_path / "x"), "gallery is the work of one process"),
        (("probe", "--checkpoint", made / "nothing", "--data", made / "data"), "nothing"),
        (("reconstruction", "--checkpoint", made / "tokenizer", "--data", made / "data"), "no feature network"),
        (
            ("reconstruction", "--checkpoint", made / "tokenizer", "--data", made / "data", "--features", "none"),
            "1 batches are too few for 2 processes: lower --batch-size",
        ),
    ):
        both = evaluate_together(tmp_path, *words)
        assert [said["code"] for said in both] == [2, 2]
        errors = "".join(said["err"] for said in both)
        assert errors.startswith("error: ") and errors.count("\n") == 1 and line in errors


def gather(rank, folder, data):
    with processes.together():
        images = load_images(str(data), "train", 16, {"on_error": "skip"})
        positions = [batch["position"] for batch in image_batches(images, 5)]
        first_15 = [batch["position"] for batch in image_batches(images, 4, count=15)]
        pixels = PixelHash()
        for number in processes.own_share(range(5)):
            pixels.update(torch.full((1, 3, 2, 2), number, dtype=torch.uint8))
        processes._PIECE_BYTES = 2
        with open(folder / f"{rank}.bytes", "w+b") as file:
            file.write(b"first" if rank == 0 else b"second")
            processes.gather_file(file)
        with pytest.raises(UserError, match="1 batches are too few for 2 processes"):
            processes.own_share([0])
        shares = processes.of_all([list(processes.own_share(range(count))) for count in (2, 5, 8)])
        rows = processes.rows_of_all(torch.arange(10).view(5, 2)[rank * 3 : rank * 3 + 3])
        whole = [len(batch["position"]) for batch in image_batches(images, 100, whole=True)]
        positions, first_15 = (processes.rows_of_all(torch.cat(part)) for part in (positions, first_15))
        torch.save([shares, rows, whole, positions, first_15, pixels.hexdigest()], folder / f"{rank}.pt")


def test_what_is_gathered_is_in_order(made, tmp_path):
    start(gather, tmp_path, made / "data")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    pixels = PixelHash()
    pixels.update(torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 2))
    images = load_images(str(made / "data"), "train", 16, {"on_error": "skip"})
    read = [torch.cat([batch["position"] for batch in image_batches(images, 5, count=count)]) for count in (None, 15)]
    assert [len(part) for part in read] == [23, 15]
    for shares, rows, whole, positions, first_15, digest in found:
        assert shares == [[[0], [0, 1, 2], [0, 1, 2, 3]], [[1], [3, 4], [4, 5, 6, 7]]]
        assert rows.tolist() == torch.arange(10).view(5, 2).tolist()
        assert whole == [23]
        assert torch.equal(positions, read[0])
        assert torch.equal(first_15, read[1])
        assert digest == pixels.hexdigest()
    assert (tmp_path / "0.bytes").read_bytes() == b"firstsecond"
