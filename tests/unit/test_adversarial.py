"""The discriminator, its losses, and whole runs of the game on digits."""

import csv

import pytest
import torch

from tiny_models.runs import assert_same, read_state, rows, tiny_run
from tiny_models.tokenizer import Config, TinyTokenizer
from vistok.checkpoint import load_tokenizer
from vistok.errors import UserError
from vistok.losses.adversarial import (
    AdversarialConfig,
    Discriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
)
from vistok.rng import derive_seed, seeded_generator
from vistok.training import tasks
from vistok.training.run import train
from vistok.training.tasks import AdversarialTask

GAME = ("adversarial.width=4", "adversarial.layers=1")
"""For images of 8 px."""


def game(start, *more):
    return (*GAME, f"adversarial.start_update={start}", *more)


# ---------------------------------------------------------------------- discriminator and losses


def test_the_default_is_the_published_discriminator():
    net = Discriminator(AdversarialConfig(), 256).eval()
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = net(images)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_its_weights_begin_as_published():
    torch.manual_seed(0)
    net = Discriminator(AdversarialConfig(), 256)
    kernels = torch.cat([m.weight.flatten() for m in net if isinstance(m, torch.nn.Conv2d)])
    scales = torch.cat([m.weight for m in net if isinstance(m, torch.nn.BatchNorm2d)])
    assert kernels.std().item() == pytest.approx(0.02, rel=0.01)
    assert scales.mean().item() == pytest.approx(1, abs=0.01) and scales.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("layers", "least"), [(1, 6), (2, 12), (3, 24)])
def test_images_too_small_for_its_layers_are_refused(layers, least):
    config = AdversarialConfig(layers=layers, width=4)
    assert Discriminator(config, least)(torch.randn(2, 3, least, least)).shape[1] == 1
    with pytest.raises(
        UserError, match=rf"layers={layers} needs images of at least {least} px, these have {least - 1}"
    ):
        Discriminator(config, least - 1)


def test_losses_are_hinges():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 2 / 2))
    assert adversarial_loss(fake).item() == pytest.approx(1.0)
    assert discriminator_loss(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_frozen_it_hands_gradients_to_the_images_alone():
    net = Discriminator(AdversarialConfig(width=4, layers=1), 8)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    net.frozen(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    layer = torch.nn.Parameter(torch.randn(5, 3))
    before = torch.nn.Parameter(torch.ones(3))
    reconstruction = layer @ before
    losses = [3 * reconstruction.sum() + before.square().sum(), -0.5 * reconstruction.sum()]
    weight = adaptive_weight(*losses, layer)
    assert weight.item() == pytest.approx(6, rel=1e-4) and not weight.requires_grad
    assert adaptive_weight(losses[0], 0 * losses[1], layer).item() == 1e4
    sum(losses).backward()  # the graph is still there


# ---------------------------------------------------------------------- runs


def test_before_its_start_nothing_is_changed_and_nothing_judged(tmp_path):
    (tmp_path / "alone").mkdir()
    schedule = ("optim.schedule=constant", "optim.weight_decay=0.5")
    train(tiny_run(tmp_path / "alone", "trainer.max_updates=4", *schedule))
    train(tiny_run(tmp_path, "trainer.max_updates=4", *schedule, *game(4)))
    alone, idle = read_state(tmp_path / "alone" / "run"), read_state(tmp_path / "run")
    torch.manual_seed(derive_seed("init", 0))
    TinyTokenizer(Config())  # drawn first
    fresh = Discriminator(AdversarialConfig(width=4, layers=1), 8).state_dict()
    held = idle["state_dict"]
    judge = {key.removeprefix("discriminator."): held.pop(key) for key in list(held) if key.startswith("discr")}
    assert_same(judge, dict(fresh))
    assert_same(dict(alone["state_dict"]), dict(held))
    assert_same(alone["callbacks"]["ema"], idle["callbacks"]["ema"])
    assert_same(alone["optimizer_states"][0]["state"], idle["optimizer_states"][0]["state"])
    assert rows(tmp_path / "alone" / "run") == rows(tmp_path / "run")

    train(tiny_run(tmp_path, "trainer.max_updates=6", *schedule, *game(4), "resume=auto"))
    logged = rows(tmp_path / "run")
    judged = [bool(row["train/loss_discriminator"]) for row in logged if row["train/loss"]]
    assert judged == [False] * 4 + [True] * 2
    played = read_state(tmp_path / "run")["state_dict"]
    moving = [key for key in fresh if "bias" not in key]  # the last bias may well have no gradient
    assert not any(torch.equal(played[f"discriminator.{key}"], fresh[key]) for key in moving)


def test_both_get_their_own_gradient_and_are_clipped_apart(tmp_path, monkeypatch):
    noted, original = {}, AdversarialTask.clip_gradients

    def clip_gradients(task):
        noted["batch"] = task.batch
        noted["before"] = {name: p.grad.clone() for name, p in task.named_parameters()}
        norms = original(task)
        noted["after"] = {name: p.grad.clone() for name, p in task.named_parameters()}
        return norms

    monkeypatch.setattr(AdversarialTask, "clip_gradients", clip_gradients)
    monkeypatch.setattr(
        AdversarialTask, "on_train_batch_start", lambda task, batch, _: setattr(task, "batch", batch["image"])
    )
    train(tiny_run(tmp_path, "trainer.max_updates=1", "optim.clip_norm=0.01", *game(0), "adversarial.weight=2"))

    torch.manual_seed(derive_seed("init", 0))
    net = TinyTokenizer(Config())
    judge = Discriminator(AdversarialConfig(width=4, layers=1), 8)
    torch.manual_seed(derive_seed("layers", 0, "train", 0, 0, 0))
    report = net(noted["batch"], seeded_generator(0, "train", 0, 0, 0))
    (report.total - 2 * judge(report.reconstruction).mean()).backward()
    judge.zero_grad()
    fake = judge(report.reconstruction.detach())
    (0.5 * ((1 - judge(noted["batch"])).relu().mean() + (1 + fake).relu().mean())).backward()
    for prefix, model in (("net", net), ("discriminator", judge)):
        expected = {f"{prefix}.{name}": p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close({name: noted["before"][name] for name in expected}, expected)
        clipped = torch.stack([noted["after"][name].norm() for name in expected]).norm()
        assert clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_rows_and_files_of_a_run(tmp_path, monkeypatch):
    calls, original = [], Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward", lambda net, x: calls.append(len(x)) or original(net, x))
    train(tiny_run(tmp_path, *game(2), "adversarial.adaptive=true", "adversarial.lr=0.004", "log.every_updates=2"))
    assert len(calls) == 3 * 6, "validation and pictures do not ask it"
    before, after = [row for row in rows(tmp_path / "run") if row["train/loss"]][:2]
    names = ["loss_adversarial", "loss_discriminator", "logits_real", "logits_fake", "grad_norm_discriminator"]
    for name in [*names, "adversarial_weight"]:
        assert not before[f"train/{name}"] and torch.tensor(float(after[f"train/{name}"])).isfinite()
    terms = [float(after[f"train/loss_{name}"]) for name in ("pixel", "spread", "adversarial")]
    assert float(after["train/loss"]) == pytest.approx(sum(terms), rel=1e-5), "the tokenizer's loss alone"

    state = read_state(tmp_path / "run")
    groups = state["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == [0.01, 0.01, 0.004, 0.004]
    assert any(key.startswith("discriminator.") for key in state["state_dict"])
    assert not any(key.startswith("discriminator") for key in state["callbacks"]["ema"])
    assert isinstance(load_tokenizer(tmp_path / "run"), TinyTokenizer), "strict: the export has the tokenizer alone"


def test_it_learns_to_tell_reconstructions_from_images(tmp_path):
    train(tiny_run(tmp_path, *game(0), "trainer.max_updates=40", "log.every_updates=10", "adversarial.weight=1e-6"))
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss_discriminator"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_trains_it_too(tmp_path):
    train(tiny_run(tmp_path, *game(1), "trainer.precision=bf16-mixed", "trainer.max_updates=3", "trainer.accumulate=2"))
    assert all(value.isfinite().all() for value in read_state(tmp_path / "run")["state_dict"].values())


@pytest.mark.parametrize(("function", "term"), [("adversarial_loss", "adversarial"), ("discriminator_loss", "discr")])
def test_non_finite_losses_of_the_game_stop_before_the_update(tmp_path, monkeypatch, function, term):
    original = getattr(tasks, function)
    monkeypatch.setattr(tasks, function, lambda *logits: original(*logits) * float("nan"))
    with pytest.raises(UserError, match=rf"loss term '{term}\w*' is nan at update 3"):
        train(tiny_run(tmp_path, *game(2), "checkpoint.every_updates=1"))
    state = read_state(tmp_path / "run")
    assert state["updates"] == 2
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_a_non_finite_gradient_says_whose_it_is(tmp_path, monkeypatch):
    original = tasks.discriminator_loss
    monkeypatch.setattr(tasks, "discriminator_loss", lambda r, f: original(r, f) + ((f - f.detach()) * 0).sum().sqrt())
    with pytest.raises(UserError, match="the gradient norm of the discriminator is nan at update 1"):
        train(tiny_run(tmp_path, *game(0)))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["adversarial.weight=0"], r"adversarial\.weight must be positive"),
        (["adversarial.start_update=-1"], r"adversarial\.start_update must be at least 0"),
        (["adversarial.width=0"], r"adversarial\.width must be at least 1"),
        (["adversarial.layers=0"], r"adversarial\.layers must be at least 1"),
        (["adversarial.lr=0"], r"adversarial\.lr must be positive"),
        (["adversarial.layer=2"], "did you mean 'layers'"),
        (["adversarial.layers=3"], "needs images of at least 24 px, these have 8"),
        (["adversarial.adaptive=true", "trainer.precision=16-mixed"], "adaptive works with neither"),
        (["adversarial.adaptive=true", "trainer.compile=true"], "adaptive works with neither"),
        (["generator.name=tiny_models.generator", "tokenizer=somewhere"], "this run trains a generator"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        train(tiny_run(tmp_path, *game(1), *wrong))
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_a_tokenizer_that_shows_no_reconstruction_is_refused(tmp_path, monkeypatch):
    original = TinyTokenizer.training_loss

    def training_loss(self, images, rng):
        report = original(self, images, rng)
        report.reconstruction = None
        return report

    monkeypatch.setattr(TinyTokenizer, "training_loss", training_loss)
    with pytest.raises(UserError, match="TinyTokenizer reports no reconstruction"):
        train(tiny_run(tmp_path, *game(1000)))


def test_an_adaptive_weight_needs_a_last_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTokenizer, "last_layer", None)
    with pytest.raises(UserError, match="TinyTokenizer names no last layer"):
        train(tiny_run(tmp_path, *game(1), "adversarial.adaptive=true"))


def test_a_run_keeps_its_game(tmp_path):
    train(tiny_run(tmp_path, *game(0), "trainer.max_updates=1"))
    with pytest.raises(UserError, match=r"adversarial\.weight is 2\.0, the run was started with 0\.5"):
        train(tiny_run(tmp_path, *game(0), "adversarial.weight=2", "resume=auto"))
    with pytest.raises(UserError, match="adversarial is None, the run was started with"):
        train(tiny_run(tmp_path, "resume=auto"))
    (tmp_path / "run" / "run.yaml").unlink()
    with pytest.raises(UserError, match=r"it holds net and discriminator, this run trains net$"):
        train(tiny_run(tmp_path, f"resume={tmp_path / 'run'}", f"output={tmp_path / 'new'}"))
