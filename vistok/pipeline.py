"""The whole line in one call: condition -> tokens -> images, and images -> tokens -> images.

The only place where a generator and a tokenizer meet; training pictures, ``sample.py`` and the evaluation call it.
Results are uint8, as image files and metrics want them. Sample i depends on ``seed`` and ``i`` alone: its tokens are
the same at every ``batch_size``, its pixels up to the rounding of a float.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vistok.checkpoint import export_info, load_generator, load_tokenizer, tokenizer_folder
from vistok.config import nearest, parse_overrides
from vistok.errors import UserError
from vistok.interfaces import (
    Autoencoder,
    Condition,
    Generator,
    LatentTokenizer,
    SampleOptions,
    TextCondition,
    TextEncoder,
    Tokenizer,
)
from vistok.pictures import to_uint8
from vistok.rng import SampleRng, derive_seed
from vistok.tokens import Ordered1D, Tokens, TokenSpec, refusal

Progress = Callable[[int], None]
"""Called with the number of images finished since the last call."""

Code = Tokens | Float[Tensor, "N n C"]
"""What an autoencoder makes of images: tokens, or the latents of a continuous one."""


class Prompts:
    """One text for each sample, encoded when rows are taken: the states of a whole benchmark might not fit into memory.

    Args:
        encoder: reads the texts.
        texts: what the samples shall show.
    """

    def __init__(self, encoder: TextEncoder, texts: list[str]) -> None:
        self.encoder, self.texts = encoder, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> TextCondition:
        return self.encoder.encode(self.texts[rows])


def load_models(
    checkpoint: str | Path, tokenizer: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Generator, Tokenizer, Path]:
    """A generator, the tokenizer that turns its tokens into images, and that tokenizer's folder.

    Args:
        checkpoint: export folder of a generator.
        tokenizer: export folder of a tokenizer; by default the one that the generator was trained on.
        device: where to put both.

    Raises:
        UserError: if a folder is no such export, or the generator was trained on another tokenizer.
    """
    generator = load_generator(checkpoint, device)
    folder = tokenizer_folder(checkpoint, tokenizer)
    return generator, load_tokenizer(folder, device), folder


def check_guidance(checkpoint: str | Path, *scales: float) -> None:
    """Warn of guidance ``scales`` that lead away from what the generator never learned: the null condition."""
    if any(scale != 1 for scale in scales) and export_info(checkpoint)["args"].get("condition_dropout") == 0:
        warnings.warn(
            f"{checkpoint} was trained without condition dropout (condition_dropout: 0): it does not know the null "
            "condition, and --cfg-scale other than 1 leads away from noise",
            stacklevel=2,
        )


def prefix_lengths(spec: TokenSpec, wanted: list[int] | None = None) -> list[int]:
    """Numbers of tokens to decode: ``wanted``; or powers of two up to all for ordered layouts, all for others.

    Scales make a layout ordered too: each of its prefixes of whole scales is taken.

    Raises:
        UserError: if ``wanted`` does not fit the layout.
    """
    legal, total = spec.layout.prefixes, spec.num_positions
    if wanted is None:
        if not isinstance(spec.layout, Ordered1D):
            return list(legal)
        return [2**power for power in range(total.bit_length()) if 2**power < total] + [total]
    for length in wanted:
        if length not in legal:
            raise UserError(f"--tokens: {refusal(length, spec.layout, legal)}")
    return sorted(set(wanted))


def read_decode_options(tokenizer: Autoencoder, pairs: list[str]) -> dict[str, Any]:
    """All options of a tokenizer's ``decode``: what ``key=value`` words of a command line say, else its defaults.

    Raises:
        UserError: for an unknown option (with the nearest valid one) or a value that is not of the default's type.
    """
    return _read_options("--decode", tokenizer.decode_defaults, pairs)


def read_sample_options(generator: Generator, pairs: list[str]) -> dict[str, Any]:
    """All options of ``generate`` that only this kind of generator has, as :func:`read_decode_options` reads them."""
    return _read_options("--sampling", generator.sample_defaults, pairs)


def read_feature_options(autoencoder: Autoencoder, pairs: list[str]) -> dict[str, Any]:
    """All options of ``features``, as :func:`read_decode_options` reads those of ``decode``."""
    return _read_options("--features", autoencoder.feature_defaults, pairs)


def _read_options(flag: str, defaults: dict[str, Any], pairs: list[str]) -> dict[str, Any]:
    options = dict(defaults)
    for key, value in parse_overrides(pairs).items():
        if key not in options:
            there_are = nearest(key, list(options)) if options else " (this model has none)"
            raise UserError(f"{flag}: unknown option {key!r}{there_are}")
        kind = type(options[key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{flag}: {key} must be of type {kind.__name__}, got {value!r}")
        options[key] = value
    return options


def sample_images(
    generator: Generator,
    tokenizer: Tokenizer,
    condition: Condition | Prompts,
    options: SampleOptions,
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> UInt8[Tensor, "N 3 H W"]:
    """Sample one image for each row of ``condition``.

    Args:
        generator: in evaluation mode.
        tokenizer: the one whose tokens ``generator`` models.
        condition: what the images shall show.
        options: guidance, filtering and the number of tokens.
        seed: names the samples.
        batch_size: samples at a time.
        decode_options: options of the tokenizer's ``decode``.
        progress: see :data:`Progress`.
        first: number of the first sample among those that ``seed`` names.

    Returns:
        Images on the CPU.
    """
    length = options.num_tokens or generator.spec.num_positions
    more = (seed, batch_size, decode_options, progress, first)
    return sample_prefixes(generator, tokenizer, condition, options, [length], *more)[length]


def sample_prefixes(
    generator: Generator,
    tokenizer: Tokenizer,
    condition: Condition | Prompts,
    options: SampleOptions,
    lengths: list[int],
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> dict[int, UInt8[Tensor, "N 3 H W"]]:
    """Images of each of ``lengths`` (see :func:`prefix_lengths`) first tokens of one code; else :func:`sample_images`.

    A shorter code is a prefix of the longest one, so codes are sampled once.
    """
    longest, parts = replace(options, num_tokens=lengths[-1]), []
    for start in range(0, len(condition), batch_size):
        rows, place = condition[start : start + batch_size], first + start
        tokens = sample_tokens(generator, rows, longest, seed, batch_size, first=place)
        parts.append(decode_prefixes(tokenizer, tokens, lengths, seed, batch_size, decode_options, first=place))
        if progress:
            progress(len(rows))
    return {length: torch.cat([part[length] for part in parts]) for length in lengths}


def sample_tokens(
    generator: Generator,
    condition: Condition | Prompts,
    options: SampleOptions,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
    first: int = 0,
) -> Tokens:
    """One code for each row of ``condition``, on the CPU; row ``i`` is sample ``first + i`` of those ``seed`` names.

    The code that ``options.num_tokens`` cuts short is a prefix of the whole one.
    """
    device, ids = _device(generator), []
    for start in range(0, len(condition), batch_size):
        rows = condition[start : start + batch_size].to(device)
        with torch.no_grad():
            tokens = generator.generate(rows, options, SampleRng.from_seed(seed, len(rows), start=first + start))
        ids.append(tokens.ids.cpu())
        if progress:
            progress(len(rows))
    return Tokens(torch.cat(ids), generator.spec)


def tokenize_images(tokenizer: Tokenizer, images: Float[Tensor, "N 3 H W"], batch_size: int) -> Tokens:
    """Tokens of images in [-1, 1], on the CPU."""
    device = _device(tokenizer)
    with torch.no_grad():
        ids = [tokenizer.tokenize(batch.to(device)).ids.cpu() for batch in images.split(batch_size)]
    return Tokens(torch.cat(ids), tokenizer.spec)


def encode_images(autoencoder: Autoencoder, images: Float[Tensor, "N 3 H W"], batch_size: int) -> Code:
    """The code of images in [-1, 1], on the CPU."""
    if isinstance(autoencoder, Tokenizer):
        return tokenize_images(autoencoder, images, batch_size)
    assert isinstance(autoencoder, LatentTokenizer)
    device = _device(autoencoder)
    return torch.cat([autoencoder.encode(batch.to(device)).cpu() for batch in images.split(batch_size)])


def decode_images(
    autoencoder: Autoencoder,
    code: Code,
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> UInt8[Tensor, "N 3 H W"]:
    """Images of a code, on the CPU; row ``i`` is image ``first + i`` of the set that ``seed`` names.

    Every prefix of a code is decoded from the same noise.
    """
    device = _device(autoencoder)
    images = []
    for start in range(0, len(code), batch_size):
        rows = slice(start, start + batch_size)
        part = Tokens(code.ids[rows].to(device), code.spec) if isinstance(code, Tokens) else code[rows].to(device)
        # Not the generator's streams: those are spent to a depth that depends on the number of tokens.
        rng = SampleRng([derive_seed("decode", seed, first + start + row) for row in range(len(part))])
        with torch.no_grad():
            decoded = autoencoder.decode(part, rng=rng, **(decode_options or {}))
        images.append(to_uint8(decoded).cpu())
        if progress:
            progress(len(part))
    return torch.cat(images)


def decode_prefixes(
    autoencoder: Autoencoder,
    code: Code,
    lengths: list[int],
    seed: int,
    batch_size: int,
    decode_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> dict[int, UInt8[Tensor, "N 3 H W"]]:
    """Images of each of ``lengths`` (see :func:`prefix_lengths`) first tokens; the rest as :func:`decode_images`."""
    return {
        length: decode_images(
            autoencoder,
            code.prefix(length) if isinstance(code, Tokens) else code,
            seed,
            batch_size,
            decode_options,
            progress,
            first,
        )
        for length in lengths
    }


def _device(module: nn.Module) -> torch.device:
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device
