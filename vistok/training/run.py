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
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

import vistok
from vistok.checkpoint import WEIGHTS, export, export_hash, export_info, load_tokenizer, seen_from
from vistok.cli import quiet_libraries
from vistok.config import Component, build, to_plain, to_yaml
from vistok.data.code_cache import CodeCache, check_tokenizer
from vistok.data.datamodule import DataModule, Dataset, has_captions, ordered_batches
from vistok.data.latent_cache import LatentCache, check_vae
from vistok.data.text_states import TextStates, check_text_encoder
from vistok.errors import UserError, first_line
from vistok.files import write_text
from vistok.interfaces import Autoencoder, Generator, TextEncoder, Tokenizer
from vistok.key_maps import load_strictly
from vistok.losses.adversarial import Discriminator
from vistok.losses.perceptual import PerceptualLoss
from vistok.nn.compiler import check_compiler
from vistok.nn.transformer import recompute_blocks
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
from vistok.training.ema import Ema, averaged
from vistok.training.run_config import SHARDED, RunConfig, TrainerConfig, load_config
from vistok.training.sharding import ShardedStrategy
from vistok.training.tasks import AdversarialTask, LossTask

RUN, LAST = "run.yaml", "last.ckpt"
FREE_ON_RESUME = ("output", "trainer", "log", "checkpoint", "resume")
"""Parts of a config that a resumed run may change; others would silently not be what the weights were made with.

The tokenizer under a generator is known by its hash instead: its folder may have moved.
"""


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
    if config.trainer.activation_checkpointing:
        recompute_blocks(net)
    size = net.spec.image_size_px
    perceptual = PerceptualLoss(config.perceptual, size) if config.perceptual else None
    discriminator = Discriminator(config.adversarial, size) if config.adversarial else None
    tokenizer_hash = None if tokenizer is None else export_hash(config.tokenizer)
    train_data, val_data = _build_data(config, net, tokenizer, tokenizer_hash)
    text_encoder = _build_text_encoder(config, net, train_data)
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
        lambda task: write_export(averaged(task.net, ema.average), task.progress),  # all gather, the first writes
    )
    trainer = _make_trainer(config, net, ema, checkpoint, state["updates"] if state else 0)
    if config.trainer.compile:
        check_compiler("trainer.compile", trainer.strategy.root_device.type)
    images_per_update = config.data.batch_size * trainer.world_size * config.trainer.accumulate
    max_updates = _max_updates(config.trainer, images_per_update, len(train_data))
    if state and state["updates"] >= max_updates:
        if trainer.is_global_zero:
            _finish(config, state, net, write_export)
        return

    make_task = LossTask if discriminator is None else partial(AdversarialTask, discriminator)
    task = make_task(net, config.optim, max_updates, config.seed, tokenizer, tokenizer_hash, text_encoder, perceptual)
    if config.trainer.strategy == SHARDED:
        _check_even(len(val_data), config.data.batch_size, trainer.world_size)
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


def _build_text_encoder(config: RunConfig, net: Autoencoder | Generator, data: Dataset) -> TextEncoder | None:
    """The frozen reader of captions, if ``net`` is conditioned on text and ``data`` do not have the states already.

    Raises:
        UserError: if it is missing, useless, or its states do not fit the net or are not those of the data.
    """
    reader: TextEncoder | TextStates
    width, room = (net.text_width, net.text_positions) if isinstance(net, Generator) else (0, 0)
    if config.text_encoder is None:
        if width:
            raise UserError(
                "this generator is conditioned on text: say what reads the captions, "
                "text_encoder.name=NAME text_encoder.args.path=FOLDER"
            )
        return None
    if not width:
        raise UserError("text_encoder is for a generator conditioned on text, and this run trains none: leave it out")
    if isinstance(data, CodeCache) and data.text is not None:
        reader = data.text
        check_text_encoder(reader, config.text_encoder)
    else:
        reader = build("text_encoders", config.text_encoder)
    if reader.width != width:
        raise UserError(
            f"the text encoder's states have {reader.width} channels but the generator reads {width}: "
            f"set generator.args.text_width={reader.width}"
        )
    most = config.text_encoder.args.get("max_length", 0)
    if 0 < room < most:
        raise UserError(
            f"the text encoder reads up to {most} tokens of a caption but the generator has room for {room}: "
            f"set text_encoder.args.max_length={room} or generator.args.text_positions={most}"
        )
    return reader if isinstance(reader, TextEncoder) else None


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
    if isinstance(net, Generator) and net.text_width and not has_captions(train_data):
        raise UserError(f"data: {config.data.name} has no captions, and this generator is conditioned on text")
    return train_data, val_data


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

    @rank_zero_only
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
    sharded = trainer.strategy == SHARDED
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
            strategy=ShardedStrategy() if sharded else trainer.strategy,
            precision=trainer.precision,
            accumulate_grad_batches=trainer.accumulate,
            max_epochs=-1,
            limit_val_batches=0,
            logger=[CsvLogger(output / "metrics.csv", resumed_at), board],
            callbacks=callbacks,
            plugins=[CheckpointFile(mmap=sharded)],
            default_root_dir=output,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {first_line(error)}") from None


def _check_even(count: int, batch_size: int, world_size: int) -> None:
    """Raise UserError unless all processes validate as many batches, for each of which they gather weights together."""
    if len({len(ordered_batches(count, batch_size, rank, world_size)) for rank in range(world_size)}) > 1:
        raise UserError(
            f"{count} validation samples make no equal numbers of batches of {batch_size} for the {world_size} "
            f"processes that trainer.strategy={SHARDED} keeps in step: give a larger data.batch_size"
        )


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


# ---------------------------------------------------------------------- console


def _write_run_yaml(config: RunConfig) -> None:
    """The resolved config, with the command and versions that made the run as comments."""
    head = f"# {shlex.join(sys.argv)}\n# vistok {vistok.__version__} ({_commit()}), torch {torch.__version__}\n"
    write_text(Path(config.output) / RUN, head + to_yaml(config))


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
