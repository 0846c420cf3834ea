"""A tokenizer against a discriminator on two gloo processes, from before the game begins to after."""

import csv

import pytest
import torch

from tiny_models.runs import read_state, start_process, tiny_yaml
from tiny_models.tokenizer import Config, TinyTokenizer
from vistok.config import Component, build
from vistok.losses.adversarial import AdversarialConfig, Discriminator
from vistok.rng import derive_seed, seeded_generator

ACCUMULATE, START, UPDATES = 2, 1, 3
GAME = [f"adversarial.start_update={START}", "adversarial.layers=1", "adversarial.width=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    two = ["trainer.devices=2", "trainer.strategy=ddp", "data.args.jitter=false"]
    length = [f"trainer.max_updates={UPDATES}", f"trainer.accumulate={ACCUMULATE}"]
    process = start_process("tests/dist/ddp_worker.py", str(tiny_yaml(folder)), str(folder), *two, *length, *GAME)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def own_gradient(notes, rank, update):
    """Mean gradient of one rank's micro-batches of an update, of each loss by itself and from scratch."""
    models = torch.nn.ModuleDict(
        {"net": TinyTokenizer(Config()), "discriminator": Discriminator(AdversarialConfig(width=4, layers=1), 8)}
    )
    models.load_state_dict(models.state_dict() | notes["before"][update])  # buffers, which nothing reads, stay fresh
    net, judge = models["net"], models["discriminator"]
    data = build("data", Component("digits", {"jitter": False}), "train", 8)
    for micro in range(ACCUMULATE):
        keys = notes["keys"][update * ACCUMULATE + micro]
        images = torch.stack([data.get(int(key.split("/")[1]))["image"] for key in keys])
        stream = (0, "train", update, micro, rank)
        torch.manual_seed(derive_seed("layers", *stream))
        report = net(images, seeded_generator(*stream))
        adversarial = -0.5 * judge(report.reconstruction).mean()
        parameters = list(net.parameters())
        gradients = torch.autograd.grad((report.total + adversarial) / ACCUMULATE, parameters)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient + (0 if parameter.grad is None else parameter.grad)
        real, fake = judge(images), judge(report.reconstruction.detach())
        (0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean()) / ACCUMULATE).backward()
    return {name: p.grad for name, p in models.named_parameters()}


def test_both_gradients_are_the_mean_over_ranks(run):
    _, ranks = run
    own = [own_gradient(notes, rank, START) for rank, notes in enumerate(ranks)]
    assert not torch.allclose(own[0]["discriminator.0.weight"], own[1]["discriminator.0.weight"])
    assert own[0].keys() == ranks[0]["gradients"][START].keys()
    for name, gradient in ranks[0]["gradients"][START].items():
        torch.testing.assert_close(gradient, (own[0][name] + own[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_the_discriminator_waits_and_then_moves_alike_on_both(run):
    _, ranks = run
    for notes in ranks:
        waiting, first, last = (
            {name: w for name, w in weights.items() if name.startswith("discriminator")} for weights in notes["before"]
        )
        assert all(torch.equal(waiting[name], first[name]) for name in waiting)
        assert not torch.equal(first["discriminator.0.weight"], last["discriminator.0.weight"])
    parameters = ranks[0]["gradients"][0]
    assert all(torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]) for name in parameters)


def test_the_file_and_the_rows_are_whole(run):
    folder, ranks = run
    state = read_state(folder / "run")
    assert set(state["state_dict"]) == set(ranks[0]["weights"])
    assert state["updates"] == UPDATES
    with open(folder / "run" / "metrics.csv", newline="") as file:
        losses = [row["train/loss_discriminator"] for row in csv.DictReader(file) if row["train/loss"]]
    assert [bool(loss) for loss in losses] == [update >= START for update in range(UPDATES)]
