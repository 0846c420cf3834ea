"""Whole runs of a tiny tokenizer in this process."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch

from tiny_models.args import TINY_ARGS
from tiny_models.generator import TinyGenerator
from tiny_models.runs import assert_same, read_state, rows, tiny_run
from tiny_models.tokenizer import TinyTokenizer
from vistok.checkpoint import export_hash, export_info, load_generator, load_tokenizer
from vistok.errors import UserError
from vistok.training import callbacks
from vistok.training.run import train
from vistok.training.tasks import LossTask


@pytest.fixture
def spy(monkeypatch):
    """Keys of the samples of every micro-batch, in order; ``spy.kill_at`` sends SIGTERM during that micro-batch."""

    class Spy(list):
        kill_at = None

    seen, original = Spy(), LossTask.training_step

    def training_step(self, batch, batch_idx):
        seen.append(batch["key"])
        if len(seen) == seen.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LossTask, "training_step", training_step)
    return seen


def folder(path, name):
    (path / name).mkdir()
    return path / name


JUDGED = ("adversarial.layers=1", "adversarial.width=4")
FLEXTOK = json.dumps({"name": "flextok", "args": TINY_ARGS["tokenizers"]["flextok"]})
RESUMED = {
    "plain": (),
    "judged_before": (*JUDGED, "adversarial.start_update=3"),
    "judged_after": (*JUDGED, "adversarial.start_update=6"),
    "muon": ("optim.name=muon", f"tokenizer={FLEXTOK}"),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("variant", RESUMED)
def test_resume_repeats_an_uninterrupted_run_bit_for_bit(tmp_path, spy, accumulate, variant):
    a, b = folder(tmp_path, "a"), folder(tmp_path, "b")
    options = [f"trainer.accumulate={accumulate}", *RESUMED[variant]]
    train(tiny_run(a, *options))
    straight = list(spy)
    assert len(straight) == 8 * accumulate

    spy.clear()
    spy.kill_at = 5 * accumulate - accumulate + 1  # the first micro-batch of the fifth update
    with pytest.raises(SystemExit) as stop:
        train(tiny_run(b, *options))
    assert stop.value.code == 143
    assert read_state(b / "run")["updates"] == 5
    train(tiny_run(b, *options, "resume=auto"))

    assert list(spy) == straight
    whole, resumed = read_state(a / "run"), read_state(b / "run")
    for state in (whole, resumed):
        del state["global_step"], state["seconds"]  # Lightning's own count of this process, and the clock
    assert (whole["updates"], whole["images"]) == (8, 8 * 4 * accumulate)
    assert_same(whole, resumed)
    assert rows(a / "run") == rows(b / "run")
    if variant != "muon":  # of which the tokenizer does not count
        assert int(whole["state_dict"]["net.seen"]) == 8 * 4 * accumulate


def test_dropout_and_loss_draws_differ_between_updates(tmp_path, monkeypatch):
    draws = []
    original = TinyTokenizer.training_loss

    def training_loss(self, images, rng):
        if self.training:
            draws.append((torch.rand(1).item(), rng.initial_seed()))
        return original(self, images, rng)

    monkeypatch.setattr(TinyTokenizer, "training_loss", training_loss)
    train(tiny_run(tmp_path, "trainer.accumulate=2", "trainer.max_updates=3"))
    assert len({layer for layer, _ in draws}) == len({loss for _, loss in draws}) == 6


def test_non_finite_loss_stops_before_the_update_and_names_the_term(tmp_path):
    config = tiny_run(tmp_path, "tokenizer.args.nan_after_images=12", "checkpoint.every_updates=1")
    with pytest.raises(UserError, match=r"loss term 'pixel' is nan at update 4") as error:
        train(config)
    assert "\n" not in str(error.value)
    state = read_state(tmp_path / "run")
    assert state["updates"] == 3
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_non_finite_gradient_stops_before_the_update(tmp_path, monkeypatch):
    weights, original = [], TinyTokenizer.training_loss

    def training_loss(self, images, rng):
        report = original(self, images, rng)
        if self.training:
            weights.append(self.decoder.weight)
            report.total = report.total + (self.decoder.weight * 0).sqrt().sum()  # zero, with an infinite gradient
        return report

    monkeypatch.setattr(TinyTokenizer, "training_loss", training_loss)
    with pytest.raises(UserError, match="the gradient norm is nan at update 1"):
        train(tiny_run(tmp_path))
    assert weights[0].isfinite().all()


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    saves, original = [], torch.save

    def save(state, file):
        saves.append(file)
        if len(saves) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match=r"last\.ckpt: .*No space left on device"):
        train(tiny_run(tmp_path, "checkpoint.every_updates=3"))
    assert len(saves) == 2
    assert read_state(tmp_path / "run")["updates"] == 3
    assert not list((tmp_path / "run").glob("*partial*")) and not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()
    train(tiny_run(tmp_path, "resume=auto"))
    assert read_state(tmp_path / "run")["updates"] == 8


def test_export_holds_the_averaged_weights(tmp_path):
    train(tiny_run(tmp_path, "ema.decay=0.5"))
    state, model = read_state(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    assert not torch.equal(model.decoder.weight, state["state_dict"]["net.decoder.weight"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state["callbacks"]["ema"][name])
    assert int(model.seen) == 32
    info = export_info(tmp_path / "run")
    assert (info["updates"], info["images"], info["weights"]) == (8, 32, "ema")


def test_a_finished_run_returns_at_once_and_repairs_its_export(tmp_path, capsys, spy):
    train(tiny_run(tmp_path))
    digest = export_hash(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    spy.clear()
    capsys.readouterr()
    train(tiny_run(tmp_path, "resume=auto"))
    assert capsys.readouterr().out.strip().endswith("is finished: 8 updates, 32 images")
    assert not spy
    assert export_hash(tmp_path / "run") == digest


def test_a_generator_trains_on_a_frozen_tokenizer(tmp_path, spy):
    train(tiny_run(tmp_path))
    tokenizer = tmp_path / "run"
    digest = export_hash(tokenizer)
    overrides = ("generator.name=tiny_models.generator", f"tokenizer={tokenizer}", f"output={tmp_path / 'generator'}")
    train(tiny_run(tmp_path, *overrides, "log.pictures_every_updates=8", "optim.lr=0.3", "ema.decay=0"))

    state = read_state(tmp_path / "generator")
    assert set(state["state_dict"]) == {"net.table.weight"} == {f"net.{name}" for name in state["callbacks"]["ema"]}
    assert export_hash(tokenizer) == digest
    info = export_info(tmp_path / "generator")
    assert info["tokenizer_hash"] == digest
    assert (tmp_path / "generator" / info["tokenizer"]).resolve() == tokenizer.resolve()
    assert isinstance(load_generator(tmp_path / "generator"), TinyGenerator)
    assert (tmp_path / "generator" / "pictures" / "update_00000008.png").is_file()
    history = [float(row["val/loss"]) for row in rows(tmp_path / "generator") if row["val/loss"]]
    assert history[-1] < history[0]


def test_a_generator_with_too_few_classes_is_refused(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    overrides = ("generator.name=tiny_models.generator", f"tokenizer={tmp_path / 'run'}", f"output={tmp_path / 'g'}")
    with pytest.raises(UserError, match=r"10 classes .* set generator\.args\.num_classes=10"):
        train(tiny_run(tmp_path, *overrides, "generator.args.num_classes=3"))


def test_compiling_changes_neither_keys_nor_results(tmp_path, monkeypatch):
    a, b = folder(tmp_path, "a"), folder(tmp_path, "b")
    train(tiny_run(a, "tokenizer.args.dropout=0"))
    compiled = []

    def compile_eagerly(self):  # the real backend wants a C++ compiler and its time
        compiled.append(self)
        torch.nn.Module.compile(self, backend="eager")

    monkeypatch.setattr(TinyTokenizer, "compile", compile_eagerly)
    train(tiny_run(b, "tokenizer.args.dropout=0", "trainer.compile=true"))
    assert compiled
    plain, fast = read_state(a / "run"), read_state(b / "run")
    torch.testing.assert_close(plain["state_dict"], fast["state_dict"])
    torch.testing.assert_close(plain["callbacks"]["ema"], fast["callbacks"]["ema"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.compile=true", "trainer.strategy=fsdp works with neither trainer.compile nor"),
        ("trainer.precision=16-mixed", "trainer.strategy=fsdp works with neither trainer.compile nor"),
        ("trainer.strategy=deepspeed", "must be auto, fsdp, ddp or a variant of it, got deepspeed"),
        ("data.batch_size=1", "297 validation samples make no equal numbers of batches of 1 for the 2 processes"),
    ],
)
def test_what_sharded_weights_do_not_go_with_is_refused(tmp_path, override, message):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    options = ("generator.name=tiny_models.generator", f"tokenizer={tmp_path / 'run'}", f"output={tmp_path / 'g'}")
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, *options, "trainer.strategy=fsdp", "trainer.devices=2", override))
    assert not (tmp_path / "g" / "run.yaml").exists()


def test_the_length_is_said_once(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=null", "trainer.max_images=10"))
    assert read_state(tmp_path / "run")["updates"] == 3
    with pytest.raises(
        UserError, match="exactly one of max_updates, max_images, max_epochs, got max_updates and max_epochs"
    ):
        tiny_run(tmp_path, "trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.args.width=16", "tokenizer.args.width is 16, the run was started with 8"),
        ("optim.lr=0.5", r"optim.lr is 0.5, the run was started with 0.01"),
        ("data.batch_size=8", "data.batch_size is 8"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, "resume=auto", change))


@pytest.mark.parametrize(
    "wrong",
    ["optim.clip_norm=-1", "optim.lr=-1", "optim.betas=[2,1]", "optim.warmup_updates=-5", "data.workers=-1"],
)
def test_numbers_outside_their_range_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        tiny_run(tmp_path, wrong)


def test_a_run_older_than_an_option_can_be_resumed(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    path = tmp_path / "run" / "run.yaml"
    path.write_text(path.read_text().replace("    dropout: 0.1\n", ""))
    assert "dropout" not in path.read_text()
    with pytest.raises(UserError, match=r"dropout is 0\.5, the run was started with 0\.1"):
        train(tiny_run(tmp_path, "resume=auto", "tokenizer.args.dropout=0.5"))
    train(tiny_run(tmp_path, "resume=auto"))
    assert read_state(tmp_path / "run")["updates"] == 8


def test_a_start_that_failed_does_not_block_the_next(tmp_path):
    with pytest.raises(UserError, match="nan"):
        train(tiny_run(tmp_path, "tokenizer.args.nan_after_images=1"))
    train(tiny_run(tmp_path))
    assert read_state(tmp_path / "run")["updates"] == 8


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    (tmp_path / "run" / "run.yaml").unlink()
    new = (f"resume={tmp_path / 'run'}", f"output={tmp_path / 'new'}", "tokenizer.args.registers=3")
    with pytest.raises(UserError, match=r"does not fit TinyTokenizer: .*decoder\.weight") as error:
        train(tiny_run(tmp_path, *new))
    assert "\n" not in str(error.value) and not (tmp_path / "new" / "run.yaml").exists()


def test_a_generator_does_not_go_on_with_another_tokenizer(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    train(tiny_run(tmp_path, "trainer.max_updates=1", "seed=1", f"output={tmp_path / 'other'}"))
    overrides = ["generator.name=tiny_models.generator", f"output={tmp_path / 'generator'}"]
    train(tiny_run(tmp_path, *overrides, f"tokenizer={tmp_path / 'run'}", "trainer.max_updates=1"))
    with pytest.raises(UserError, match="was trained on the tokenizer of hash"):
        train(tiny_run(tmp_path, *overrides, f"tokenizer={tmp_path / 'other'}", "resume=auto"))
    train(tiny_run(tmp_path, *overrides, f"tokenizer={tmp_path / 'moved'}", "resume=auto"))
    assert read_state(tmp_path / "generator")["updates"] == 8


def test_a_used_folder_needs_resume(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    with pytest.raises(UserError, match="already holds a run: go on with it by resume=auto"):
        train(tiny_run(tmp_path))


def test_going_on_from_a_path_leaves_the_old_run_alone(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=2"))
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    train(tiny_run(tmp_path, f"resume={tmp_path / 'run'}", f"output={tmp_path / 'new'}"))
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert read_state(tmp_path / "new")["updates"] == 8
    with pytest.raises(UserError, match="checkpoint not found"):
        train(tiny_run(tmp_path, "resume=nowhere.ckpt", f"output={tmp_path / 'newer'}"))


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    train(tiny_run(tmp_path, "trainer.max_updates=1"))
    path = tmp_path / "run" / "last.ckpt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"last\.ckpt is truncated or no checkpoint of a run") as error:
        train(tiny_run(tmp_path, "resume=auto"))
    assert "\n" not in str(error.value)


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    train(tiny_run(tmp_path, "trainer.max_updates=4", "optim.schedule=constant"))
    expected = rows(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "crashed")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="nan"):  # rows of updates 3, 4, ... were written, the checkpoint is of update 2
        train(
            tiny_run(
                tmp_path, "checkpoint.every_updates=2", "optim.schedule=constant", "tokenizer.args.nan_after_images=13"
            )
        )
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("torn ro")
    logger = callbacks.CsvLogger(tmp_path / "run" / "metrics.csv", resumed_at=2)
    logger.log_metrics({"train/loss": 1.0, "new/column": 2.0}, step=3)
    after = rows(tmp_path / "run")
    assert [row["update"] for row in after] == ["1", "2", "3"]
    assert after[0]["train/loss"] == expected[0]["train/loss"] and after[0]["new/column"] == ""
    assert after[2]["new/column"] == "2.0"


def test_codebook_statistics_cover_one_window(tmp_path):
    train(tiny_run(tmp_path, "log.every_updates=4", "trainer.val_every_updates=100"))
    logged = rows(tmp_path / "run")
    assert [row["update"] for row in logged] == ["4", "8", "8"]  # the last is the final validation
    assert 0 < float(logged[0]["train/codebook_usage"]) <= 1
    assert 1 <= float(logged[0]["train/codebook_perplexity"]) <= 6
    assert float(logged[1]["train/images"]) == 32
