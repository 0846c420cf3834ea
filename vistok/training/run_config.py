"""What defines a run: the keys of its YAML file, and which values go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from vistok.config import Component, component_config, parse_overrides, read_yaml, to_plain, typed
from vistok.errors import UserError
from vistok.losses.adversarial import AdversarialConfig
from vistok.losses.perceptual import PerceptualConfig
from vistok.training.ema import EmaConfig
from vistok.training.optim import OptimConfig


@dataclass
class DataConfig:
    """Training data: a component of ``vistok.data`` and its loader.

    Args:
        name: module of ``vistok.data``.
        args: its arguments.
        batch_size: images of one process in one micro-batch.
        workers: loader processes of one process.
    """

    name: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    workers: int = 0


@dataclass
class TrainerConfig:
    """How long and on what; exactly one of the first three.

    Args:
        max_updates: length of the run in optimizer updates.
        max_images: the same in images over all processes.
        max_epochs: the same in passes over the training data.
        precision: of the forward pass.
        accumulate: micro-batches of one update.
        accelerator: where to train; ``auto`` takes a GPU if there is one.
        devices: processes on this machine, ``auto`` for one on each GPU.
        num_nodes: machines.
        strategy: ``auto``; ``ddp`` or another of Lightning's DDP variants; or ``fsdp``, which shares out a generator's
            weights, their average and the optimizer's states over the processes.
        compile: ``torch.compile`` the training pass.
        activation_checkpointing: keep only the inputs of transformer blocks and compute their insides once more in the
            backward pass: about a third more work for much less memory, and the same gradients.
        val_every_updates: updates between two validations.
    """

    max_updates: int | None = None
    max_images: int | None = None
    max_epochs: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: Any = 1
    num_nodes: int = 1
    strategy: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    val_every_updates: int = 1000


@dataclass
class LogConfig:
    """How often to log.

    Args:
        every_updates: updates of a row of ``metrics.csv``.
        pictures_every_updates: updates between two pictures.
    """

    every_updates: int = 50
    pictures_every_updates: int = 1000


@dataclass
class CheckpointConfig:
    """How often to save.

    Args:
        every_updates: updates between two writes of ``last.ckpt`` and the export.
    """

    every_updates: int = 1000


@dataclass
class RunConfig:
    """Everything that defines a run.

    Args:
        output: the run's folder.
        tokenizer: ``{name, args}`` of the tokenizer to train, or the folder of a trained one under a generator.
        generator: ``{name, args}`` of the generator to train; null trains the tokenizer.
        text_encoder: ``{name, args}`` of the frozen reader of captions under a generator conditioned on text.
        perceptual: LPIPS in the loss of a tokenizer; null leaves it out.
        adversarial: a discriminator against a tokenizer; null leaves it out.
        data: training data.
        optim: optimizer and schedule.
        ema: averaging.
        trainer: length, devices, precision.
        log: intervals of rows and pictures.
        checkpoint: interval of checkpoints.
        seed: names initial weights, order of the data and every draw.
        resume: null starts in a fresh folder; ``auto`` goes on from ``last.ckpt`` in ``output`` if there is one; a
            path goes on from that checkpoint (a file or a run's folder).
    """

    output: str = MISSING
    tokenizer: Any = MISSING
    generator: Component | None = None
    text_encoder: Component | None = None
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    resume: str | None = None


LENGTHS = ("max_updates", "max_images", "max_epochs")
SHARDED = "fsdp"


def load_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """The run in a YAML file with ``key=value`` overrides, all defaults of its components written out.

    Arguments belong to a name: where an override names another component, those in the file are void.

    Raises:
        UserError: for an unknown key, a wrong type, a missing value or parts that do not go together.
    """
    written, given = read_yaml(path), parse_overrides(overrides)
    for key, part in given.items():
        replaced = written.get(key)
        if (
            isinstance(part, dict)
            and isinstance(replaced, dict)
            and part.get("name") not in (None, replaced.get("name"))
        ):
            replaced.pop("args", None)
    config = typed(RunConfig, written, str(path), given)
    if config.generator is None:
        if not isinstance(config.tokenizer, dict):
            raise UserError(f"{path}: tokenizer must be {{name, args}} to train one, got {config.tokenizer!r}")
        tokenizer = _resolved("tokenizers", typed(Component, config.tokenizer, f"{path}: tokenizer"), path)
        config.tokenizer = {"name": tokenizer.name, "args": tokenizer.args}
    else:
        if not isinstance(config.tokenizer, str):
            raise UserError(
                f"{path}: a generator is trained on an exported tokenizer: give its folder, tokenizer=runs/..."
            )
        if config.perceptual or config.adversarial:
            raise UserError(f"{path}: perceptual and adversarial judge a tokenizer, this run trains a generator")
        config.generator = _resolved("generators", config.generator, path)
    if config.text_encoder is not None:
        config.text_encoder = _resolved("text_encoders", config.text_encoder, path)
    config.data.args = _resolved("data", Component(config.data.name, config.data.args), path).args
    _check_ranges(config, path)
    return config


def _resolved(kind: str, component: Component, where: str | Path) -> Component:
    return Component(component.name, to_plain(component_config(kind, component, str(where))))


def _check_ranges(config: RunConfig, where: str | Path) -> None:
    trainer = config.trainer
    given = [key for key in LENGTHS if getattr(trainer, key) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"{where}: trainer: give exactly one of {', '.join(LENGTHS)}, got {got}")
    at_least_one = {
        f"trainer.{given[0]}": math.ceil(getattr(trainer, given[0])),
        "trainer.accumulate": trainer.accumulate,
        "trainer.val_every_updates": trainer.val_every_updates,
        "data.batch_size": config.data.batch_size,
        "log.every_updates": config.log.every_updates,
        "log.pictures_every_updates": config.log.pictures_every_updates,
        "checkpoint.every_updates": config.checkpoint.every_updates,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{where}: {key} must be at least 1, got {value}")
    optim, adversarial = config.optim, config.adversarial
    adapts = adversarial is not None and adversarial.adaptive
    exact = not trainer.compile and trainer.precision != "16-mixed"
    sharded = trainer.strategy == SHARDED
    checks = {
        f"trainer.strategy must be auto, {SHARDED}, ddp or a variant of it, got {trainer.strategy}": sharded
        or trainer.strategy.split("_")[0] in ("auto", "ddp"),
        f"trainer.strategy={SHARDED} shares out a generator; a tokenizer is trained with ddp": not sharded
        or config.generator is not None,
        f"trainer.strategy={SHARDED} works with neither trainer.compile nor trainer.precision=16-mixed": exact
        or not sharded,
        "adversarial.adaptive works with neither trainer.compile nor trainer.precision=16-mixed": exact or not adapts,
        "ema.decay must lie in [0, 1)": 0 <= config.ema.decay < 1,
        "optim.lr must be positive": optim.lr > 0,
        "optim.betas must lie in [0, 1)": all(0 <= beta < 1 for beta in optim.betas),
        "optim.weight_decay must be at least 0": optim.weight_decay >= 0,
        "optim.warmup_updates must be at least 0": optim.warmup_updates >= 0,
        "optim.min_lr_ratio must lie in [0, 1]": 0 <= optim.min_lr_ratio <= 1,
        "optim.clip_norm must be positive (null never clips)": optim.clip_norm is None or optim.clip_norm > 0,
        "data.workers must be at least 0": config.data.workers >= 0,
    }
    for rule, holds in checks.items():
        if not holds:
            raise UserError(f"{where}: {rule}")
