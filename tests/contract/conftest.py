import pytest
import torch

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator, make_tokenizer, tokenizer_names
from tiny_models.text import condition_for
from vistok.config import available
from vistok.errors import UserError
from vistok.interfaces import Tokenizer


def variants(name):
    """A registered model at its tiny size, and with the other parts that it can have."""
    return {"plain": {}, **VARIANTS.get(name, {})}


@pytest.fixture(
    params=[(name, variant) for name in tokenizer_names(Tokenizer) for variant in variants(name)], ids="-".join
)
def tokenizer(request):
    name, variant = request.param
    return make_tokenizer(name, **variants(name)[variant])


@pytest.fixture
def images(tokenizer):
    size = tokenizer.spec.image_size_px
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def accepted_layouts():
    """``(generator, variant, layout)`` for every registered generator and every layout that it does not refuse."""
    for name in available("generators"):
        for layout, spec in SPECS.items():
            try:
                make_generator(name, spec)
            except UserError:
                continue
            for variant in variants(name):
                yield name, variant, layout


@pytest.fixture(params=accepted_layouts(), ids="-".join)
def generator(request):
    name, variant, layout = request.param
    return make_generator(name, SPECS[layout], **variants(name)[variant])


@pytest.fixture
def condition(generator):
    """Four rows, the last without class or text."""
    return condition_for(generator)
