"""A run: one config in, one folder out.

output/run.yaml            resolved config
output/last.ckpt           everything needed to go on (raw weights, averaged weights, optimizer, counters)
output/model.safetensors   averaged weights; with config.yaml and spec.json the folder is an export
output/metrics.csv  tb/  pictures/
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import MISSING
from torch import Tensor, nn

import vistok
from vistok.checkpoint import (
    WEIGHTS,
    export,
    export_hash,
    export_info,
    load_strictly,
    load_tokenizer,
    seen_from,
    write_atomically,
)
from vistok.cli import quiet_libraries
from vistok.config import Component, build, component_config, parse_overrides, read_yaml, to_plain, to_yaml, typed
from vistok.data.code_cache import CodeCache, check_tokenizer
from vistok.data.datamodule import DataModule, Dataset
from vistok.data.latent_cache import LatentCache, check_vae
from vistok.errors import UserError, first_line
from vistok.interfaces import Autoencoder, Generator, TextEncoder, Tokenizer
from vistok.losses.adversarial import AdversarialConfig, Discriminator
from vistok.losses.perceptual import PerceptualConfig, PerceptualLoss
from vistok.rng import derive_seed
from vistok.training.callbacks import (
    Checkpoint,
    CheckpointFile,
    CsvLogger,
    Log,
    Pictures,
    ProgressLine,
    StopOnSignal,
    Validation,
    read_checkpoint,
)
from vistok.training.ema import Ema, EmaConfig, averaged
from vistok.training.optim import OptimConfig
from vistok.training.tasks import AdversarialTask, LossTask


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
        strategy: of Lightning; DDP variants are supported.
        compile: ``torch.compile`` the training pass.
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


RUN, LAST = "run.yaml", "last.ckpt"
LENGTHS = ("max_updates", "max_images", "max_epochs")
FREE_ON_RESUME = ("output", "trainer", "log", "checkpoint", "resume")
"""Parts of a config that a resumed run may change; others would silently not be what the weights were made with.

The tokenizer under a generator is known by its hash instead: its folder may have moved.
"""


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


def train(config: RunConfig) -> None:
    """Train what ``config`` describes, or go on with it, and leave an export in its folder.

    Raises:
        UserError: for input that cannot work, a folder that already holds a run, a checkpoint that does not fit, a
            full disk, or a loss that is not finite.
        SystemExit: 128 + signal number, after saving, if the process is told to stop.
    """
    _quiet()
    start = _find_checkpoint(config)
    state = None if start is None else read_checkpoint(start, mmap=True)
    torch.manual_seed(derive_seed("init", config.seed))
    net, tokenizer = _build_models(config)
    text_encoder = _build_text_encoder(config, net)
    size = net.spec.image_size_px
    perceptual = PerceptualLoss(config.perceptual, size) if config.perceptual else None
    discriminator = Discriminator(config.adversarial, size) if config.adversarial else None
    tokenizer_hash = None if tokenizer is None else export_hash(config.tokenizer)
    train_data, val_data = _build_data(config, net, tokenizer, tokenizer_hash)
    if state:
        models = {"net": net} | ({"discriminator": discriminator} if discriminator else {})
        _check_checkpoint(start, state, models, tokenizer_hash)
    elif isinstance(net, Generator) and tokenizer is not None:
        net.adopt(tokenizer)
    write_export = _exporter(config, net, train_data, tokenizer_hash)
    ema = Ema(config.ema.decay)
    checkpoint = Checkpoint(
        Path(config.output),
        config.checkpoint.every_updates,
        lambda task: write_export(averaged(task.net, ema.average), task.progress),
    )
    trainer = _make_trainer(config, net, ema, checkpoint, state["updates"] if state else 0)
    images_per_update = config.data.batch_size * trainer.world_size * config.trainer.accumulate
    max_updates = _max_updates(config.trainer, images_per_update, len(train_data))
    if state and state["updates"] >= max_updates:
        if trainer.is_global_zero:
            _finish(config, state, net, write_export)
        return

    make_task = LossTask if discriminator is None else partial(AdversarialTask, discriminator)
    task = make_task(net, config.optim, max_updates, config.seed, tokenizer, tokenizer_hash, text_encoder, perceptual)
    data = DataModule(
        train_data, val_data, config.data.batch_size, config.data.workers, config.seed, consumed=lambda: task.images
    )
    if trainer.is_global_zero:
        _write_run_yaml(config)
        _print_header(config, task, len(train_data), len(val_data), images_per_update, state)
    del state
    if config.trainer.compile:
        net.compile()  # in place: keys of the state dict stay what they are
    trainer.fit(task, data, ckpt_path=start)
    if trainer.is_global_zero:
        seconds = task.progress["seconds"]
        print(f"finished {config.output}: {task.updates} updates in {seconds:.0f} s, exported with averaged weights")


# ---------------------------------------------------------------------- building


def _build_models(config: RunConfig) -> tuple[Autoencoder | Generator, Tokenizer | None]:
    """The net to train, and the frozen tokenizer under it if it is a generator."""
    if config.generator is None:
        return build("tokenizers", Component(**config.tokenizer)), None
    tokenizer = load_tokenizer(config.tokenizer)
    return build("generators", config.generator, tokenizer.spec), tokenizer


def _build_text_encoder(config: RunConfig, net: Autoencoder | Generator) -> TextEncoder | None:
    """The frozen reader of captions, if ``net`` is conditioned on text.

    Raises:
        UserError: if it is missing, useless, or its states do not fit the net.
    """
    width = net.text_width if isinstance(net, Generator) else 0
    if config.text_encoder is None:
        if width:
            raise UserError(
                "this generator is conditioned on text: say what reads the captions, "
                "text_encoder.name=NAME text_encoder.args.path=FOLDER"
            )
        return None
    if not width:
        raise UserError("text_encoder is for a generator conditioned on text, and this run trains none: leave it out")
    text_encoder: TextEncoder = build("text_encoders", config.text_encoder)
    if text_encoder.width != width:
        raise UserError(
            f"the text encoder's states have {text_encoder.width} channels but the generator reads {width}: "
            f"set generator.args.text_width={text_encoder.width}"
        )
    return text_encoder


def _build_data(
    config: RunConfig, net: Autoencoder | Generator, tokenizer: Tokenizer | None, tokenizer_hash: str | None
) -> tuple[Dataset, Dataset]:
    """Training and validation data at the size of the net's images.

    Raises:
        UserError: if the generator knows fewer classes than the data has or is conditioned on text that the data lacks,
            or cached codes are of another tokenizer or cached latents of another VAE.
    """
    component = Component(config.data.name, config.data.args)
    train_data, val_data = (build("data", component, split, net.spec.image_size_px) for split in ("train", "val"))
    if isinstance(train_data, CodeCache):
        if tokenizer_hash is None:
            raise UserError(f"data: a tokenizer is trained on images, {config.data.name} holds codes")
        check_tokenizer(train_data, tokenizer_hash)
    reader = net if isinstance(net, Autoencoder) else tokenizer
    if isinstance(train_data, LatentCache) and reader is not None:
        check_vae(train_data, reader)
    if isinstance(net, Generator) and 0 < net.num_classes < train_data.num_classes:
        raise UserError(
            f"the data has {train_data.num_classes} classes but the generator {net.num_classes}: "
            f"set generator.args.num_classes={train_data.num_classes}"
        )
    if isinstance(net, Generator) and net.text_width and not _has_captions(train_data):
        raise UserError(f"data: {config.data.name} has no captions, and this generator is conditioned on text")
    return train_data, val_data


def _has_captions(data: Dataset) -> bool:
    """Whether any of the first samples has one."""
    return any(data.get(index)["text"] for index in range(min(len(data), 16)))


def _exporter(
    config: RunConfig, net: Autoencoder | Generator, data: Dataset, tokenizer_hash: str | None
) -> Callable[[dict[str, Tensor], dict[str, float]], None]:
    """Writes given weights, and the progress that made them, as the run's export."""
    component, kind = config.generator or Component(**config.tokenizer), "tokenizer"
    helpers, dropped = (net.frozen_helpers, net.training_only) if isinstance(net, Autoencoder) else (None, ())
    component = Component(component.name, {key: value for key, value in component.args.items() if key not in dropped})
    details: dict[str, Any] = {"weights": "ema", "ema_decay": config.ema.decay, "data": data.description}
    if config.generator is not None:
        kind = "generator"
        details["tokenizer"] = os.path.relpath(config.tokenizer, config.output)
        details["tokenizer_hash"] = tokenizer_hash
        details["num_classes"], details["class_names"] = net.num_classes, data.class_names
    if config.text_encoder is not None:
        details["text_encoder"] = to_plain(seen_from(config.output, config.text_encoder))

    def write(weights: dict[str, Tensor], progress: dict[str, float]) -> None:
        weights = {key: value for key, value in weights.items() if key.split(".")[0] not in dropped}
        export(config.output, kind, component, net.spec, weights, {**progress, **details}, helpers)

    return write


def _make_trainer(
    config: RunConfig, net: Autoencoder | Generator, ema: Ema, checkpoint: Checkpoint, resumed_at: int
) -> L.Trainer:
    """Lightning's trainer, with nothing on that our callbacks do themselves.

    Raises:
        UserError: if this machine lacks the devices, or they the precision.
    """
    output, trainer, every = Path(config.output), config.trainer, config.log
    log = Log(every.every_updates, net.spec)
    callbacks = [  # in this order: the average first, the one that ends the run last
        ema,
        log,
        Validation(trainer.val_every_updates, ema),
        Pictures(output / "pictures", every.pictures_every_updates, ema),
        checkpoint,
        ProgressLine(log),
        StopOnSignal(checkpoint),
    ]
    purge_step = resumed_at + 1 if resumed_at else None
    board = TensorBoardLogger(output, name="", version="tb", default_hp_metric=False, purge_step=purge_step)
    try:
        return L.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=trainer.strategy,
            precision=trainer.precision,
            accumulate_grad_batches=trainer.accumulate,
            max_epochs=-1,
            limit_val_batches=0,
            logger=[CsvLogger(output / "metrics.csv", resumed_at), board],
            callbacks=callbacks,
            plugins=[CheckpointFile()],
            default_root_dir=output,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {first_line(error)}") from None


def _max_updates(config: TrainerConfig, images_per_update: int, images_per_epoch: int) -> int:
    """Length of the run in updates; a part of an update counts as one."""
    if config.max_updates is not None:
        return config.max_updates
    if config.max_images is not None:
        return math.ceil(config.max_images / images_per_update)
    return math.ceil((config.max_epochs or 0) * images_per_epoch / images_per_update)


# ---------------------------------------------------------------------- resuming


def _find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        UserError: if there is none where ``resume`` says, it is of a different run, or a fresh run would
            overwrite one.
    """
    last = Path(config.output) / LAST
    start = None
    if config.resume == "auto":
        start = last if last.exists() else None
    elif config.resume is not None:
        start = Path(config.resume)
        start = start / LAST if start.is_dir() else start
        if not start.is_file():
            raise UserError(f"resume: checkpoint not found: {start}")
    if config.resume != "auto" and (start is None or start.resolve() != last.resolve()):
        _refuse_used_folder(last.parent)
    if start is not None and (start.parent / RUN).is_file():
        _check_same_run(config, start.parent / RUN)
    return start


@rank_zero_only  # the other processes may ask after this one has begun to write
def _refuse_used_folder(output: Path) -> None:
    # A run.yaml alone is what a start that failed before its first checkpoint leaves: nothing is lost by another.
    if (output / LAST).exists() or (output / WEIGHTS).exists():
        raise UserError(f"{output} already holds a run: go on with it by resume=auto, or give another output=")


def _check_same_run(config: RunConfig, path: Path) -> None:
    """Raise UserError if ``config`` differs from the run in ``path`` in what a resumed run cannot change."""
    # Read as a config, an old run has today's default for an option that is younger than it: what was done then.
    before, now = (yaml.safe_load(to_yaml(run)) for run in (load_config(path, []), config))
    for part in (before, now):
        part.get("data", {}).pop("workers", None)
        if config.generator is not None:
            part.pop("tokenizer", None)
    for name in [key for key in now if key not in FREE_ON_RESUME]:
        difference = _first_difference(name, before.get(name), now.get(name))
        if difference is not None:
            raise UserError(f"cannot resume: {difference} (see {path}); give another output= for a new run")


def _check_checkpoint(
    path: Path | None, state: dict[str, Any], models: Mapping[str, nn.Module], tokenizer_hash: str | None
) -> None:
    """Raise UserError unless the checkpoint holds just these models, trained on the tokens of that tokenizer."""
    held: dict[str, dict[str, Tensor]] = {}
    for key, value in state["state_dict"].items():
        model, _, name = key.partition(".")
        held.setdefault(model, {})[name] = value
    if held.keys() != models.keys():
        raise UserError(f"cannot resume {path}: it holds {' and '.join(held)}, this run trains {' and '.join(models)}")
    for model, weights in held.items():
        load_strictly(models[model], weights, str(path))
    before = state["tokenizer_hash"]
    if before != tokenizer_hash:
        raise UserError(
            f"cannot resume {path}: it was trained on the tokenizer of hash {str(before)[:12]}, "
            f"this one has {str(tokenizer_hash)[:12]}"
        )


def _first_difference(key: str, before: Any, now: Any) -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        parts = (_first_difference(f"{key}.{k}", before.get(k), now.get(k)) for k in {**before, **now})
        return next((part for part in parts if part), None)
    return None if before == now else f"{key} is {now}, the run was started with {before}"


def _finish(
    config: RunConfig, state: dict[str, Any], net: Autoencoder | Generator, write_export: Callable[..., None]
) -> None:
    """Say that the run has nothing left to do; repair its export if the last one was interrupted."""
    progress = {name: state[name] for name in ("updates", "images", "seconds")}
    try:
        is_exported = export_info(config.output).get("updates") == progress["updates"]
    except UserError:
        is_exported = False
    if not is_exported:
        write_export(averaged(net, state["callbacks"]["ema"]), progress)
    print(f"{config.output} is finished: {progress['updates']} updates, {progress['images']} images")


# ---------------------------------------------------------------------- config and console


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
    checks = {
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


def _write_run_yaml(config: RunConfig) -> None:
    """The resolved config, with the command and versions that made the run as comments."""
    head = f"# {shlex.join(sys.argv)}\n# vistok {vistok.__version__} ({_commit()}), torch {torch.__version__}\n"
    write_atomically(Path(config.output) / RUN, lambda path: path.write_text(head + to_yaml(config)))


def _commit() -> str:
    command = ["git", "-C", str(Path(vistok.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"


def _print_header(
    config: RunConfig, task: LossTask, num_train: int, num_val: int, images_per_update: int, state: dict | None
) -> None:
    net = task.net
    what = f"tokenizer {config.tokenizer['name']}" if config.generator is None else f"generator {config.generator.name}"
    under = "" if config.generator is None else f" on tokens of {config.tokenizer}"
    if config.adversarial:
        under = f", against a discriminator after {config.adversarial.start_update} updates"
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
    epochs = task.max_updates * images_per_update / num_train
    begins = f"continued at update {state['updates']}" if state else "from the start"
    length = f"{task.max_updates} of {images_per_update} images ({epochs:.1f} epochs)"
    print(f"train    {what}, {parameters / 1e6:.2f} M parameters{under}")
    print(f"data     {config.data.name}, {num_train} images of {net.spec.image_size_px} px, {num_val} for validation")
    print(f"updates  {length}, {config.trainer.precision}, {begins}")
    print(f"output   {config.output}", flush=True)


def _quiet() -> None:
    """Keep banners and hints that a user cannot act on off the screen."""
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*have no `validation_step`.*")  # Validation does it
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
