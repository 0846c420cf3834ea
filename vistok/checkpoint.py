"""Exports: a folder that rebuilds a model with no other input; and the loading of foreign weights.

    model.safetensors   weights (EMA where the run has one)
    config.yaml         kind, name, args: what ``vistok.config.build`` needs
    spec.json           token spec, which weights; for a generator the tokenizer's folder and hash, and the text encoder
    vae/ ...            frozen helpers, under the name of the argument that wants their folder

A run folder is an export folder, so every command line takes either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vistok.config import Component, build, read_yaml, to_yaml
from vistok.errors import UserError, first_line
from vistok.interfaces import Autoencoder, Generator, TextEncoder, Tokenizer
from vistok.tokens import TokenSpec

WEIGHTS, CONFIG, SPEC = "model.safetensors", "config.yaml", "spec.json"
HERE = "./"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file (or folder) beside ``path``, then rename it: no final name is half-written.

    Raises:
        UserError: if the disk refuses; what stood at ``path`` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {_disk_error(error)}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; raises as :func:`write_atomically`."""
    write_atomically(path, lambda partial: partial.write_text(text))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; use it inside :func:`write_atomically` or a folder that is not yet in its place."""
    # safetensors makes files that only their owner may read: give them the mode of any new file.
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)


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
    generator_folder: str | Path, given: str | Path | None = None, device: str | torch.device = "cpu"
) -> TextEncoder:
    """The text encoder that an exported generator was trained with, in eval mode.

    Args:
        generator_folder: export of the generator.
        given: folder of the text encoder; by default the recorded one.
        device: where to put it.

    Raises:
        UserError: if none is recorded, it is gone, or it cannot be read.
    """
    info = _info_of_kind(generator_folder, "generator")
    if "text_encoder" not in info:
        raise UserError(f"{generator_folder} does not say which text encoder it was trained with")
    recorded = info["text_encoder"]
    args = _seen_from_outside(recorded["args"], generator_folder)
    if given:
        args["path"] = str(given)
    elif _is_here(recorded["args"].get("path")) and not Path(args["path"]).is_dir():
        raise UserError(f"{generator_folder}: its text encoder is not at {args['path']}; give it with --text-encoder")
    return build("text_encoders", Component(recorded["name"], args)).to(device).eval()


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


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors of a folder as transformers lays it out: one file, or the parts that its index names.

    Raises:
        UserError: if there is none, or the index cannot be read.
    """
    index = Path(folder) / f"{WEIGHTS}.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is no index of weights: {first_line(error)}") from None
        return [Path(folder) / name for name in names]
    if not (Path(folder) / WEIGHTS).is_file():
        raise UserError(f"{folder} has no weights: supply {WEIGHTS}, or {index.name} and its parts")
    return [Path(folder) / WEIGHTS]


def load_torch_file(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU; read as data, nothing in it is ever run.

    Raises:
        UserError: if it is missing, truncated, or holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of a training script
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights not found: {path}") from None
    except Exception:  # torch.load raises whatever its parsers do, in many words
        raise UserError(f"{path} is no complete torch file of plain weights") from None


def published_file(path_or_hub_id: str, what: str, *names: str) -> Path:
    """The file of a release, fetched from the hub unless there is such a path.

    Args:
        path_or_hub_id: a file, or ``OWNER/REPOSITORY/FILE`` of the Hugging Face hub; with ``names`` also a folder, or
            ``OWNER/REPOSITORY``.
        what: whose release, for error messages.
        names: files that the release keeps in one folder; the last is the one wanted, the others shall lie beside it.

    Raises:
        UserError: if there is neither.
    """
    path = Path(path_or_hub_id)
    if names and path.is_dir():
        path = path / names[-1]
    if path.is_file():
        return path
    parts = path_or_hub_id.split("/")
    wanted = names if len(parts) == 2 and path.suffix not in WEIGHT_SUFFIXES else tuple(parts[2:])
    if path.is_absolute() or len(parts) not in (2, 3) or not wanted:
        hub = "/".join(["OWNER/REPOSITORY", *([] if names else ["FILE"])])
        raise UserError(f"published {what} not found: {path} (a file, or {hub} of the Hugging Face hub)")
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download("/".join(parts[:2]), name)) for name in wanted][-1]
    except Exception as error:  # the client raises whatever its transport does
        raise UserError(
            f"{path_or_hub_id} is neither a file nor one of a repository that can be reached: {first_line(error)}"
        ) from None


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load ``state`` into ``model``; every key must be there with its shape, and nothing else.

    Raises:
        UserError: naming the first offending keys and shapes.
    """
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    foreign = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({_some(keys)})" for what, keys in (("missing", missing), ("foreign", foreign)) if keys
    ]
    problems += [f"{len(shapes)} of another shape ({_some(shapes)})"] if shapes else []
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}: keys {'; '.join(problems)}")
    model.load_state_dict(state, strict=True)


# ---------------------------------------------------------------------- foreign layouts


@dataclass(frozen=True)
class KeyRule:
    """How one tensor of ours (``{i}`` stands for a number) is made of published ones.

    Args:
        ours: our key.
        theirs: published keys, concatenated along the first dimension (equal parts on the way back).
        forward: applied to the concatenation; with ``inverse`` for the way back.
        inverse: undoes ``forward``.
        last_rows: of the last of ``theirs``, where its part is not equal to that of the other.
    """

    ours: str
    theirs: tuple[str, ...]
    forward: Callable[[Tensor], Tensor] | None = None
    inverse: Callable[[Tensor], Tensor] | None = None
    last_rows: int | None = None


def layer_rules(ours: str, theirs: str) -> list[KeyRule]:
    """Weight and bias of one layer."""
    return [KeyRule(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("weight", "bias")]


class KeyMap:
    """A named, invertible map between a published state-dict layout and ours.

    Args:
        name: for error messages.
        rules: one for each kind of tensor.
    """

    def __init__(self, name: str, rules: list[KeyRule]) -> None:
        self.name, self.rules = name, rules

    def to_ours(self, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict.

        Raises:
            UserError: for published keys that no rule reads, or parts of a rule that are missing.
        """
        ours, used = {}, set()
        for rule in self.rules:
            for number in _numbers(rule.theirs[0], published):
                parts = [key.replace("{i}", number) for key in rule.theirs]
                if absent := [key for key in parts if key not in published]:
                    raise UserError(f"{self.name}: {_some(absent)} missing")
                used.update(parts)
                value = torch.cat([published[key] for key in parts]) if len(parts) > 1 else published[parts[0]]
                ours[rule.ours.replace("{i}", number)] = rule.forward(value) if rule.forward else value
        if foreign := sorted(published.keys() - used):
            raise UserError(f"{self.name}: unknown key(s) {_some(foreign)}")
        return ours

    def to_published(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published state dict; inverse of :meth:`to_ours`, raises alike."""
        published, used = {}, set()
        for rule in self.rules:
            for number in _numbers(rule.ours, ours):
                key = rule.ours.replace("{i}", number)
                used.add(key)
                value = rule.inverse(ours[key]) if rule.inverse else ours[key]
                parts = value.tensor_split([-rule.last_rows] if rule.last_rows else len(rule.theirs))
                published.update({name.replace("{i}", number): part for name, part in zip(rule.theirs, parts)})
        if foreign := sorted(ours.keys() - used):
            raise UserError(f"{self.name}: unknown key(s) {_some(foreign)}")
        return published


def _numbers(pattern: str, keys: Mapping[str, Any]) -> list[str]:
    """Values of ``{i}`` for which ``pattern`` names one of ``keys`` ([""] for a pattern without ``{i}``)."""
    if "{i}" not in pattern:
        return [""] if pattern in keys else []
    expression = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return [match.group(1) for key in keys if (match := expression.fullmatch(key))]


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


def _disk_error(error: BaseException) -> BaseException:
    """The operating system's words behind ``error``: torch.save covers "No space left" with words of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
