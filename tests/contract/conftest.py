import pytest
import torch

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator, make_tokenizer, tokenizer_names
from tiny_models.text import condition_for
from vistok.config import available
from vistok.errors import UserError
from vistok.interfaces import Tokenizer


@pytest.fixture(params=tokenizer_names(Tokenizer))
def tokenizer(request):
    return make_tokenizer(request.param)


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
            for variant in ("plain", *VARIANTS.get(name, {})):
                yield name, variant, layout


@pytest.fixture(params=accepted_layouts(), ids="-".join)
def generator(request):
    name, variant, layout = request.param
    args = {} if variant == "plain" else VARIANTS[name][variant]
    return make_generator(name, SPECS[layout], **args)


@pytest.fixture
def condition(generator):
    """Four rows, the last without class or text."""
    return condition_for(generator)
