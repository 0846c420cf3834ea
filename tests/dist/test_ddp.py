"""Two gloo processes on the CPU: what they compute together is what one process would."""

import csv
import os
import signal
import time

import pytest
import torch

from tiny_models.runs import read_state, start_process, tiny_yaml
from tiny_models.tokenizer import Config, TinyTokenizer
from vistok.checkpoint import load_tokenizer
from vistok.config import Component, build
from vistok.rng import derive_seed, seeded_generator

TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.args.jitter=false"]
ACCUMULATE, BATCH, UPDATES = 2, 4, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    options = [f"trainer.max_updates={UPDATES}", f"trainer.accumulate={ACCUMULATE}", "log.every_updates=3"]
    process = start_process("tests/dist/ddp_worker.py", str(tiny_yaml(folder)), str(folder), *TWO, *options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def first_gradient(keys, rank):
    """The mean gradient of one rank's micro-batches of the first update, computed here from scratch."""
    torch.manual_seed(derive_seed("init", 0))
    net = TinyTokenizer(Config())
    data = build("data", Component("digits", {"jitter": False}), "train", 8)
    for micro in range(ACCUMULATE):
        images = torch.stack([data.get(int(key.split("/")[1]))["image"] for key in keys[micro]])
        stream = (0, "train", 0, micro, rank)
        torch.manual_seed(derive_seed("layers", *stream))
        (net(images, seeded_generator(*stream)).total / ACCUMULATE).backward()
    return {f"net.{name}": p.grad for name, p in net.named_parameters()}


def test_gradients_are_the_mean_over_ranks(run):
    _, ranks = run
    own = [first_gradient(notes["keys"], rank) for rank, notes in enumerate(ranks)]
    assert not torch.allclose(own[0]["net.decoder.weight"], own[1]["net.decoder.weight"])
    for name, gradient in ranks[0]["gradients"][0].items():
        torch.testing.assert_close(gradient, (own[0][name] + own[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_ranks_hold_the_same_weights(run):
    folder, ranks = run
    for update in range(UPDATES):
        for name, gradient in ranks[0]["gradients"][update].items():
            assert torch.equal(gradient, ranks[1]["gradients"][update][name])
    parameters = [name for name in ranks[0]["weights"] if name != "net.seen"]
    assert parameters and all(torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]) for name in parameters)
    saved = read_state(folder / "run")["state_dict"]
    assert set(saved) == set(ranks[0]["weights"]), "wrappers leave no trace in the keys"


def test_samples_are_disjoint_and_counted_once(run):
    folder, ranks = run
    keys = [[key for batch in notes["keys"] for key in batch] for notes in ranks]
    assert len(keys[0]) == len(keys[1]) == UPDATES * ACCUMULATE * BATCH
    assert len(set(keys[0] + keys[1])) == 2 * UPDATES * ACCUMULATE * BATCH
    expected = (UPDATES, 2 * UPDATES * ACCUMULATE * BATCH)
    assert [notes["counters"] for notes in ranks] == [expected, expected]
    state = read_state(folder / "run")
    assert (state["updates"], state["images"]) == expected


def test_metrics_cover_both_ranks(run):
    folder, ranks = run
    with open(folder / "run" / "metrics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    net = load_tokenizer(folder / "run")
    data = build("data", Component("digits", {}), "val", 8)
    assert [row["update"] for row in logged] == ["3", "3"]
    assert float(logged[0]["train/images"]) == ranks[0]["counters"][1]
    # One process that validates the same weights; only the noise of the loss is grouped into batches differently.
    images = torch.stack([data.get(index)["image"] for index in range(len(data))])
    with torch.no_grad():
        alone = net(images, seeded_generator("any")).total.item()
    assert float(logged[1]["val/loss"]) == pytest.approx(alone, rel=0.02)


def test_a_signal_to_one_rank_stops_both(tmp_path):
    options = ["trainer.max_updates=1000000", "trainer.val_every_updates=1000000"]
    process = start_process("train.py", "--config", str(tiny_yaml(tmp_path)), *TWO, *options)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err and err.count("SIGTERM: saved update") == 1
    state = read_state(tmp_path / "run")
    assert state["images"] == 2 * BATCH * state["updates"] > 0
