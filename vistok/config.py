"""Configuration: YAML plus ``key=value`` -> typed dataclasses -> objects.

A component of a run is written ``{name: flextok, args: {...}}``. ``name`` is a module of one of the packages
``vistok.tokenizers``, ``vistok.generators``, ``vistok.text_encoders`` and ``vistok.data``; ``args`` is merged onto the
``Config`` dataclass of that module and given to its ``build``. A dotted name (``mylab.models.mytok``) reaches a module
outside vistok. Every key is closed: an unknown key, a wrong type or a missing value is one line that names the place
and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from vistok.errors import UserError, first_line

T = TypeVar("T")


@dataclass
class Component:
    """A named part of a run and its arguments."""

    name: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        UserError: if the file is missing, is not YAML or holds no mapping.
    """
    try:
        data = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return data


def parse_overrides(pairs: list[str]) -> dict:
    """The nested mapping that ``a.b=1 c=true`` stands for.

    Raises:
        UserError: for a word that is not ``key=value``.
    """
    for pair in pairs:
        if "=" not in pair or pair.startswith(("=", "-")):
            raise UserError(f"expected key=value, got {pair!r}")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(pairs))  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"cannot read the overrides {' '.join(pairs)!r}: {first_line(error)}") from None


def typed(config_type: type[T], data: dict, where: str, overrides: dict | None = None) -> T:
    """Merge ``data`` and then ``overrides`` onto the defaults of the dataclass ``config_type``.

    Args:
        config_type: dataclass with OmegaConf-compatible field types.
        data: nested plain values.
        where: what to call the source in error messages (a file, a component).
        overrides: values that win over ``data``.

    Raises:
        UserError: for an unknown key (with the nearest valid one), a wrong type or a missing value.
    """
    merged = OmegaConf.structured(config_type)
    for source, values in ((where, data), ("command line", overrides or {})):
        try:
            merged = OmegaConf.merge(merged, values)
        except ConfigKeyError as error:
            raise UserError(f"{source}: {_unknown_key(error, config_type)}") from None
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {error.full_key or 'config'}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{where}: missing value for {', '.join(missing)}")
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def to_plain(config: Any) -> Any:
    """A dataclass config as nested dicts and lists, ready for YAML."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def to_yaml(config: Any) -> str:
    """A dataclass config (or plain mapping) as YAML text, in field order."""
    return yaml.safe_dump(to_plain(config) if dataclasses.is_dataclass(config) else config, sort_keys=False)


def available(kind: str) -> list[str]:
    """Names that can be built: the modules of ``vistok.<kind>`` that have a ``Config`` and a ``build``."""
    package = importlib.import_module(f"vistok.{kind}")
    names = (module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    modules = {name: _import(kind, name) for name in names}
    return sorted(name for name, module in modules.items() if hasattr(module, "Config") and hasattr(module, "build"))


def component_module(kind: str, name: str) -> ModuleType:
    """The module that ``name`` stands for.

    Raises:
        UserError: if there is none, with the nearest names that exist.
    """
    try:
        module = _import(kind, name)
    except ModuleNotFoundError as error:
        if error.name and not f"vistok.{kind}.{name}".startswith(error.name) and not name.startswith(error.name):
            raise
        module = None
    if module is None or not hasattr(module, "build"):
        raise UserError(
            f"no {kind[:-1] if kind.endswith('s') else kind} named {name!r}{nearest(name, available(kind))}"
        )
    return module


def component_config(kind: str, component: Component, where: str = "") -> Any:
    """``component.args`` on the defaults of its module's ``Config``."""
    module = component_module(kind, component.name)
    return typed(module.Config, component.args, f"{where + ': ' if where else ''}{kind}.{component.name}")


def build(kind: str, component: Component, *runtime: Any, where: str = "") -> Any:
    """The object that ``component`` describes; ``runtime`` values (a token spec, a split) go to ``build`` as they are.

    Raises:
        UserError: as :func:`typed` and :func:`component_module`.
    """
    config = component_config(kind, component, where)
    return component_module(kind, component.name).build(config, *runtime)


def nearest(name: str, valid: list[str]) -> str:
    """What an error message says after an unknown ``name``: the nearest valid one and all that are valid."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (valid: {', '.join(valid)})"


def _import(kind: str, name: str) -> ModuleType:
    return importlib.import_module(name if "." in name else f"vistok.{kind}.{name}")


def _unknown_key(error: ConfigKeyError, config_type: type) -> str:
    key = str(error.full_key or error.key)
    leaf = key.rsplit(".", 1)[-1]
    node = error.parent_node
    valid = list(node.keys()) if node is not None else [f.name for f in dataclasses.fields(config_type)]  # type: ignore[arg-type]
    return f"unknown key {key!r}{nearest(leaf, valid)}"
