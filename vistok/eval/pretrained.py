"""Models of ``transformers`` from a folder, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vistok.checkpoint import module_hash
from vistok.errors import UserError, first_line
from vistok.key_maps import is_repository

_NOT_HASHED = {"image_processor_type", "processor_class", "transformers_version", "auto_map"}


def load_pretrained(kind: Any, source: str, flag: str, device: torch.device | str) -> Any:
    """A whole model, in evaluation mode: transformers itself would fill in what is missing with noise.

    Args:
        kind: class of the model, or an ``Auto`` class.
        source: folder of the model, or a repository of the Hugging Face hub.
        flag: of the command line, for error messages.
        device: where to put it.

    Raises:
        UserError: as :func:`from_folder`, or naming a weight that is missing.
    """
    model, report = from_folder(kind, source, flag, output_loading_info=True)
    if lacking := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise UserError(
            f"{flag} {source} lacks {len(lacking)} weights of a {type(model).__name__}, such as {lacking[0]}"
        )
    return model.to(device).eval().requires_grad_(False)


def from_folder(kind: Any, source: str, flag: str, **options: Any) -> Any:
    """``kind.from_pretrained``, without the network for a folder.

    Raises:
        UserError: saying what the folder must hold if it is none, or cannot be read.
    """
    import transformers

    needed = (
        "(needed: a folder as transformers saves it, with config.json, preprocessor_config.json and model.safetensors, "
        "or OWNER/REPOSITORY of the Hugging Face hub)"
    )
    path = Path(source)
    if not path.is_dir() and not is_repository(path):
        raise UserError(f"{flag}: no such folder: {source} {needed}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return kind.from_pretrained(source, local_files_only=path.is_dir(), **options)
    except Exception as error:  # transformers raises whatever its parsers and its transport do
        raise UserError(f"{flag} {source} cannot be read: {first_line(error)} {needed}") from None


def whole_hash(model: nn.Module, processor: Any) -> str:
    """SHA-256 of a model's weights and of what its processor makes of an image before: size, filter, mean and so on."""
    prepared = json.loads(getattr(processor, "image_processor", processor).to_json_string())
    # Without what changes with the version of transformers or the place of the files.
    kept = {name: prepared[name] for name in prepared.keys() - _NOT_HASHED if not name.startswith("_")}
    return module_hash(model, kept)


def summary_of(output: Any) -> Float[Tensor, "B D"]:
    """The one vector of each image or text in what a model returns: a record since transformers 5, a tensor before."""
    return getattr(output, "pooler_output", output)
