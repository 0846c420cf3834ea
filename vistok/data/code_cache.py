"""``code_cache``: the tokens of a data set, computed once, so that generators train without the tokenizer.

A folder of two files:

    codes.safetensors   for each split ``{split}.ids`` int32 (P, M, N, S): pass, image, position, slot;
                        and ``{split}.labels`` int64 (M,)
    cache.json          token spec, hash of the tokenizer, and for each split what the data are, keys and captions

Pass 0 holds the images as they are, each further pass of the training split augments them anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from vistok.checkpoint import load_weights, save_tensors
from vistok.data.datamodule import Dataset, make_loader, ordered_batches
from vistok.data.output import new_folder
from vistok.errors import UserError
from vistok.interfaces import Tokenizer
from vistok.rng import derive_seed
from vistok.tokens import TokenSpec

CODES, CACHE = "codes.safetensors", "cache.json"


@dataclass
class Config:
    """``path``: the folder of the cache."""

    path: str = MISSING


class CodeCache:
    """The codes of one split; a sample has ``ids`` int64 ``(N, S)`` instead of an image.

    Attributes:
        spec: what the codes mean.
        tokenizer_hash: of the tokenizer that made them; compare with :func:`check_tokenizer`.

    Raises:
        UserError: if the folder is no whole cache, or lacks the split, or is for another image size.
    """

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        folder = Path(config.path)
        cache = _read_cache(folder)
        if split not in cache["splits"]:
            raise UserError(f"{folder} has no split {split!r} ({', '.join(cache['splits'])})")
        self.spec = TokenSpec.from_dict(cache["spec"])
        if self.spec.image_size_px != image_size_px:
            raise UserError(f"{folder} holds codes of {self.spec.image_size_px} px images, not of {image_size_px} px")
        tensors = load_weights(folder / CODES)
        self.ids, self.labels = tensors[f"{split}.ids"], tensors[f"{split}.labels"]
        part = cache["splits"][split]
        self.keys, self.texts = part["keys"], part["texts"]
        self.tokenizer_hash: str = cache["tokenizer_hash"]
        self.class_names: list[str] = cache["class_names"]
        self.num_classes = len(self.class_names)
        self.description = {
            "name": "code_cache",
            "split": split,
            "tokenizer_hash": self.tokenizer_hash,
            "passes": len(self.ids),
            "data": part["data"],
        }

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, rng: torch.Generator | None = None) -> dict[str, Any]:
        """Sample ``index`` of a pass drawn from ``rng``; of pass 0, the image as it is, if that is None."""
        number = 0 if rng is None else int(torch.randint(len(self.ids), (), generator=rng))
        return {
            "ids": self.ids[number, index].long(),
            "label": int(self.labels[index]),
            "text": self.texts[index] if self.texts else "",
            "key": self.keys[index],
        }


def build(config: Config, split: str, image_size_px: int) -> CodeCache:
    """The codes of ``split``."""
    return CodeCache(config, split, image_size_px)


def check_tokenizer(dataset: CodeCache, tokenizer_hash: str) -> None:
    """Refuse codes that another tokenizer made.

    Raises:
        UserError: naming both hashes.
    """
    if dataset.tokenizer_hash != tokenizer_hash:
        raise UserError(
            f"these codes were made by tokenizer {dataset.tokenizer_hash}, the tokenizer given is {tokenizer_hash}: "
            "extract them again (python -m vistok.data tokens)"
        )


def extract(
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    datasets: dict[str, Dataset],
    out: str | Path,
    batch_size: int = 256,
    passes: int = 1,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the code cache of a data set.

    Args:
        tokenizer: on ``device``, in eval mode.
        tokenizer_hash: its ``export_hash``.
        datasets: the splits, by name.
        out: the folder to make.
        batch_size: images tokenized at once.
        passes: of the training split; the others get one.
        seed: pass p > 0 augments image i by a stream that (seed, p, i) names.
        workers: loader processes.
        device: where to tokenize.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: if ``out`` exists, a number is out of range, or the tokenizer has no codes.
    """
    if passes < 1 or batch_size < 1 or workers < 0:
        raise UserError(
            f"passes and batch_size must be at least 1 and workers at least 0, got {passes}, {batch_size} and {workers}"
        )
    if not tokenizer.spec.num_slots:
        raise UserError("this tokenizer is continuous: it has no codes to cache")
    tensors: dict[str, Tensor] = {}
    splits: dict[str, dict[str, Any]] = {}
    with new_folder(out) as folder:
        for split, dataset in datasets.items():
            rounds = [None] + [
                derive_seed("pass", seed, number) for number in range(1, passes if split == "train" else 1)
            ]
            ids: list[Tensor] = []
            batches: list[dict[str, Any]] = []
            for augment_seed in rounds:
                loader = make_loader(dataset, ordered_batches(len(dataset), batch_size), workers, augment_seed)
                batches = []
                for batch in loader:
                    ids.append(tokenizer.tokenize(batch.pop("image").to(device)).ids.to("cpu", torch.int32))
                    batches.append(batch)
                    progress(len(ids[-1]))
            # Labels, captions and keys are the same in every pass.
            tensors[f"{split}.ids"] = torch.cat(ids).unflatten(0, (len(rounds), len(dataset)))
            tensors[f"{split}.labels"] = torch.cat([batch["label"] for batch in batches])
            keys, texts = ([item for batch in batches for item in batch[name]] for name in ("key", "text"))
            splits[split] = {"data": dataset.description, "keys": keys, "texts": texts if any(texts) else []}
        cache = {
            "spec": tokenizer.spec.to_dict(),
            "tokenizer_hash": tokenizer_hash,
            "class_names": next(iter(datasets.values())).class_names,
            "splits": splits,
        }
        save_tensors(folder / CODES, tensors)
        (folder / CACHE).write_text(json.dumps(cache) + "\n")


def _read_cache(folder: Path) -> dict[str, Any]:
    try:
        cache = json.loads((folder / CACHE).read_text())
        return {key: cache[key] for key in ("spec", "tokenizer_hash", "class_names", "splits")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no code cache ({CACHE}: {error}); make one with python -m vistok.data tokens"
        ) from None
