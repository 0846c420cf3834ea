"""Every registered model at its tiny size, with random weights, and token specs of every shape."""

import tempfile
from functools import cache
from typing import get_type_hints

import torch

from tiny_models.args import TINY_ARGS
from vistok.checkpoint import export
from vistok.config import Component, available, build, component_module, to_plain
from vistok.tokens import Grid2D, MultiScale, Ordered1D, TokenSpec

SPECS = {
    "ordered": TokenSpec(Ordered1D(6), (11,), 2, 16),
    "grid": TokenSpec(Grid2D(3, 5), (11,), 2, 16),
    "multi-scale": TokenSpec(MultiScale(((1, 1), (2, 3))), (11,), 2, 16),
    "slots": TokenSpec(Grid2D(2, 2), (3, 7), 2, 16),
    "continuous": TokenSpec(Grid2D(2, 2), (), 2, 16),
}
"""Odd shapes on purpose: nothing may guess a square grid, equal vocabularies or one slot."""


def randomized(model, seed=0):
    """Random weights everywhere: the zero-initialised heads of a fresh model would satisfy any law."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / fan_in**0.5)
    return model.eval()


def tiny_component(kind, name):
    args = TINY_ARGS[kind][name]
    if "tokenizer" in args:
        args = {**args, "tokenizer": exported_tokenizer(args["tokenizer"]).name}
    return Component(name, args)


@cache
def exported_tokenizer(name):
    """An export of a tiny tokenizer that lasts as long as the tests."""
    folder = tempfile.TemporaryDirectory()
    model = make_tokenizer(name)
    export(folder.name, "tokenizer", component_of(model), model.spec, model.state_dict())
    return folder


def tokenizer_names(kind):
    """Registered tokenizers that are a ``kind``."""
    kinds = {name: get_type_hints(component_module("tokenizers", name).build) for name in available("tokenizers")}
    return [name for name, hints in kinds.items() if issubclass(hints["return"], kind)]


def make_tokenizer(name, **args):
    component = tiny_component("tokenizers", name)
    return randomized(build("tokenizers", Component(name, {**component.args, **args})))


def make_generator(name, spec, **args):
    component = tiny_component("generators", name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of buffers, which are no parameters
        return randomized(build("generators", Component(name, {**component.args, **args}), spec))


def component_of(model):
    """The component that ``model`` was built from."""
    return Component(type(model).__module__.rsplit(".", 1)[-1], to_plain(model.config))
