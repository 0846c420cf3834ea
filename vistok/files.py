"""Files and folders that appear whole or not at all, and safetensors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistok.errors import UserError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file (or folder) beside ``path``, then rename it: no final name is half-written.

    Raises:
        UserError: if the disk refuses; what stood at ``path`` before is untouched.
    """
    with _in_place_of(Path(path)) as partial:
        write(partial)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; raises as :func:`write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text))


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block succeeds and vanishes when it fails.

    Raises:
        UserError: if something is at ``path`` already (an empty folder may be), or the disk refuses.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another folder")
    with _in_place_of(path) as partial:
        partial.mkdir()
        yield partial


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; use it inside :func:`write_atomically` or a folder that is not yet in its place."""
    # safetensors makes files that only their owner may read: give them the mode of any new file.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: if it is missing, truncated or something else.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights not found: {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no complete safetensors file: {error}") from None


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``: what the block puts there takes the place of ``path``, or vanishes if it fails.

    Raises:
        UserError: if the disk refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # a folder of a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        if cause := _disk_error(error):
            raise UserError(f"cannot write {path}: {cause}") from error
        raise


def _disk_error(error: BaseException | None) -> BaseException | None:
    """What the disk said, if ``error`` is of its making.

    ``torch.save`` covers whatever interrupts its writing (a full disk, but Ctrl-C too) with words of its own.
    """
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        error = error.__context__
    return error if isinstance(error, (OSError, SafetensorError)) else None
