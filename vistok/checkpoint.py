"""Exports: a folder that rebuilds a model with no other input.

    model.safetensors   weights (EMA where the run has one)
    config.yaml         kind, name, args: what ``vistok.config.build`` needs
    spec.json           token spec, which weights; for a generator the tokenizer's folder and hash, and the text encoder
    vae/ ...            frozen helpers, under the name of the argument that wants their folder

A run folder is an export folder, so every command line takes either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.config import Component, build, read_yaml, to_yaml
from vistok.errors import UserError
from vistok.files import load_weights, save_tensors, write_atomically, write_text
from vistok.interfaces import Autoencoder, Generator, TextEncoder, Tokenizer
from vistok.key_maps import load_strictly
from vistok.tokens import TokenSpec

WEIGHTS, CONFIG, SPEC = "model.safetensors", "config.yaml", "spec.json"
HERE = "./"


def export(
    folder: str | Path,
    kind: str,
    component: Component,
    spec: TokenSpec,
    state_dict: Mapping[str, Tensor],
    extra: dict[str, Any] | None = None,
    helpers: Mapping[str, Any] | None = None,
) -> None:
    """Write an export folder.

    Args:
        folder: made if absent.
        kind: ``tokenizer`` or ``generator``.
        component: name and full arguments of the model.
        spec: what it emits or models.
        state_dict: its weights.
        extra: plain values for ``spec.json``.
        helpers: :attr:`~vistok.interfaces.Tokenizer.frozen_helpers`; each is copied once, and its argument in the
            export becomes ``./name``: a path that begins so is meant from the export folder.
    """
    folder = Path(folder)
    for name, helper in (helpers or {}).items():
        if not (folder / name).exists():
            write_atomically(folder / name, helper.save_pretrained)
        component = Component(component.name, {**component.args, name: HERE + name})
    weights = {key: value.detach().contiguous().cpu() for key, value in state_dict.items()}
    config = to_yaml({"kind": kind, "name": component.name, "args": component.args})
    details = json.dumps({"spec": spec.to_dict(), **(extra or {})}, indent=2)
    # The weights first: a disk that fills up on them must not leave the old ones under the news of the new ones.
    write_atomically(folder / WEIGHTS, lambda path: save_tensors(path, weights))
    write_text(folder / CONFIG, config)
    write_text(folder / SPEC, details + "\n")


@dataclass(frozen=True)
class ExportFolder:
    """An export as a frozen helper of another model, which then carries a copy.

    Args:
        path: where it lies; the copy holds the export alone, not what else a run has left there.
    """

    path: str | Path

    def save_pretrained(self, folder: Path) -> None:
        """Copy the export to ``folder``: it has the same :func:`export_hash`."""
        source = Path(self.path)
        helpers = _helper_folders(source)
        folder.mkdir(parents=True)
        for name in (WEIGHTS, CONFIG, SPEC):
            shutil.copy(source / name, folder / name)
        for helper in helpers:
            shutil.copytree(helper, folder / helper.relative_to(source))


def export_info(folder: str | Path) -> dict[str, Any]:
    """Everything an export says about itself: ``kind``, ``name``, ``args``, ``spec`` and the extras.

    Raises:
        UserError: if the folder is no complete export, naming the missing file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder not found: {folder}")
    for name in (CONFIG, SPEC, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no export: {name} is missing (train.py writes it at every checkpoint)")
    try:
        details = json.loads((folder / SPEC).read_text())
        spec = TokenSpec.from_dict(details["spec"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SPEC} is damaged: {error}") from None
    config = read_yaml(folder / CONFIG)
    if config.get("kind") not in ("tokenizer", "generator"):
        raise UserError(f"{folder / CONFIG}: kind must be tokenizer or generator, got {config.get('kind')!r}")
    if not isinstance(config.get("name"), str) or not isinstance(config.get("args"), dict):
        raise UserError(f"{folder / CONFIG} is damaged: it needs a name and args")
    return {**config, **details, "spec": spec}


def export_hash(folder: str | Path) -> str:
    """SHA-256 of an export's weights, configuration and frozen helpers, hex."""
    folder = Path(folder)
    files = [folder / CONFIG, folder / WEIGHTS]
    for helper in _helper_folders(folder):
        files += sorted(path for path in helper.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def module_hash(module: nn.Module, *settings: Any) -> str:
    """SHA-256 of a module's weights and of plain ``settings``, hex; the same on every device."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
    """The exported tokenizer, in eval mode.

    Raises:
        UserError: if the folder is no tokenizer export, its weights are truncated or foreign, or it has no codes.
    """
    model = load_autoencoder(folder, device)
    if not isinstance(model, Tokenizer):
        raise UserError(
            f"{folder} holds a continuous tokenizer: give it codes (python -m vistok.discretize --tokenizer {folder})"
        )
    return model


def load_autoencoder(folder: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """The exported tokenizer, discrete or continuous, in eval mode.

    Raises:
        UserError: if the folder is no tokenizer export, or its weights are truncated or foreign.
    """
    info = _info_of_kind(folder, "tokenizer")
    component = Component(info["name"], _seen_from_outside(info["args"], folder))
    model = build("tokenizers", component, where=str(Path(folder) / CONFIG))
    return _with_weights(model, folder, device)


def load_generator(folder: str | Path, device: str | torch.device = "cpu") -> Generator:
    """The exported generator, in eval mode; raises as :func:`load_tokenizer`."""
    info = _info_of_kind(folder, "generator")
    component = Component(info["name"], info["args"])
    model = build("generators", component, info["spec"], where=str(Path(folder) / CONFIG))
    return _with_weights(model, folder, device)


def tokenizer_folder(generator_folder: str | Path, given: str | Path | None = None) -> Path:
    """The tokenizer that an exported generator was trained on: where it was, or where the user says it is now.

    Args:
        generator_folder: export of the generator.
        given: folder of the tokenizer; by default the recorded one, relative to the generator's folder.

    Raises:
        UserError: if it is gone, or is not the tokenizer whose hash the generator recorded.
    """
    info = _info_of_kind(generator_folder, "generator")
    if not {"tokenizer", "tokenizer_hash"} <= info.keys():
        raise UserError(f"{generator_folder} does not say which tokenizer it was trained on")
    folder = Path(given) if given else Path(generator_folder) / info["tokenizer"]
    if not given and not folder.is_dir():
        raise UserError(f"{generator_folder}: its tokenizer is not at {folder}; give it with --tokenizer")
    _info_of_kind(folder, "tokenizer")
    if export_hash(folder) != info["tokenizer_hash"]:
        raise UserError(
            f"{folder} is not the tokenizer that {generator_folder} was trained on (hash "
            f"{export_hash(folder)[:12]}, expected {info['tokenizer_hash'][:12]}): it was retrained or replaced"
        )
    return folder


def seen_from(folder: str | Path, component: Component) -> Component:
    """``component`` with the folders among its arguments as paths ``./...`` from ``folder``, for an export there."""
    args = {
        name: HERE + os.path.relpath(value, folder) if isinstance(value, str) and Path(value).is_dir() else value
        for name, value in component.args.items()
    }
    return Component(component.name, args)


def load_text_encoder(
    generator_folder: str | Path,
    given: str | Path | None = None,
    device: str | torch.device = "cpu",
    on_long: str | None = None,
) -> TextEncoder:
    """The text encoder that an exported generator was trained with, in eval mode.

    Args:
        generator_folder: export of the generator.
        given: folder of the text encoder; by default the recorded one.
        device: where to put it.
        on_long: ``cut`` or ``refuse`` texts that are too long; by default what is recorded.

    Raises:
        UserError: if none is recorded, it is gone, or it cannot be read.
    """
    info = _info_of_kind(generator_folder, "generator")
    if "text_encoder" not in info:
        raise UserError(f"{generator_folder} does not say which text encoder it was trained with")
    recorded = info["text_encoder"]
    args = _seen_from_outside(recorded["args"], generator_folder) | ({"on_long": on_long} if on_long else {})
    if given:
        args["path"] = str(given)
    elif _is_here(recorded["args"].get("path")) and not Path(args["path"]).is_dir():
        raise UserError(f"{generator_folder}: its text encoder is not at {args['path']}; give it with --text-encoder")
    return build("text_encoders", Component(recorded["name"], args)).to(device).eval()


# ---------------------------------------------------------------------- helpers


def _is_here(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(HERE)


def _helper_folders(folder: Path) -> list[Path]:
    """The frozen helpers that an export carries."""
    args = export_info(folder)["args"]
    return [folder / value for value in args.values() if _is_here(value)]


def _seen_from_outside(args: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Arguments of an export with its paths ``./...`` as paths of this process."""
    return {name: str(Path(folder) / value) if _is_here(value) else value for name, value in args.items()}


def _info_of_kind(folder: str | Path, kind: str) -> dict[str, Any]:
    info = export_info(folder)
    if info["kind"] != kind:
        raise UserError(f"{folder} holds a {info['kind']} ({info['name']}), expected a {kind}")
    return info


def _with_weights(model: Any, folder: str | Path, device: str | torch.device) -> Any:
    load_strictly(model, load_weights(Path(folder) / WEIGHTS), Path(folder) / WEIGHTS)
    return model.to(device).eval()
