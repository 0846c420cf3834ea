"""The whole line in one call: class ids -> tokens -> images, and images -> tokens -> images.

The only place where a generator and a tokenizer meet; training pictures, ``sample.py`` and the evaluation call it.
Results are uint8, as image files and metrics want them. Sample i depends on ``seed`` and ``i`` alone, never on
``batch_size``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vistok.checkpoint import load_generator, load_tokenizer, tokenizer_folder, write_atomically
from vistok.errors import UserError
from vistok.eval.pictures import labelled_grid, rows_by_label, save_png, to_pil
from vistok.interfaces import ClassCondition, Generator, SampleOptions, Tokenizer
from vistok.rng import SampleRng, derive_seed
from vistok.tokens import Tokens

Progress = Callable[[int], None]
"""Called with the number of images finished since the last call."""


def load_models(
    checkpoint: str | Path, tokenizer: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Generator, Tokenizer, Path]:
    """A generator, the tokenizer that turns its tokens into images, and that tokenizer's folder.

    Args:
        checkpoint: export folder of a generator.
        tokenizer: export folder of a tokenizer; by default the one that the generator was trained on.
        device: where to put both.

    Raises:
        UserError: if a folder is no such export, or the tokens of the two do not fit.
    """
    generator = load_generator(checkpoint, device)
    folder = Path(tokenizer) if tokenizer else tokenizer_folder(checkpoint)
    decoder = load_tokenizer(folder, device)
    if decoder.spec != generator.spec:
        raise UserError(f"{folder} has other tokens ({decoder.spec}) than the generator models ({generator.spec})")
    return generator, decoder, folder


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
    """Images in [-1, 1] as 0..255, rounded to the nearest level; values outside the range are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def sample_images(
    generator: Generator,
    tokenizer: Tokenizer,
    class_ids: Int[Tensor, " N"],
    options: SampleOptions,
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> UInt8[Tensor, "N 3 H W"]:
    """Sample one image for each class id.

    Args:
        generator: in evaluation mode.
        tokenizer: the one whose tokens ``generator`` models.
        class_ids: int64; ``NULL_CLASS`` samples without a class.
        options: guidance, filtering and the number of tokens.
        seed: names the samples.
        batch_size: samples at a time.
        decode_options: options of the tokenizer's ``decode``.
        progress: see :data:`Progress`.

    Returns:
        Images on the CPU.
    """
    images = []
    for rows in torch.arange(len(class_ids)).split(batch_size):
        first, count = int(rows[0]), len(rows)
        condition = ClassCondition(class_ids[first : first + count].to(_device(generator)))
        with torch.no_grad():
            tokens = generator.generate(condition, options, SampleRng.from_seed(seed, count, start=first))
        images.append(decode_images(tokenizer, tokens, seed, batch_size, decode_options, first=first))
        if progress:
            progress(count)
    return torch.cat(images)


def reconstruct_images(
    tokenizer: Tokenizer,
    images: Float[Tensor, "N 3 H W"],
    num_tokens: int | None,
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> UInt8[Tensor, "N 3 H W"]:
    """Encode and decode images.

    Args:
        tokenizer: in evaluation mode.
        images: float32 in [-1, 1].
        num_tokens: length of the prefix to decode, for ordered layouts; None keeps all tokens.
        seed: names the decoder's noise.
        batch_size: images at a time.
        decode_options: options of the tokenizer's ``decode``.
        progress: see :data:`Progress`.

    Returns:
        Images on the CPU.

    Raises:
        UserError: if the layout is not ordered or shorter than ``num_tokens``.
    """
    tokens = tokenize_images(tokenizer, images, batch_size)
    if num_tokens is not None:
        tokens = tokens.prefix(num_tokens)
    return decode_images(tokenizer, tokens, seed, batch_size, decode_options, progress)


def tokenize_images(tokenizer: Tokenizer, images: Float[Tensor, "N 3 H W"], batch_size: int) -> Tokens:
    """Tokens of images in [-1, 1], on the CPU."""
    device = _device(tokenizer)
    with torch.no_grad():
        ids = [tokenizer.tokenize(batch.to(device)).ids.cpu() for batch in images.split(batch_size)]
    return Tokens(torch.cat(ids), tokenizer.spec)


def decode_images(
    tokenizer: Tokenizer,
    tokens: Tokens,
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> UInt8[Tensor, "N 3 H W"]:
    """Images of tokens, on the CPU; token ``i`` is image ``first + i`` of the set that ``seed`` names.

    Every prefix of a code is decoded from the same noise.
    """
    device = _device(tokenizer)
    images = []
    for start in range(0, len(tokens), batch_size):
        ids = tokens.ids[start : start + batch_size].to(device)
        # Not the generator's streams: those are spent to a depth that depends on the number of tokens.
        rng = SampleRng([derive_seed("decode", seed, first + start + row) for row in range(len(ids))])
        with torch.no_grad():
            decoded = tokenizer.decode(Tokens(ids, tokens.spec), rng=rng, **(decode_options or {}))
        images.append(to_uint8(decoded).cpu())
        if progress:
            progress(len(ids))
    return torch.cat(images)


def save_images(folder: Path, images: UInt8[Tensor, "N 3 H W"], labels: list[str]) -> None:
    """Write ``00000.png`` and so on, ``grid.png`` and ``samples.npz`` (the field's format for FID) into ``folder``.

    Args:
        folder: made if missing.
        images: at least one.
        labels: one for each image; a row of the grid holds images of one label.
    """
    folder = Path(folder)
    for index, image in enumerate(images):
        save_png(to_pil(image), folder / f"{index:05d}.png")
    save_png(labelled_grid(*rows_by_label(images, labels)), folder / "grid.png")
    save_npz(folder / "samples.npz", images)


def save_npz(path: Path, images: UInt8[Tensor, "N 3 H W"]) -> None:
    """Write images as ``arr_0``, uint8 ``(N, H, W, 3)``; ``path`` is whole or absent."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy())

    write_atomically(path, write)


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
