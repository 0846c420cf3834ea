import itertools

import pytest
import torch

from vistok.quantizers.fsq import FSQ


def test_every_index_of_the_published_code_comes_back():
    quantizer = FSQ((8, 8, 8, 5, 5, 5))
    ids = torch.arange(quantizer.codebook_size)
    codes = quantizer.decode(ids)
    assert codes.abs().max() <= 1 and len(codes.unique(dim=0)) == 64000
    # A latent that bounds to a code is its inverse under tanh.
    bounded = codes * (quantizer._count // 2)
    latent = torch.atanh((bounded + quantizer._offset) / quantizer._half) - quantizer._shift
    again, ids_again = quantizer(latent)
    assert torch.equal(ids_again, ids)
    torch.testing.assert_close(again, codes)


def test_anchors():
    quantizer = FSQ((8, 8, 8, 5, 5, 5))
    _, ids = quantizer(torch.tensor([0.0, -torch.inf, torch.inf])[:, None].expand(3, 6))
    assert ids.tolist() == [32036, 0, 63999]
    assert quantizer.decode(torch.tensor(16204)).tolist() == [0, -0.75, 0.25, -0.5, -0.5, -0.5]


@pytest.mark.parametrize("levels", [(2,), (3, 4), (16, 7, 2)])
def test_all_levels_are_reachable_and_first_is_fastest(levels):
    quantizer = FSQ(levels)
    grid = torch.linspace(-8, 8, 4001)[:, None].expand(-1, len(levels))
    _, ids = quantizer(grid)
    digits = quantizer.decode(ids)
    assert [len(column.unique()) for column in digits.T] == list(levels)
    by_hand = [list(digit[::-1]) for digit in itertools.product(*(range(n) for n in reversed(levels)))]
    half = torch.tensor([n // 2 for n in levels])
    expected = (torch.tensor(by_hand) - half) / half
    torch.testing.assert_close(quantizer.decode(torch.arange(quantizer.codebook_size)), expected)


def test_bf16_autocast_changes_no_index():
    quantizer = FSQ((8, 8, 8, 5, 5, 5))
    z = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        codes, ids = quantizer(z)
    assert codes.dtype == torch.float32 and torch.equal(ids, quantizer(z)[1])


def test_gradient_is_that_of_the_bounded_value():
    quantizer = FSQ((5, 4))
    z = torch.tensor([[0.3, -0.7]], requires_grad=True)
    quantizer(z)[0].sum().backward()
    copy = z.detach().clone().requires_grad_()
    (quantizer.bound(copy) / torch.tensor([2, 2])).sum().backward()
    torch.testing.assert_close(z.grad, copy.grad)


def test_nothing_is_stored():
    assert not FSQ((8, 5)).state_dict()
