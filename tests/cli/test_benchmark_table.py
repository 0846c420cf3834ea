"""benchmarks/table.py: tiny systems from nothing to the page, interrupted, gone on with, repeated, changed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image
from stages import Stage, Stages

from tiny_models.args import TINY_ARGS
from tiny_models.runs import ROOT, read_state
from vistok.checkpoint import load_generator, load_tokenizer
from vistok.errors import UserError
from vistok.eval.protocol import load_result

UPDATES = {"tokenizer": 24, "generator": 4}
BATCH_SIZE = 16
GFID = "gFID-12 (digits-cnn features)"


@pytest.fixture
def table():
    """Runs table.py in a fork of a process that has imported everything; gives exit code and output.

    ``during`` is called with its process id.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tiny_models.forking"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(log, *words, during=lambda pid: None):
        process.stdin.write(json.dumps([str(log), *map(str, words)]) + "\n")
        process.stdin.flush()
        running.append(int(process.stdout.readline()))
        during(running[0])
        code = int(process.stdout.readline())
        running.clear()
        return code, log.read_text()

    running = []
    yield run
    for pid in running:  # after a failure
        os.kill(pid, signal.SIGTERM)
    process.kill()
    process.communicate()


def config(folder, kind, name):
    config = {
        "output": "nowhere",
        "tokenizer": "???",
        "data": {"name": "digits", "batch_size": BATCH_SIZE},
        "trainer": {"max_updates": 1, "accelerator": "cpu"},
        "log": {"every_updates": 1},
        kind: {"name": name, "args": TINY_ARGS[f"{kind}s"][name]},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def write_systems(folder, reconstruction="--data digits --count 12", **more):
    """One whose first tokens are an image, and a continuous one that is made discrete."""
    flextok, uniflow = (config(folder, "tokenizer", name) for name in ("flextok", "uniflow"))
    gpt = config(folder, "generator", "gpt")
    discretize = "--data digits --count 32 --levels 5"
    group = {
        **{f"{part}_images": updates * BATCH_SIZE for part, updates in UPDATES.items()},
        "reconstruction": reconstruction,
        "generation": "--data digits --count 12 --cfg-scale 2 --no-copies",
        "speed": "--count 4 --rounds 1",
        "systems": {
            "flextok": {"title": "FlexTok", "tokenizer": flextok, "generator": gpt, "tokens": "2,8"},
            "uniflow": {"title": "UniFlow", "tokenizer": uniflow},
            "bridge": {"title": "Bridge", "of": "uniflow", "discretize": discretize, "generator": gpt},
            **more,
        },
    }
    path = folder / "systems.yaml"
    path.write_text(yaml.safe_dump({"digits": group}, sort_keys=False))
    return path


def cells(page):
    """The cells of the first table, by the name of its row and of its column."""
    lines = page[page.index("| system |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(header) for row in rows)
    return {row[0]: dict(zip(header, row)) for row in rows}


def begun(said):
    return [line.split()[1] for line in said.splitlines() if line.startswith("begin")]


def test_interrupted_gone_on_with_repeated_and_changed(tmp_path, table):
    out, page, digits = tmp_path / "out", tmp_path / "table.md", tmp_path / "out" / "digits"
    words = (tmp_path / "said.txt", "--systems", write_systems(tmp_path), "--out", out, "--table", page, "--jobs", 1)

    def interrupt(pid):
        while not (digits / "flextok" / "tokenizer" / "metrics.csv").exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGTERM)

    code, said = table(*words, during=interrupt)
    assert code == 130
    assert begun(said) == ["digits/flextok/tokenizer"]
    assert said.splitlines()[-1].startswith("stop   digits/flextok/tokenizer")
    stopped_at = read_state(digits / "flextok" / "tokenizer")["updates"]
    assert 0 < stopped_at < UPDATES["tokenizer"]
    assert not page.exists()

    code, said = table(*words)
    assert code == 0, said
    assert begun(said)[0] == "digits/flextok/tokenizer" and begun(said)[-1].endswith("/speed")
    assert f"continued at update {stopped_at}" in (out / "logs" / "digits.flextok.tokenizer.log").read_text()
    for system, part in (("flextok", "tokenizer"), ("uniflow", "tokenizer"), ("bridge", "generator")):
        assert read_state(digits / system / part)["updates"] == UPDATES[part]
    check_page(page.read_text(), digits)
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.width > 1000

    first = page.read_text()
    code, said = table(*words)
    assert (code, begun(said)) == (0, [])
    assert page.read_text() == first

    code, said = table(*words, "--budget", 2)
    assert code == 2
    assert said.startswith("error: ") and "begun by another command" in said and said.count("\n") == 1

    broken = {"title": "Broken", "tokenizer": f"{tmp_path}/flextok.yaml tokenizer.args.patch_sise=4", "generator": "x"}
    write_systems(tmp_path, reconstruction="--data digits --count 13", broken=broken)
    code, said = table(*words)
    assert code == 2
    measured_again = [f"digits/{system}/reconstruction" for system in ("flextok", "uniflow", "bridge")]
    assert sorted(begun(said)) == sorted([*measured_again, "digits/broken/tokenizer"])
    failures = [line for line in said.splitlines() if line.startswith("FAILED digits/broken/")]
    assert "did you mean 'patch_size'" in failures[0] and "digits.broken.tokenizer.log" in failures[0]
    assert {line.split(": ")[1] for line in failures[1:]} == {
        "needs digits/broken/tokenizer",
        "needs digits/broken/generator",
    }
    changed = page.read_text()
    assert set(cells(changed)["Broken"].values()) == {"Broken", "-"}
    assert cells(changed)["FlexTok"][GFID] == cells(first)["FlexTok"][GFID]
    assert "| rFID-13 (" in changed and "| rFID-13 (" not in first
    assert "## Not finished" in changed and failures[0].split(" ", 2)[2] in changed


def check_page(page, digits):
    """Every cell is what the result files say."""
    rows = cells(page)
    assert list(rows) == ["FlexTok", "UniFlow", "Bridge", "297 real held-out images"]
    assert (rows["FlexTok"]["tokens"], rows["FlexTok"]["bits"]) == ("8", "35")
    assert (rows["UniFlow"]["tokens"], rows["UniFlow"]["bits"]) == ("16 of 3 floats", "-")
    assert (rows["Bridge"]["tokens"], rows["Bridge"]["bits"]) == ("16 of 3 codes", "111")
    prints = []
    for title, folder, tokens in (("FlexTok", "flextok", "8"), ("Bridge", "bridge", "16")):
        protocol, metrics, _ = load_result(digits / folder / "reconstruction.json")
        assert rows[title]["PSNR, dB"] == f"{metrics['tokens'][tokens]['psnr_db']:.2f}"
        prints.append(protocol.fingerprint)
        protocol, metrics, _ = load_result(digits / folder / "generation.json")
        assert rows[title][GFID] == f"{metrics['tokens'][tokens][GFID]:.2f}"
        assert rows[title]["class accuracy"] == f"{metrics['tokens'][tokens]['class_accuracy']:.1%}"
        real = metrics["held_out"]["gFID-297 (digits-cnn features)"]
        assert rows["297 real held-out images"][GFID] == f"{real:.2f}"
        prints.append(protocol.fingerprint)
        speed = json.loads((digits / folder / "speed.json").read_text())["tokens"]
        assert float(rows[title]["sampling, images/s"]) == pytest.approx(speed[tokens]["images_per_s"], rel=1e-3)
        generator = load_generator(digits / folder / "generator")
        assert rows[title]["parameters, generator"] == f"{sum(p.numel() for p in generator.parameters()):,}"
        assert all(float(rows[title][f"training images/s, {part}"].replace(",", "")) > 0 for part in UPDATES)
    tokenizer = load_tokenizer(digits / "bridge" / "tokenizer").tokenizer.module
    parameters = f"{sum(p.numel() for p in tokenizer.parameters()):,}"
    assert rows["Bridge"]["parameters, tokenizer"] == rows["UniFlow"]["parameters, tokenizer"] == parameters
    assert rows["UniFlow"][GFID] == rows["UniFlow"]["sampling, images/s"] == "-"
    assert all(f"`{fingerprint}`" in page for fingerprint in prints)
    assert "not comparable" not in page
    assert [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| FlexTok | ")] == ["8", *"1248"]
    assert "trained on 384 images, every generator on 64" in page
    assert f"python -m vistok.discretize --tokenizer {digits}/uniflow/tokenizer --data digits --count 32" in page


def python(folder, name, needs=(), line="", **more):
    """A stage that notes its name in ``order`` and makes a file of its name."""
    code = f"{line}\nopen('order', 'a').write('{name} ')\nopen('{name}', 'w').close()"
    return Stage(name, ("-c", f"import os, sys, time; os.chdir('{folder}')\n{code}"), folder / name, needs, **more)


def test_stages_go_on_after_a_failure_and_run_once(tmp_path, capsys):
    def run(*stages):
        (tmp_path / "order").write_text("")
        failed = Stages(list(stages), tmp_path, jobs=1, threads=1).run()
        return (tmp_path / "order").read_text().split(), failed

    alone, a = python(tmp_path, "alone", alone=True), python(tmp_path, "a")
    wrong, b = (python(tmp_path, "b", ("a",), line) for line in ("print('no'); sys.exit('error: b is wrong')", ""))
    c, d = python(tmp_path, "c", ("b",)), python(tmp_path, "d", ("a",), clears=tmp_path / "left")
    (tmp_path / "left").mkdir()
    order, failed = run(alone, c, wrong, a, d)
    assert order == ["a", "d", "alone"]
    assert failed == {"b": f"exit code 1: error: b is wrong; log: {tmp_path}/logs/b.log", "c": "needs b"}
    assert f"FAILED b: {failed['b']}\n" in capsys.readouterr().out
    assert not (tmp_path / "left").exists()
    assert run(alone, c, b, a, d) == (["b", "c"], {})
    assert run(alone, c, b, a, d) == ([], {})
    (tmp_path / "b").unlink()
    assert run(alone, c, b, a, d) == (["b", "c"], {}), "what needs a stage is run again after it"
    record = json.loads((tmp_path / "logs" / "b.json").read_text())
    assert record["command"].startswith("python -c ") and record["ended"] > record["began"]
    with pytest.raises(UserError, match="a was begun by another command"):
        Stages([python(tmp_path, "a", line="pass", resumes=True)], tmp_path, jobs=1, threads=1)


def test_stages_run_beside_each_other(tmp_path):
    meet = "open('{}_here', 'w').close()\nwhile not os.path.exists('{}_here'): time.sleep(0.01)"
    x, y = (python(tmp_path, name, line=meet.format(name, other)) for name, other in ("xy", "yx"))
    assert Stages([x, y], tmp_path, jobs=2, threads=1).run() == {}
