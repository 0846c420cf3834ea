"""What a measured number means: the protocol of one evaluation, its fingerprint and its result file.

Two numbers may stand in one table only if everything but the model was the same. :class:`EvalProtocol` lists that
"everything"; its fingerprint is printed with every number, and :func:`compare` refuses to mix fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vistok.errors import UserError
from vistok.files import write_text

_NOT_IN_FINGERPRINT = ("models",)
_PIXELS = "pixels_sha256"


@dataclass(frozen=True)
class EvalProtocol:
    """The conditions of one evaluation, as plain JSON values.

    Args:
        task: "reconstruction", "generation", "geneval", "dpg", "genai", "compbench", "object-binding" or "probe".
        data: the dataset's own ``description``: which images, and the rule (such as "adm_center_crop") that says how
            they are cropped, with which filter they are resized.
        split: of the images reconstructed ("all" if none were held out), or held out when copies are counted.
        count: images reconstructed or sampled.
        image_size_px: side of the images that the metrics see; 0 where only verdicts on them are known.
        quantised: metrics see uint8 images, rounded.
        weights: "ema" or "raw", for each component that took part.
        settings: decode options, and sampling options or prefix lengths; of a probe, options of the features.
        seed: names the decoder's and the generator's noise.
        features: ``{"name", "sha256", "resize", "dtype"}`` of the feature network, or what identifies a
            detector or judge; empty without one. ``resize`` is how the network brings images to its own size.
        reference: what distribution metrics compare with, or a probe was fitted to: ``{"images", "count",
            "pixels_sha256", ...}``, of which the count and the pixels are in the fingerprint and the rest is not: the
            same pixels may come from anywhere. Or ``{"images", "file_sha256"}`` of a file of statistics.
        definitions: which variant of each metric was computed.
        models: export hashes of the components that were measured. Not in the fingerprint: two models under one
            protocol compare.
    """

    task: str
    data: dict[str, Any]
    split: str
    count: int
    image_size_px: int
    quantised: bool
    weights: dict[str, str]
    settings: dict[str, Any]
    seed: int
    features: dict[str, str]
    reference: dict[str, Any]
    definitions: dict[str, Any]
    models: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """12 hex digits of the SHA-256 of the canonical JSON of all that two results must share, see above."""
        canonical = json.dumps(self._covered(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def differences(self, other: EvalProtocol) -> list[str]:
        """One "name: mine / theirs" line for each value of the fingerprint in which the two differ."""
        mine, theirs = (
            {name: json.dumps(value) for name, value in flatten(protocol._covered()).items()}
            for protocol in (self, other)
        )
        pairs = [(name, mine.get(name, "absent"), theirs.get(name, "absent")) for name in mine | theirs]
        return [f"{name}: {a} / {b}" for name, a, b in pairs if a != b]

    def _covered(self) -> dict[str, Any]:
        covered = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_FINGERPRINT}
        if _PIXELS in self.reference:
            covered["reference"] = {name: self.reference[name] for name in ("count", _PIXELS)}
        return covered


def save_result(path: Path, protocol: EvalProtocol, metrics: dict[str, Any], run: dict[str, Any] | None = None) -> None:
    """Write ``{"fingerprint", "protocol", "metrics", "run"}`` as JSON; ``path`` is whole or absent.

    Args:
        path: the file.
        protocol: the conditions.
        metrics: nested numbers by name.
        run: circumstances that do not change the numbers: command, seconds, memory, versions.
    """
    result = {
        "fingerprint": protocol.fingerprint,
        "protocol": asdict(protocol),
        "metrics": metrics,
        "run": run or {},
    }
    write_text(path, json.dumps(result, indent=2) + "\n")


def load_result(path: Path) -> tuple[EvalProtocol, dict[str, Any], dict[str, Any]]:
    """Protocol, metrics and run of a file of :func:`save_result`.

    Raises:
        UserError: if the file is missing, is not a result file or was edited so that its fingerprint is wrong.
    """
    try:
        result = json.loads(Path(path).read_text())
        protocol = EvalProtocol(**result["protocol"])
        fingerprint, metrics = result["fingerprint"], result["metrics"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not an evaluation result (written by python -m vistok.eval)") from None
    if fingerprint != protocol.fingerprint:
        raise UserError(f"{path}: the fingerprint {fingerprint} does not belong to its protocol; measure again")
    return protocol, metrics, result.get("run", {})


def number(value: float) -> str:
    """A value as tables show it."""
    return f"{value:.4g}"


def table_by_tokens(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of a result: numbers of tokens, then real images where they were measured too.

    A figure of real images is in the column of the same figure of samples; where it is of another number of images,
    this number stands beside it.
    """
    rows = dict(metrics["tokens"])
    columns = list(next(iter(rows.values())))
    table = [[name, *(number(row[column]) for column in columns)] for name, row in rows.items()]
    if "held_out" in metrics:
        count = metrics["counts"]["held_out"]
        cells = []
        for column in columns:
            value = of_figure(metrics["held_out"], column)
            same = column in metrics["held_out"]
            cells.append("-" if value is None else number(value) + ("" if same else f" (N={count})"))
        table.append([f"real held-out images (N={count})", *cells])
    return ["tokens", *columns], table


def of_figure(row: dict[str, float], name: str) -> float | None:
    """The value of a figure in another row, whose name may carry another number of images; None if it is not there."""
    return {_without_count(other): value for other, value in row.items()}.get(_without_count(name))


def _without_count(name: str) -> str:
    """``gFID (digits-cnn features)`` of ``gFID-500 (digits-cnn features)``."""
    return re.sub(r"-\d+k?(?= \()", "", name)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a / b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name} / ") if isinstance(value, dict) else {prefix + name: value}
    return flat


def compare(
    first: Path, second: Path, force: bool = False
) -> tuple[EvalProtocol, EvalProtocol, dict[str, tuple[float | None, float | None]]]:
    """The protocols of two result files, and the two values of every metric.

    Args:
        first: a result file.
        second: another.
        force: compare in spite of different protocols.

    Raises:
        UserError: if the fingerprints differ, with the fields that do.
    """
    (protocol_a, metrics_a, _), (protocol_b, metrics_b, _) = load_result(first), load_result(second)
    if protocol_a.fingerprint != protocol_b.fingerprint and not force:
        raise UserError(
            f"{first} ({protocol_a.fingerprint}) and {second} ({protocol_b.fingerprint}) were measured under different "
            f"protocols and do not compare (--force to see them anyway). "
            + "; ".join(protocol_a.differences(protocol_b))
        )
    a, b = flatten(metrics_a), flatten(metrics_b)
    return protocol_a, protocol_b, {name: (a.get(name), b.get(name)) for name in a | b}
