"""Which sample comes when: the order of training samples, the loaders, and data sets by name.

Training sees one infinite stream of samples that depends on the seed alone. Position ``p`` of the stream is sample
``permutation(seed, p // n)[p % n]`` of ``n``; an update of ``R`` processes with batch ``b`` takes the next ``R * b``
positions, rank ``r`` the ``r``-th block of ``b``. Hence every sample comes once per epoch, no two processes see the
same one, and a resumed run goes on where the count of consumed images says, with any number of workers.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from vistok import config
from vistok.errors import UserError
from vistok.geneval_rules import Detection, Entry, Rules
from vistok.interfaces import TextCondition
from vistok.rng import seeded_generator


class Dataset(Protocol):
    """What every ``vistok.data.<name>.build`` returns.

    A sample has ``image`` float32 ``(3, H, W)`` in [-1, 1] (or ``ids`` int64 ``(N, S)`` for cached codes, ``latent``
    float32 ``(C, h, w)`` for cached latents), ``label`` int (-1 if none), ``text`` str (empty if none), ``key`` str
    (unique and stable) and, if a cache has what a text encoder makes of the text, ``condition``, a
    :class:`~vistok.interfaces.TextCondition` of one row.

    Attributes:
        num_classes: number of classes, 0 if there are none.
        class_names: one name per class.
        description: plain JSON values that identify the data and its preprocessing; ``split`` is ``all`` where the
            data bring no validation split and none was held out.
    """

    num_classes: int
    class_names: list[str]
    description: dict[str, Any]

    def __len__(self) -> int: ...

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Sample ``index``, augmented by draws from ``rng``; not at all if it is None."""


@runtime_checkable
class CheckableDataset(Dataset, Protocol):
    """A data set may, but need not, tell how much of one of its images a reconstruction still shows.

    Attributes:
        agreement_definitions: one line about each figure of :meth:`agreement`, by name.
    """

    agreement_definitions: dict[str, str]

    def agreement(self, index: int, image: Float[Tensor, "3 H W"]) -> dict[str, float]:
        """Figures in [0, 1] of ``image`` in [-1, 1] as a picture of sample ``index``; 1 is best."""


@runtime_checkable
class PromptedDataset(Dataset, Protocol):
    """A data set may, but need not, bring GenEval's tasks for its own world and read the objects of any image.

    Attributes:
        geneval_rules: which of its :meth:`detections` count.
    """

    geneval_rules: Rules

    def geneval_prompts(self) -> dict[str, list[Entry]]:
        """The different prompts of each task."""

    def detections(self, image: Float[Tensor, "3 H W"]) -> list[Detection]:
        """The objects of an image in [-1, 1], with their colours."""


class PositionBatchSampler(Sampler[list[tuple[int, int]]]):
    """One rank's batches of the infinite training stream, as ``(position, sample index)`` pairs.

    Args:
        num_samples: size of the data set.
        batch_size: samples of one rank in one batch.
        seed: names the stream.
        rank: this process.
        world_size: number of processes.
        consumed: global position at which an iteration starts; asked at each start.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        consumed: Callable[[], int] = lambda: 0,
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.consumed = rank, world_size, consumed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.consumed() + self.rank * self.batch_size
        while True:
            yield [(position, self._index(position)) for position in range(start, start + self.batch_size)]
            start += self.world_size * self.batch_size

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        return int(_epoch_order(self.num_samples, self.seed, epoch)[offset])


class DataModule(L.LightningDataModule):
    """Training and validation loaders for Lightning (``Trainer(use_distributed_sampler=False)``).

    A batch is ``{"image": float32 (B, 3, H, W), "label": int64 (B,), "text": list, "key": list, "position": int64
    (B,)}``, with ``"ids"`` int64 ``(B, N, S)`` or ``"latent"`` float32 ``(B, C, h, w)`` instead of the image for
    cached codes or latents, and with ``"condition"``, a ``TextCondition`` of ``B`` rows, for cached text states. The
    training loader never ends. The validation loader goes once through ``val`` in order, without augmentation; the
    ranks share it without duplicates and take the same number of batches.

    Args:
        train: training samples.
        val: validation samples; None for no validation.
        batch_size: samples of one process in one batch.
        workers: loader processes; 0 loads in the training process.
        seed: names the order and the augmentations.
        consumed: global number of training images already used, so that a resumed run goes on with the next.

    Raises:
        UserError: if ``batch_size`` or ``workers`` is out of range or a data set is empty.
    """

    def __init__(
        self,
        train: Dataset,
        val: Dataset | None,
        batch_size: int,
        workers: int = 0,
        seed: int = 0,
        consumed: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
        if not len(train) or (val is not None and not len(val)):
            raise UserError("a data set is empty")
        self.train, self.val = train, val
        self.batch_size, self.workers, self.seed, self.consumed = batch_size, workers, seed, consumed

    def train_dataloader(self) -> DataLoader:
        """This rank's part of the infinite training stream."""
        rank, world_size = self._place()
        batches = PositionBatchSampler(len(self.train), self.batch_size, self.seed, rank, world_size, self.consumed)
        return make_loader(self.train, batches, self.workers, self.seed)

    def val_dataloader(self) -> DataLoader | list:
        """This rank's part of the validation samples."""
        if self.val is None:
            return []
        rank, world_size = self._place()
        return make_loader(self.val, ordered_batches(len(self.val), self.batch_size, rank, world_size), self.workers)

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def ordered_batches(count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[tuple[int, int]]]:
    """One rank's share of the samples ``0 .. count - 1`` as batches of ``(position, index)`` pairs, both equal.

    The samples are cut into pieces of nearly equal size, the same number for each rank: ranks that take different
    numbers of batches would wait for one another for ever.
    """
    pieces = math.ceil(count / (batch_size * world_size)) * world_size
    shares = torch.arange(count).tensor_split(pieces)[rank::world_size]
    return [[(index, index) for index in share.tolist()] for share in shares if len(share)]


def make_loader(dataset: Dataset, batches: Any, workers: int = 0, augment_seed: int | None = None) -> DataLoader:
    """A loader of the batches of ``(position, index)`` pairs that ``batches`` yields.

    Args:
        dataset: where samples come from.
        batches: iterable of lists of pairs.
        workers: loader processes.
        augment_seed: the sample at position p is augmented by the stream ``("augment", augment_seed, p)``; None
            for no augmentation.
    """
    return _Loader(
        _Stream(dataset, augment_seed),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_obey_parent_only,
    )


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of samples, see :class:`DataModule`."""
    rows = [sample["condition"] for sample in samples if "condition" in sample]
    batch = default_collate([{key: value for key, value in sample.items() if key != "condition"} for sample in samples])
    return {**batch, "condition": TextCondition.stacked(rows)} if rows else batch


def has_captions(dataset: Dataset) -> bool:
    """Whether any of the first samples has one."""
    return any(dataset.get(index)["text"] for index in range(min(len(dataset), 16)))


def load_data(text: str, split: str, image_size_px: int, args: dict[str, Any] | None = None, **stored: Any) -> Dataset:
    """The data set that a word on a command line stands for.

    Args:
        text: ``digits``, ``shapes``, ``photos``, an image folder, shards (``path/{000..003}.tar`` or a folder of
            ``.tar`` files), or the folder of a cache of codes or latents.
        split: ``train`` or ``val``.
        image_size_px: side of the images.
        args: fields of the ``Config`` of whichever data set it is, as in a run's ``data.args``.
        stored: fields of ``ImageConfig`` for image folders and shards, under ``args``; ``val_fraction=1`` makes all of
            them ``val``, unless they bring a validation split.

    Raises:
        UserError: if ``text`` is none of these, what it names cannot be read, or ``args`` do not fit it.
    """
    path = Path(text)
    if text in ("digits", "shapes", "photos"):
        component = config.Component(text)
    elif text.endswith(".tar") or any(path.glob("*.tar")) or any(path.glob("train/*.tar")):
        component = config.Component("shards", {"path": text, **stored})
    elif (path / "cache.json").is_file():
        component = config.Component("code_cache", {"path": text})
    elif (path / "latents.json").is_file():
        component = config.Component("latent_cache", {"path": text})
    elif path.is_dir():
        component = config.Component("folders", {"path": text, **stored})
    else:
        raise UserError(
            f"no data called {text!r}: give digits, shapes, photos, or the path of an image folder, "
            "of shards (.tar) or of a cache"
        )
    component.args.update(args or {})
    return config.build("data", component, split, image_size_px, where="--data-args" if args else "")


def load_images(
    text: str, split: str, image_size_px: int, args: dict[str, Any] | None = None, **stored: Any
) -> Dataset:
    """As :func:`load_data`, for those who need pixels.

    Raises:
        UserError: also if ``text`` names a cache.
    """
    for name, what in (("cache.json", "codes"), ("latents.json", "latents")):
        if (Path(text) / name).is_file():
            raise UserError(f"{text} holds {what}, not images")
    return load_data(text, split, image_size_px, args, **stored)


class _Stream(torch.utils.data.Dataset):
    """``(position, index)`` -> sample, for the loader's processes."""

    def __init__(self, dataset: Dataset, augment_seed: int | None) -> None:
        self.dataset, self.augment_seed = dataset, augment_seed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        position, index = place
        rng = None if self.augment_seed is None else seeded_generator("augment", self.augment_seed, position)
        return {**self.dataset.get(index, rng), "position": position}


class _Loader(DataLoader):
    """A loader that hands on a worker's UserError as the one line it was, without the worker's traceback."""

    def __iter__(self) -> Any:
        # Workers inherit the mask, so that a signal cannot meet one that has not come to _obey_parent_only yet.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            samples = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield from samples
        except UserError as error:
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("vistok.errors.UserError: ")) from None


def _obey_parent_only(worker: int) -> None:
    """Make a loader process deaf to signals that do not come from its parent.

    Clusters and terminals signal every process of a job, but the training process needs its loaders for the rest of
    the update that it then saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=seeded_generator("order", seed, epoch))
