"""``code_cache``: the tokens of a data set, computed once, so that generators train without the tokenizer.

A folder of two files, or three:

    codes.safetensors   for each split ``{split}.ids`` int32 (P, M, N, S): pass, image, position, slot;
                        and ``{split}.labels`` int64 (M,)
    cache.json          token spec, hash of the tokenizer, and for each split what the data are, keys and captions
    text_states.npy     if asked for: what a text encoder makes of captions, see :mod:`vistok.data.text_states`; then
                        the first file has ``text.offsets`` and ``{split}.captions``, the second the encoder's name and
                        arguments, and its hash

Pass 0 holds the images as they are, each further pass of the training split augments them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from vistok import config
from vistok.config import Component
from vistok.data.cache import Cache, go_through, passes_of, read_header, write_header
from vistok.data.datamodule import Dataset, has_captions
from vistok.data.text_states import TextStates, identity, write_text_states
from vistok.errors import UserError
from vistok.files import load_weights, new_folder, save_tensors
from vistok.interfaces import Tokenizer
from vistok.tokens import TokenSpec

CODES, CACHE = "codes.safetensors", "cache.json"


@dataclass
class Config:
    """Which cache, and what of it.

    Args:
        path: its folder.
        text_states: take the states of captions that it holds; without, a text encoder reads the captions anew.
    """

    path: str = MISSING
    text_states: bool = True


class CodeCache(Cache):
    """The codes of one split; a sample has ``ids`` int64 ``(N, S)`` instead of an image.

    Attributes:
        spec: what the codes mean.
        tokenizer_hash: of the tokenizer that made them; compare with :func:`check_tokenizer`.
        text: the states of the captions, with which a sample has a ``condition``; None if there are none.

    Raises:
        UserError: if the folder is no whole cache, or lacks the split, or is for another image size.
    """

    def __init__(self, config: Config, split: str, image_size_px: int) -> None:
        folder = Path(config.path)
        cache = read_header(folder / CACHE, ("spec", "tokenizer_hash"), "code cache", "tokens")
        super().__init__(cache, split, folder)
        self.spec = TokenSpec.from_dict(cache["spec"])
        if self.spec.image_size_px != image_size_px:
            raise UserError(f"{folder} holds codes of {self.spec.image_size_px} px images, not of {image_size_px} px")
        tensors = load_weights(folder / CODES)
        self.ids, self.labels = tensors[f"{split}.ids"], tensors[f"{split}.labels"]
        self.passes = len(self.ids)
        self.tokenizer_hash: str = cache["tokenizer_hash"]
        self.text: TextStates | None = None
        if config.text_states and "text_hash" in cache:
            made_by = (cache["text_hash"], cache.get("text_encoder"))
            self.text = TextStates(folder, tensors["text.offsets"], tensors[f"{split}.captions"], *made_by)
        self.description = {
            "name": "code_cache",
            "split": split,
            "tokenizer_hash": self.tokenizer_hash,
            "passes": self.passes,
            "data": self.part["data"],
        }

    def stored(self, number: int, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"ids": self.ids[number, index].long()}
        return sample if self.text is None else {**sample, "condition": self.text.condition(index)}


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
    text_encoder: Component | None = None,
    text_bits: int = 16,
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
        text_encoder: reads the captions, each different one once. None leaves them as they are.
        text_bits: of a number in the states of captions, 16 or 32.

    Raises:
        UserError: if ``out`` exists, a number is out of range, the tokenizer has no codes, or the data no captions to
            read.
    """
    if not tokenizer.spec.num_slots:
        raise UserError("this tokenizer is continuous: it has no codes to cache")
    if text_encoder is not None:
        if not any(map(has_captions, datasets.values())):
            raise UserError("these data have no captions for the text encoder to read")
        reader = config.build("text_encoders", text_encoder).to(device)

    def tokenize(images: Tensor) -> Tensor:
        return tokenizer.tokenize(images.to(device)).ids.to("cpu", torch.int32)

    tensors: dict[str, Tensor] = {}
    splits: dict[str, dict[str, Any]] = {}
    with new_folder(out) as folder:
        for split, dataset in datasets.items():
            ids: list[Tensor] = []
            count = passes_of(split, passes)
            splits[split], tensors[f"{split}.labels"] = go_through(
                dataset, count, tokenize, ids.append, batch_size, seed, workers, progress
            )
            tensors[f"{split}.ids"] = torch.cat(ids).unflatten(0, (count, len(dataset)))
        values = {"spec": tokenizer.spec.to_dict(), "tokenizer_hash": tokenizer_hash}
        if text_encoder is not None:
            texts = {split: part["texts"] or [""] * len(part["keys"]) for split, part in splits.items()}
            tensors["text.offsets"], captions = write_text_states(folder, reader, texts, text_bits, batch_size)
            tensors |= {f"{split}.captions": rows for split, rows in captions.items()}
            values |= {"text_hash": reader.states_hash, "text_encoder": identity(text_encoder)}
        save_tensors(folder / CODES, tensors)
        write_header(folder / CACHE, datasets, splits, **values)
