"""Every registered model at its tiny size, with random weights, and token specs of every shape."""

import torch

from tiny_models.args import TINY_ARGS
from vistok.config import Component, build
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
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny_component(kind, name):
    return Component(name, TINY_ARGS[kind][name])


def make_tokenizer(name):
    return randomized(build("tokenizers", tiny_component("tokenizers", name)))


def make_generator(name, spec):
    return randomized(build("generators", tiny_component("generators", name), spec))


def component_of(kind, model):
    """The component that ``model`` was built from."""
    return tiny_component(kind, type(model).__module__.rsplit(".", 1)[-1])
