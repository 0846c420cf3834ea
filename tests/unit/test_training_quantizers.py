"""Runs whose codebook learns without gradients: from the first batch, from moving averages, from unused entries."""

import json
import os
import signal

import pytest

from tiny_models.args import TINY_ARGS
from tiny_models.runs import assert_same, read_state, rows, tiny_run
from vistok.training.run import train
from vistok.training.tasks import LossTask

ARGS = TINY_ARGS["tokenizers"]["vqgan"] | {
    "scales": [1, 2, 4],
    "scale_drop": 0.5,
    "codebook": {"ema_decay": 0.8, "kmeans": True, "revive_after": 2},
}


def run(folder, *options):
    args = [f"tokenizer.args.{name}={json.dumps(value)}" for name, value in ARGS.items()]
    return tiny_run(folder, "tokenizer.name=vqgan", *args, *options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(run(folder))
    return folder / "run"


def test_resume_repeats_an_uninterrupted_run_bit_for_bit(straight, tmp_path, monkeypatch):
    original, seen = LossTask.training_step, []

    def training_step(self, batch, batch_idx):
        seen.append(batch["key"])
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LossTask, "training_step", training_step)
    with pytest.raises(SystemExit):
        train(run(tmp_path))
    train(run(tmp_path, "resume=auto"))
    assert len(seen) == 8
    state, expected = read_state(tmp_path / "run"), read_state(straight)
    for part in ("state_dict", "optimizer_states"):
        assert_same(state[part], expected[part])
    names = [name.rpartition(".")[2] for name in state["state_dict"]]
    assert {"_started", "_count", "_sum", "_idle"} <= set(names)


def test_log_rows_tell_scales_apart(straight):
    row = next(row for row in rows(straight) if row["train/loss"])
    for scale, positions in (("1x1", 1), ("2x2", 4), ("4x4", 16)):
        # One batch of 4 images.
        assert 0 < float(row[f"train/codebook_usage_scale_{scale}"]) <= min(1, 4 * positions / ARGS["vocab_size"])
        assert 1 <= float(row[f"train/codebook_perplexity_scale_{scale}"]) <= 4 * positions + 1e-6
    assert float(row["train/codebook_usage"]) > float(row["train/codebook_usage_scale_1x1"])
