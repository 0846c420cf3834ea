"""Other people's weights: where their files are, how they are read, and how their tensors are called here."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import UserError, first_line

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def is_repository(source: str | Path) -> bool:
    """Whether ``source``, if there is no such path, can be ``OWNER/REPOSITORY`` of the Hugging Face hub."""
    path = Path(source)
    return not path.is_absolute() and len(path.parts) == 2 and path.suffix not in WEIGHT_SUFFIXES


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
    given = Path(path_or_hub_id)
    path = given / names[-1] if names and given.is_dir() else given
    if path.is_file():
        return path
    parts = given.parts
    wanted = names if is_repository(given) else parts[2:] and ("/".join(parts[2:]),)
    if given.is_absolute() or given.is_dir() or not wanted:
        hub = "/".join(["OWNER/REPOSITORY", *([] if names else ["FILE"])])
        raise UserError(f"published {what} not found: {path} (a file, or {hub} of the Hugging Face hub)")
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download("/".join(parts[:2]), name)) for name in wanted][-1]
    except Exception as error:  # the client raises whatever its transport does
        raise UserError(
            f"{path_or_hub_id} is neither a file nor one of a repository that can be reached: {first_line(error)}"
        ) from None


def published_folder(path_or_hub_id: str, what: str) -> Path:
    """The folder of a model as ``transformers`` lays it out, fetched from the hub unless there is such a path.

    Args:
        path_or_hub_id: the folder, or ``OWNER/REPOSITORY`` of the Hugging Face hub.
        what: whose it is, for error messages.

    Raises:
        UserError: if there is neither.
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    if not is_repository(path_or_hub_id):
        raise UserError(f"{what} not found: {path_or_hub_id} (a folder, or OWNER/REPOSITORY of the Hugging Face hub)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except Exception as error:  # the client raises whatever its transport does
        raise UserError(
            f"{path_or_hub_id} is neither a folder nor a repository that can be reached: {first_line(error)}"
        ) from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors of a folder as transformers lays it out: one file, or the parts that its index names.

    Raises:
        UserError: if there is none, or the index cannot be read.
    """
    weights = Path(folder) / "model.safetensors"
    index = weights.with_name(f"{weights.name}.index.json")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is no index of weights: {first_line(error)}") from None
        return [Path(folder) / name for name in names]
    if not weights.is_file():
        raise UserError(f"{folder} has no weights: supply {weights.name}, or {index.name} and its parts")
    return [weights]


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


TIMM_BLOCK = {
    "attention_norm": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
"""Layers of a transformer block: our names, and timm's, which most releases have."""


def layer_rules(ours: str, theirs: str, names: Mapping[str, str] | None = None) -> list[KeyRule]:
    """Weight and bias of one layer, or of all layers that are called by ``names`` (ours to theirs) below it."""
    layers = {f"{ours}.{own}": f"{theirs}.{name}" for own, name in names.items()} if names else {ours: theirs}
    return [
        KeyRule(f"{own}.{part}", (f"{name}.{part}",)) for own, name in layers.items() for part in ("weight", "bias")
    ]


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


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
