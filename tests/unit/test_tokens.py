import json

import pytest
import torch

from vistok.errors import UserError
from vistok.rng import SampleRng, derive_seed
from vistok.tokens import Grid2D, MultiScale, Ordered1D, Tokens, TokenSpec

LAYOUTS = [Grid2D(3, 5), Ordered1D(7), MultiScale(((1, 1), (2, 3), (4, 4)))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spec_survives_json(layout):
    spec = TokenSpec(layout, (4, 9), 6, 32)
    assert TokenSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_numbers_of_positions():
    assert [layout.num_positions for layout in LAYOUTS] == [15, 7, 23]


def test_scales_are_cut_coarse_first():
    ids = torch.arange(23)[None, :, None]
    assert [part[0, 0, 0].item() for part in LAYOUTS[2].split_scales(ids)] == [0, 1, 7]


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (torch.zeros(2, 15, 2), "int64"),
        (torch.zeros(2, 15, dtype=torch.int64), "int64"),
        (torch.zeros(2, 14, 2, dtype=torch.int64), "do not fit"),
        (torch.zeros(2, 15, 1, dtype=torch.int64), "do not fit"),
        (torch.full((2, 15, 2), 4), "outside the vocabulary"),
        (torch.full((2, 15, 2), -1), "outside the vocabulary"),
    ],
)
def test_wrong_ids_are_refused(ids, complaint):
    with pytest.raises(UserError, match=complaint):
        Tokens(ids, TokenSpec(Grid2D(3, 5), (4, 9), 6, 32))


def test_prefixes():
    tokens = Tokens(torch.arange(7)[None, :, None], TokenSpec(Ordered1D(7), (9,), 2, 32))
    assert tokens.prefix(3).ids.flatten().tolist() == [0, 1, 2]
    for count in (0, 8):
        with pytest.raises(UserError, match=r"outside 1\.\.7"):
            tokens.prefix(count)
    with pytest.raises(UserError, match=r"outside 1\.\.3"):
        tokens.prefix(3).prefix(4)


def test_whole_scales_are_prefixes():
    spec = TokenSpec(MultiScale(((1, 1), (2, 3), (4, 4))), (99,), 2, 32)
    tokens = Tokens(torch.arange(23)[None, :, None], spec)
    assert [tokens.prefix(count).ids.shape[1] for count in (1, 7, 23)] == [1, 7, 23]
    with pytest.raises(UserError, match=r"whole scales \(1, 7, 23\)"):
        tokens.prefix(8)
    with pytest.raises(UserError, match=r"whole scales \(1, 7\)"):
        tokens.prefix(7).prefix(23)
    with pytest.raises(UserError, match="do not fit"):
        Tokens(torch.zeros(1, 8, 1, dtype=torch.int64), spec)


def test_streams_belong_to_samples_not_to_batches():
    whole = SampleRng.from_seed(3, 5)
    part = SampleRng.from_seed(3, 2, start=2)
    assert torch.equal(whole.normal(2, 4)[2:4], part.normal(2, 4))
    assert torch.equal(whole.uniform(3)[2:4], part.uniform(3))
    assert len({derive_seed("a", 1), derive_seed("a", 2), derive_seed("b", 1), derive_seed("a1")}) == 4
