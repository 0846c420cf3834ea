"""What happens around the updates: validation, pictures, log rows, the progress line, checkpoints, signals.

Every callback acts when ``task.updated`` says that a micro-batch completed an update, and reads the task's own clocks.
"""

from __future__ import annotations

import csv
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from vistok.data.datamodule import Dataset, collate
from vistok.errors import UserError, first_line
from vistok.eval.codebook import CodebookUsage
from vistok.eval.reconstruction import picture_reconstruction
from vistok.files import write_atomically
from vistok.interfaces import NULL_CLASS, Autoencoder, ClassCondition, Condition, Generator, SampleOptions, Tokenizer
from vistok.pictures import labelled_grid, save_png
from vistok.pipeline import prefix_lengths, sample_images
from vistok.rng import seeded_generator
from vistok.tokens import TokenSpec
from vistok.training.ema import Ema
from vistok.training.tasks import LossTask
from vistok.training.throughput import peak_flops


def is_due(task: LossTask, every: int) -> bool:
    """Whether the update that just ended is one of every ``every``, or the last of the run."""
    return task.updated and (task.updates % every == 0 or task.updates >= task.max_updates)


@contextmanager
def evaluating(trainer: L.Trainer, task: LossTask, ema: Ema) -> Iterator[None]:
    """The net in eval mode with averaged weights, without gradients, at the precision of the run."""
    task.net.eval()
    try:
        with torch.no_grad(), ema.swapped(task), trainer.precision_plugin.forward_context():
            yield
    finally:
        task.net.train()


class Validation(L.Callback):
    """Logs ``val/loss``, the mean loss of the validation data with averaged weights and the same draws every time.

    Args:
        every: updates between two validations.
        ema: averaged weights.
    """

    def __init__(self, every: int, ema: Ema) -> None:
        self.every, self.ema = every, ema

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if not is_due(task, self.every):
            return
        total = torch.zeros(2, device=task.device)
        with evaluating(trainer, task, self.ema):
            for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
                batch = trainer.strategy.batch_to_device(batch)
                # The draws follow the samples, not the rank that happens to read them.
                rng = seeded_generator("val", task.seed, int(batch["position"][0]), device=task.device)
                count = len(batch["label"])
                total += torch.stack([task.objective(batch, rng).total.float() * count, total.new_tensor(count)])
        loss, count = trainer.strategy.reduce(total, reduce_op="sum").tolist()
        _log(trainer, task, {"val/loss": loss / count})


class Log(L.Callback):
    """Writes a row of means over the last ``every`` updates of all processes.

    Rows hold the loss and its terms, the net's statistics, learning rate, gradient norm before clipping, usage and
    perplexity of the codes of the window (of a multi-scale code also scale by scale), :func:`throughput`, and the share
    of time spent waiting for data (neither counts validation, pictures and checkpoints). ``latest`` is the last row.

    Args:
        every: updates of a window.
        spec: of the codes that the net reports.
    """

    def __init__(self, every: int, spec: TokenSpec) -> None:
        self.every = every
        self.usage = CodebookUsage(spec.vocab_sizes, spec.layout)
        self.latest: dict[str, float] = {}
        self._means = _Means()

    @override
    def on_train_start(self, trainer: L.Trainer, task: LossTask) -> None:
        self.usage.to(task.device)
        task.idle_since = time.perf_counter()
        self._open_window(task)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        self._started = time.perf_counter()
        self._waited_s += self._started - task.idle_since

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        report = task.report
        self._means.add({"loss": report.total, **{f"loss_{k}": v for k, v in report.terms.items()}, **report.stats})
        if report.tokens is not None:
            self.usage.update(report.tokens.ids)
        if task.updated:
            self._means.add(task.grad_norms)
        self._worked_s += time.perf_counter() - self._started
        if is_due(task, self.every):
            self.latest = self._row(trainer, task)
            _log(trainer, task, self.latest)
            self._open_window(task)

    def _open_window(self, task: LossTask) -> None:
        self._images = task.images
        self._waited_s = self._worked_s = 0.0

    def _row(self, trainer: L.Trainer, task: LossTask) -> dict[str, float]:
        row = self._means.pop(trainer)
        if self.usage.update_called:
            usage = self.usage.compute()
            for figure in ("usage", "perplexity"):
                row[f"codebook_{figure}"] = usage[figure]
                row |= {f"codebook_{figure}_{scale}": usage[f"{scale}/{figure}"] for scale in self.usage.scales}
            self.usage.reset()
        elapsed_s = self._waited_s + self._worked_s
        row["lr"] = task.lr
        row["images"] = float(task.images)
        row |= throughput(trainer, task, (task.images - self._images) / elapsed_s)
        row["data_wait"] = self._waited_s / elapsed_s
        return {f"train/{name}": value for name, value in row.items()}


def throughput(trainer: L.Trainer, task: LossTask, images_per_s: float) -> dict[str, float]:
    """Images/s of all processes; of a generator also positions/s and, on known devices in 16 bits, its MFU.

    MFU (model FLOPs utilisation) is the share of the devices' peak that :attr:`Generator.train_flops` makes use of.
    """
    speed, net = {"images_per_s": images_per_s}, task.net
    if isinstance(net, Generator):
        speed["tokens_per_s"] = images_per_s * net.spec.num_positions
        peak = peak_flops(torch.cuda.get_device_name(task.device)) if task.device.type == "cuda" else None
        if peak and net.train_flops and trainer.precision != "32-true":
            speed["mfu"] = images_per_s * net.train_flops / (peak * trainer.world_size)
    return speed


class ProgressLine(L.Callback):
    """One live line: updates, ETA, loss terms, perplexity of the codes, images/s and tokens/s, MFU, memory.

    Args:
        source: where the numbers come from.
    """

    def __init__(self, source: Log) -> None:
        self.source = source
        self._bar: tqdm | None = None

    @override
    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, task: LossTask) -> None:
        # A line that is not live (a log file) is rewritten rarely.
        interval_s = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=task.max_updates, initial=task.updates, unit="update", mininterval=interval_s, dynamic_ncols=True
        )

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if task.updated and self._bar is not None:
            if is_due(task, self.source.every):
                self._bar.set_postfix_str(self._numbers(task.device), refresh=False)
            self._bar.update()

    def _numbers(self, device: torch.device) -> str:
        row = self.source.latest
        names = [name for name in row if name.startswith("train/loss")]
        # One term alone is the loss.
        losses = [f"{name.removeprefix('train/')} {row[name]:.4g}" for name in (names if len(names) > 2 else names[:1])]
        codes = []
        if "train/codebook_usage" in row:
            usage, perplexity = row["train/codebook_usage"], row["train/codebook_perplexity"]
            codes = [f"codes {usage:.0%} used, perplexity {perplexity:.0f}"]
        speed = [f"{row['train/images_per_s']:.0f} images/s"]
        if "train/tokens_per_s" in row:
            speed.append(f"{row['train/tokens_per_s']:.0f} tokens/s")
        if "train/mfu" in row:
            speed.append(f"MFU {row['train/mfu']:.0%}")
        return ", ".join([*losses, *codes, *speed, f"{_memory_gb(device):.1f} GB"])

    @override
    def on_train_end(self, trainer: L.Trainer, task: LossTask) -> None:
        self._close()

    @override
    def on_exception(self, trainer: L.Trainer, task: LossTask, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Pictures(L.Callback):
    """Draws to ``pictures/`` and TensorBoard: reconstructions of a tokenizer, samples of a generator.

    Every process draws, for it may hold a part of the weights; the first one saves. The original of a cached latent is
    what the autoencoder makes of it.

    Args:
        folder: of the PNG files, ``update_00001000.png`` and so on.
        every: updates between two pictures.
        ema: averaged weights.
        rows: images, classes, or captions.
    """

    def __init__(self, folder: Path, every: int, ema: Ema, rows: int = 10) -> None:
        self.folder, self.every, self.ema, self.rows = folder, every, ema, rows

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if not is_due(task, self.every):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        with evaluating(trainer, task, self.ema):
            if isinstance(task.net, Autoencoder):
                rows = [data.val.get(index) for index in range(min(self.rows, len(data.val)))]
                rows = [_with_image(row, task.net, task.device) for row in rows]
                picture = picture_reconstruction(task.net, rows, prefix_lengths(task.net.spec))
            else:
                assert task.tokenizer is not None
                picture = samples(task.net, task.tokenizer.on(task.device), *asked_for(task, data.val, self.rows))
        if not trainer.is_global_zero:
            return
        save_png(picture, self.folder / f"update_{task.updates:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("pictures", np.asarray(picture), task.updates, dataformats="HWC")


def _with_image(sample: dict[str, Any], net: Autoencoder, device: torch.device) -> dict[str, Any]:
    """A sample; if it has a latent, with what the autoencoder makes of that as its image."""
    if "latent" not in sample:
        return sample
    return {**sample, "image": net.decode_latent(sample["latent"][None].to(device))[0].cpu()}


def asked_for(task: LossTask, val: Dataset, rows: int) -> tuple[Condition, list[str]]:
    """Conditions to draw and their labels: captions of the validation data, or the first classes (none if none)."""
    assert isinstance(task.net, Generator)
    if task.net.text_width:
        batch = collate([val.get(index) for index in range(min(rows, len(val)))])
        return task.condition(batch), [shorten(text, 60) for text in batch["text"]]
    class_ids = list(range(min(rows, task.net.num_classes))) or [NULL_CLASS]
    return ClassCondition(torch.tensor(class_ids)), [str(label) if label != NULL_CLASS else "" for label in class_ids]


def samples(
    net: Generator, tokenizer: Tokenizer, condition: Condition, labels: list[str], columns: int = 4, seed: int = 0
) -> Image.Image:
    """One row of unguided samples for each row of ``condition``."""
    repeated = torch.arange(len(labels)).repeat_interleave(columns)
    images = sample_images(net, tokenizer, condition[repeated], SampleOptions(), seed, len(repeated))
    return labelled_grid(images.unflatten(0, (len(labels), columns)), labels, [""] * columns)


class Checkpoint(L.Callback):
    """Writes ``last.ckpt`` (to go on from) and the export (to use), each whole or not at all.

    Args:
        folder: the run's folder.
        every: updates between two checkpoints.
        export: writes the export of a task; called by every process.
    """

    def __init__(self, folder: Path, every: int, export: Callable[[LossTask], None]) -> None:
        self.path, self.every, self.export = folder / "last.ckpt", every, export
        self._saved = -1

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if is_due(task, self.every):
            self.save(trainer, task)

    def save(self, trainer: L.Trainer, task: LossTask) -> None:
        """Save the state after the current update; called by every process."""
        if self._saved == task.updates:
            return
        trainer.save_checkpoint(self.path)
        self.export(task)
        self._saved = task.updates


class StopOnSignal(L.Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finish the update, save, exit with code 128 + signal number.

    It takes the place of Lightning's handlers while training runs (Lightning puts the previous ones back): those stop
    at any micro-batch, save nothing, leave exit code 0 and run a collective inside the handler.

    Args:
        checkpoint: saves.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._received = 0

    @override
    def on_train_start(self, trainer: L.Trainer, task: LossTask) -> None:
        for signum in self.signals:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self._received = signum
        signal.signal(signum, signal.SIG_DFL)  # the second one ends the process at once

    @override
    def on_train_batch_end(self, trainer: L.Trainer, task: LossTask, *_: object) -> None:
        if not task.updated:
            return
        received = self._received
        if trainer.world_size > 1:  # all ranks stop after the same update, whichever was told to
            received = int(trainer.strategy.reduce(torch.tensor(received, device=task.device), reduce_op="max"))
        if received:
            self.checkpoint.save(trainer, task)
            # A launcher that sees a child fail kills its parent: the first process speaks for all.
            raise SIGTERMException(128 + received if trainer.is_global_zero else 0)

    @override
    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, task: LossTask, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            name, path = signal.Signals(self._received or signal.SIGTERM).name, self.checkpoint.path
            print(f"{name}: saved update {task.updates} to {path}; resume=auto goes on from there", file=sys.stderr)


class CheckpointFile(TorchCheckpointIO):
    """``last.ckpt`` as a file: written beside and renamed, so that a full disk leaves the previous one; read safely.

    Args:
        mmap: see :func:`read_checkpoint`.
    """

    def __init__(self, mmap: bool = False) -> None:
        super().__init__()
        self.mmap = mmap

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        def write(temporary: Path) -> None:
            # Through Python's file, which says why the disk refuses; torch's own says "iostream error".
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        write_atomically(path, write)

    @override
    def load_checkpoint(self, path: str | Path, *_: object, **__: object) -> dict[str, Any]:
        return read_checkpoint(path, self.mmap)


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The state in a ``last.ckpt``, on the CPU.

    Args:
        path: the file.
        mmap: leave the tensors on the disk until they are read, for those who need the counters or slices alone.

    Raises:
        UserError: if the file is missing, truncated or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        state["updates"], state["images"], state["seconds"], state["state_dict"], state["callbacks"]
    except FileNotFoundError:
        raise UserError(f"checkpoint not found: {path}") from None
    except Exception as error:  # torch.load raises whatever its parsers do
        raise UserError(f"{path} is truncated or no checkpoint of a run: {first_line(error)}") from None
    return state


class CsvLogger(Logger):
    """``metrics.csv``: one row a call, blank where it has no value; a resumed run appends.

    Lightning's own CSVLogger deletes the file of an earlier run.

    Args:
        path: the file.
        resumed_at: rows of later updates are dropped before the first new one, for they are made again.
    """

    name, version = "csv", ""

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.path, self.resumed_at = path, resumed_at
        self._columns: list[str] = []

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"update": step, **metrics}
        if not self._columns:
            rows = [old for old in self._rows() if old["update"].isdigit() and int(old["update"]) <= self.resumed_at]
            self._rewrite(rows, row)
        elif row.keys() - set(self._columns):
            self._rewrite(list(self._rows()), row)
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from None

    @override
    def log_hyperparams(self, *_: object, **__: object) -> None:
        """Nothing: ``run.yaml`` has them."""

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            with open(self.path, newline="") as file:
                yield from csv.DictReader(file)

    def _rewrite(self, rows: list[dict[str, Any]], newest: dict[str, Any]) -> None:
        """Write ``rows`` under a header with room for ``newest``."""
        self._columns = list(dict.fromkeys(key for row in [*rows, newest] for key in row))

        def write(path: Path) -> None:
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.path, write)


class _Means:
    """Running means of named scalars, on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self, trainer: L.Trainer) -> dict[str, float]:
        """Means over all processes, in one reduction; empties."""
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, trainer.strategy.reduce(means, reduce_op="mean").tolist()))
        self._sums.clear()
        self._counts.clear()
        return values


def _log(trainer: L.Trainer, task: LossTask, row: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(row, step=task.updates)


def _memory_gb(device: torch.device) -> float:
    """Peak memory of this process, GB: on its GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
