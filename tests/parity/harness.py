"""Reading parity cases: inputs and weights are rebuilt from their description, outputs are compared with it.

A case is ``SYSTEM/NAME.json`` + ``SYSTEM/NAME.safetensors``: what a published implementation computed, on weights that
are filled from the keys of its state dict. The runner of the case's ``component`` returns our outputs by name.
"""

import json
import math
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

CASES = Path(os.environ.get("VISTOK_PARITY_CASES") or Path(__file__).parent / "cases")
RUNNERS = {}
INPUT_KINDS = {}


def runner(component):
    """Decorator: what it decorates computes our outputs, by name, for cases of ``component``."""

    def register(function):
        RUNNERS[component] = function
        return function

    return register


def input_kind(name):
    """Decorator: what it decorates makes the inputs of this kind from their description."""

    def register(function):
        INPUT_KINDS[name] = function
        return function

    return register


def filled(key, shape):
    """The tensor that belongs to ``key``: normal, scaled by its fan-in; vectors near 1, biases near 0."""
    draws = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(math.prod(shape))
    values = torch.from_numpy(draws.astype(np.float32)).reshape(shape)
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return values * 0.02 if key.endswith("bias") else 1 + values * 0.05


def wave_images(batch, size, seed):
    """Smooth test images: for each channel the mean of four plane waves with random direction and phase."""
    random = np.random.RandomState(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    images = np.zeros((batch, 3, size, size))
    for index in np.ndindex(batch, 3, 4):
        fx, fy, phase = random.uniform(-6, 6), random.uniform(-6, 6), random.uniform(0, 2 * np.pi)
        images[index[:2]] += np.sin(2 * np.pi * (fx * columns + fy * rows) + phase) / 4
    return torch.from_numpy(images.astype(np.float32))


def imagenet_pixels(images):
    """Images in [-1, 1] as models of ImageNet read them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((images + 1) / 2 - mean) / std


@dataclass(frozen=True)
class Case:
    """One case; everything is read on demand."""

    path: Path

    @cached_property
    def json(self):
        return json.loads(self.path.read_text())

    @cached_property
    def stored(self):
        file = self.path.with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}

    @property
    def name(self):
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def config(self):
        return self.json["config"]

    def weights(self, prefix=""):
        """The published state dict, or the part of it behind ``prefix`` (which is cut off).

        Without the :attr:`constants`: those are what a constructor makes of itself.
        """
        stored = self.json.get("stored_weights", {})
        factors = self.json.get("fill", {})
        state = {}
        for key, shape in self.json["keys"].items():
            if not key.startswith(prefix) or key in self.constants:
                continue
            if key in stored:
                value = self.stored[stored[key]]
            else:
                value = filled(key, tuple(shape))
                for pattern, factor in factors.items():
                    if re.search(pattern, key):
                        value = value * factor
            state[key.removeprefix(prefix)] = value
        return state

    @cached_property
    def constants(self):
        """Published keys that keep the values of the constructor and are not stored."""
        kept = "|".join(self.json.get("fill_keep", [])) or r"(?!)"
        stored = self.json.get("stored_weights", {})
        return {key for key in self.json["keys"] if re.search(kept, key) and key not in stored}

    @cached_property
    def inputs(self):
        """Input tensors by name."""
        return {name: self._input(description) for name, description in self.json["inputs"].items()}

    def _input(self, description):
        if "stored" in description:
            return self.stored[description["stored"]]
        if "value" in description:
            return description["value"]
        kind = description["kind"]
        if kind in INPUT_KINDS:
            return INPUT_KINDS[kind](description)
        if kind == "values":
            return torch.tensor(description["values"])
        if kind in ("image", "image_batch"):
            images = wave_images(description["batch"], description["size"], description["seed"])
            width = description.get("width") or description.get("crop_width")
            images = images[..., :width] * description.get("contrast", 1.0)
            return imagenet_pixels(images) if description.get("normalise") == "imagenet" else images
        random = np.random.RandomState(description["seed"])
        if kind == "randint":
            return torch.from_numpy(random.randint(description["low"], description["high"], description["shape"]))
        if kind in ("normal", "randn"):
            draws = random.standard_normal(description["shape"]).astype(np.float32)
            return torch.from_numpy(draws) * description.get("scale", 1.0)
        raise ValueError(f"{self.name}: unknown kind of input {kind!r}")

    def check(self, outputs):
        """Compare ``outputs`` with what the published implementation computed; returns the problems found."""
        problems = []
        for name, expected in self.json["outputs"].items():
            if name not in outputs:
                problems.append(f"{name}: the runner computed no such output")
                continue
            got = outputs[name].detach()
            if list(got.shape) != list(expected["shape"]):
                problems.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected['shape'])}")
                continue
            reference = self.stored[expected["stored"]]
            if stride := expected.get("stride"):
                got = got.flatten()[::stride]
            got = got.reshape(reference.shape).double()
            tolerance = self.json["tolerance"][name]
            bound = tolerance["atol"] + tolerance["rtol"] * reference.double().abs()
            excess = (got - reference.double()).abs() - bound
            if not bool((excess <= 0).all()):
                count = int((~(excess <= 0)).sum())
                problems.append(f"{name}: {count} of {excess.numel()} beyond tolerance, worst by {excess.max():.3g}")
        return problems


def find_cases(folder=CASES):
    """All cases below ``folder``, sorted."""
    return [Case(path) for path in sorted(Path(folder).glob("*/*.json"))]
