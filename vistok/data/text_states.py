"""The states of a data set's captions, read once by a text encoder: a part of a code cache.

    text_states.npy   float16 or float32 (T, C): the states of all different captions, one after the other
    offsets           int64 (U + 1): where each of them begins and the last one ends; the empty text is caption 0

Half precision by default: states come out of a norm, far from the ends of float16, which is eight times as fine there
as bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from vistok.config import Component, build, component_config, to_plain
from vistok.data.cache import Table
from vistok.errors import UserError
from vistok.interfaces import TextCondition, TextEncoder

TABLE = "text_states.npy"
DTYPES = {16: torch.float16, 32: torch.float32}
"""Of the table, by the bits of a number."""
FREE = ("path", "on_long")
"""Arguments of a text encoder that change no states: where its weights lie, and what it refuses."""


class TextStates:
    """The states of the captions of one split.

    Args:
        folder: of the cache.
        offsets: see the module docstring.
        captions: of each sample, which one it has.
        states_hash: of the text encoder.
        made_by: :func:`identity` of the text encoder; None if the cache is older than that.

    Raises:
        UserError: if the table is not whole.
    """

    def __init__(
        self,
        folder: Path,
        offsets: Int[Tensor, " U1"],
        captions: Int[Tensor, " M"],
        states_hash: str,
        made_by: str | None,
    ) -> None:
        self.table = Table(folder / TABLE, "text states")
        self.offsets, self.captions = offsets, captions
        self.states_hash, self.made_by = states_hash, made_by
        if len(self.table.array) != int(offsets[-1]):
            raise UserError(f"{folder / TABLE} holds {len(self.table.array)} states, expected {int(offsets[-1])}")
        self.null = self._states(0)

    @property
    def width(self) -> int:
        """Channels C of the states."""
        return self.table.array.shape[1]

    def condition(self, index: int) -> TextCondition:
        """The caption of sample ``index``, as the encoder's ``encode`` of it alone."""
        states = self._states(int(self.captions[index]))
        mask, null_mask = (torch.ones(part.shape[:2], dtype=torch.bool) for part in (states, self.null))
        return TextCondition(states, mask, self.null, null_mask)

    def _states(self, caption: int) -> Float[Tensor, "1 L C"]:
        first, last = self.offsets[caption : caption + 2].tolist()
        return torch.from_numpy(self.table.array[first:last].astype(np.float32))[None]


def identity(text_encoder: Component) -> str:
    """Name of a text encoder and its arguments, defaults too, that change its states: all but its weights."""
    args = to_plain(component_config("text_encoders", text_encoder))
    return " ".join([text_encoder.name, *(f"{name}={value}" for name, value in args.items() if name not in FREE)])


def check_text_encoder(text: TextStates, text_encoder: Component) -> None:
    """Refuse states that another text encoder made, without its weights: they need not even be here.

    Only for a cache that is older than :func:`identity` it is built, for its hash.

    Raises:
        UserError: naming both.
    """
    if text.made_by is not None:
        before, now = text.made_by, identity(text_encoder)
    else:
        before, now = text.states_hash[:12], build("text_encoders", text_encoder).states_hash[:12]
    if before != now:
        raise UserError(
            f"these text states were made by text encoder {before}, the one given is {now}: make them again "
            "(python -m vistok.data tokens --text-encoder), or have the captions read while training "
            "(data.args.text_states=false)"
        )


def write_text_states(
    folder: Path, encoder: TextEncoder, texts: dict[str, list[str]], bits: int, batch_size: int
) -> tuple[Int[Tensor, " U1"], dict[str, Int[Tensor, " M"]]]:
    """Write the table of the captions of some splits.

    Args:
        folder: of the cache.
        encoder: on the device where it shall compute.
        texts: the caption of each sample, by split.
        bits: of a number in the table, see :data:`DTYPES`.
        batch_size: captions at once.

    Returns:
        ``offsets``, and of each split ``captions``, as :class:`TextStates` wants them.

    Raises:
        UserError: if states are too large for half precision.
    """
    # Batches of one length have little to pad. The empty text comes first.
    different = sorted({"", *(text for part in texts.values() for text in part)}, key=lambda text: (len(text), text))
    offsets = [0]
    with open(folder / TABLE, "wb") as file, tqdm(total=len(different), desc="captions", leave=False) as bar:
        _write_header(file, bits, 0, encoder.width)
        for first in range(0, len(different), batch_size):
            batch = encoder.encode(different[first : first + batch_size])
            states = batch.states[batch.mask].to(DTYPES[bits])
            if not states.isfinite().all():
                raise UserError("states of this text encoder are too large for half precision: keep 32 bits")
            file.write(states.cpu().numpy().tobytes())
            offsets += (offsets[-1] + batch.mask.sum(dim=1).cumsum(dim=0)).tolist()
            bar.update(len(batch))
        # Only now is their number known; the header has room for it.
        file.seek(0)
        _write_header(file, bits, offsets[-1], encoder.width)
    number = {text: index for index, text in enumerate(different)}
    return torch.tensor(offsets), {
        split: torch.tensor([number[text] for text in part]) for split, part in texts.items()
    }


def _write_header(file: IO[bytes], bits: int, count: int, width: int) -> None:
    table = {"descr": f"<f{bits // 8}", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, table)
