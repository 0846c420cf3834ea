import pytest
import torch
from tiny_models.args import TINY_ARGS

from vistok.config import Component, available, build
from vistok.errors import UserError
from vistok.tokens import Grid2D, MultiScale, Ordered1D, TokenSpec

SPECS = {
    "ordered": TokenSpec(Ordered1D(6), (11,), 2, 16),
    "grid": TokenSpec(Grid2D(3, 5), (11,), 2, 16),
    "multi-scale": TokenSpec(MultiScale(((1, 1), (2, 3))), (11,), 2, 16),
    "slots": TokenSpec(Grid2D(2, 2), (3, 7), 2, 16),
    "continuous": TokenSpec(Grid2D(2, 2), (), 2, 16),
}
"""Odd shapes on purpose: nothing may guess a square grid, equal vocabularies or one slot."""


def randomized(model):
    """Random weights everywhere: the zero-initialised heads of a fresh model would satisfy any law."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / max(parameter.shape[-1], 1) ** 0.5)
    return model.eval()


@pytest.fixture(params=available("tokenizers"))
def tokenizer(request):
    return randomized(build("tokenizers", Component(request.param, TINY_ARGS["tokenizers"][request.param])))


def make_generator(name, spec):
    """The registered generator ``name`` at its tiny size."""
    return randomized(build("generators", Component(name, TINY_ARGS["generators"][name]), spec))


def accepted_layouts():
    """``(generator, layout)`` for every registered generator and every layout that it does not refuse."""
    for name in available("generators"):
        for layout, spec in SPECS.items():
            try:
                make_generator(name, spec)
            except UserError:
                continue
            yield name, layout


@pytest.fixture(params=accepted_layouts(), ids="-".join)
def generator(request):
    name, layout = request.param
    return make_generator(name, SPECS[layout])


@pytest.fixture
def images(tokenizer):
    size = tokenizer.spec.image_size_px
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
