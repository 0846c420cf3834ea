import pytest
import torch

from tiny_models.models import SPECS, make_generator, make_tokenizer
from vistok.config import available
from vistok.errors import UserError


@pytest.fixture(params=available("tokenizers"))
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture
def images(tokenizer):
    size = tokenizer.spec.image_size_px
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


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
