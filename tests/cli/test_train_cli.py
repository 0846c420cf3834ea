"""``python train.py`` as a user types it."""

import os
import signal
import time
from functools import partial

import pytest

from tiny_models.runs import read_state, start_process, tiny_yaml
from vistok.checkpoint import load_tokenizer


@pytest.fixture
def command(run_script):
    """Runs train.py in this process; gives exit code, stdout and stderr."""

    return partial(run_script, "train.py")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("tokenizer.args.widht=3", ["tokenizers.tiny_models.tokenizer", "'widht'", "did you mean 'width'?"]),
        ("optim.learning_rate=3", ["'optim.learning_rate'", "lr"]),
        ("trainer.max_updates=many", ["trainer.max_updates", "many"]),
        ("optim.schedule=linear", ["optim.schedule", "linear"]),
        ("tokenizer.name=flextock", ["no tokenizer named 'flextock'", "did you mean 'flextok'?"]),
        ("data.name=digit", ["named 'digit'", "did you mean 'digits'?"]),
        ("data.batch_size=0", ["data.batch_size must be at least 1, got 0"]),
        ("ema.decay=1", ["ema.decay must lie in [0, 1)"]),
        ("trainer.precision=16", ["trainer.precision", "16"]),
        ("resume=nowhere", ["checkpoint not found: nowhere"]),
        ("generator.name=gpt", ["a generator is trained on an exported tokenizer"]),
        ("trainer.accelerator=tpu", ["trainer.accelerator", "tpu"]),
        ("trainer.strategy=fast", ["trainer.strategy must be auto, fsdp, ddp", "got fast"]),
        ("trainer.strategy=fsdp", ["shares out a generator"]),
        ("trainer.activation_checkpointing=true", ["TinyTokenizer has none"]),
        ("nonsense", ["expected key=value, got 'nonsense'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, command, override, parts):
    code, _, err = command("--config", tiny_yaml(tmp_path), override)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
    for part in parts:
        assert part in err
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_compiling_without_a_compiler_is_refused(tmp_path, command, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-such-compiler"),))
    code, _, err = command("--config", tiny_yaml(tmp_path), "trainer.compile=true", "trainer.accelerator=cpu")
    assert code == 2
    assert err.splitlines()[-1].startswith("error: trainer.compile needs a C++ compiler on a CPU")
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_a_missing_config_or_tokenizer_is_named(tmp_path, command):
    code, _, err = command("--config", tmp_path / "no.yaml")
    assert (code, err) == (2, f"error: config file not found: {tmp_path / 'no.yaml'}\n")
    overrides = ["generator.name=tiny_models.generator", f"tokenizer={tmp_path / 'nothing'}"]
    code, _, err = command("--config", tiny_yaml(tmp_path), *overrides)
    assert (code, err) == (2, f"error: checkpoint folder not found: {tmp_path / 'nothing'}\n")


def test_print_config_shows_every_default_and_can_be_run_again(tmp_path, command):
    code, out, _ = command("--print-config", "--config", tiny_yaml(tmp_path), "tokenizer.args.width=5")
    assert code == 0 and "width: 5" in out and "registers: 4" in out and "jitter: true" in out
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(out)
    assert command("--config", tmp_path / "again.yaml", "--print-config")[1] == out


def test_help_shows_examples_and_components(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "python train.py --config configs/digits/gpt.yaml tokenizer=" in out
    assert "flextok" in out and "digits" in out


def test_a_run_prints_a_header_and_one_live_line(tmp_path, command):
    code, out, err = command("--config", tiny_yaml(tmp_path))
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["train", "data", "updates", "output", "finished"]
    assert err.count("\n") == 1 and "8/8" in err
    load_tokenizer(tmp_path / "run")
    assert (tmp_path / "run" / "run.yaml").read_text().startswith("# ")
    assert command("--config", tmp_path / "run" / "run.yaml")[0] == 2
    assert command("--config", tmp_path / "run" / "run.yaml", "resume=auto")[0] == 0


def test_sigterm_to_the_whole_job_saves_and_exits_143(tmp_path):
    """As a cluster sends it: to the loader's process too."""
    config, run = tiny_yaml(tmp_path), tmp_path / "run"
    overrides = ["trainer.max_updates=1000000", "log.every_updates=10", "data.workers=1"]
    process = start_process("train.py", "--config", str(config), *overrides)
    deadline = time.monotonic() + 60
    while not (run / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("SIGTERM: saved update ")
    state = read_state(run)
    assert state["updates"] >= 4 and state["images"] == 4 * state["updates"]
    load_tokenizer(run)
