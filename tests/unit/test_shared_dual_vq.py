import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers.shared_dual_vq import SharedDualCodebook
from vistok.quantizers.vq import Codebook, CodebookOptions


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dual(weight=1.0, vocab_size=128, **options):
    torch.manual_seed(0)
    return SharedDualCodebook(vocab_size, 12, 5, weight, CodebookOptions(**options))


def joint_distances(book, z, weight):
    total = 0.0
    for table, part, scale in zip(book.tables, z.flatten(0, 1).split((12, 5), dim=-1), (1.0, weight)):
        rows, part = (F.normalize(x.detach().double(), dim=-1) for x in (table, part))
        total = total + scale * torch.cdist(part, rows) ** 2
    return total


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
def test_the_index_minimises_the_weighted_sum_of_both_distances(weight):
    book, z = dual(weight), vectors(3, 60, 17)
    ids = book.nearest(z).flatten()
    assert torch.equal(ids, joint_distances(book, z, weight).argmin(dim=1))
    root = torch.cat([torch.ones(12), torch.full((5,), weight**0.5)])
    products = (book.normalize(z).flatten(0, 1) * root) @ (book.rows() * root).T
    assert torch.equal(ids, products.argmax(dim=1))


def test_weights_matter_and_zero_is_the_semantic_codebook_alone():
    z, book = vectors(2, 60, 17), dual(0.0)
    semantic = Codebook(128, 12)
    semantic.load_state_dict({"tables.0": book.tables[0]})
    assert torch.equal(book.nearest(z), semantic.nearest(z[..., :12]))
    assert (book.nearest(z) != dual(1.0).nearest(z)).float().mean() > 0.3


def test_each_half_of_every_code_has_unit_norm():
    codes = dual()(vectors(2, 9, 17)).codes
    for half in codes.split((12, 5), dim=-1):
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 9))


def test_one_index_takes_both_rows_and_gradients_reach_only_those():
    book, z = dual(), vectors(2, 9, 17).requires_grad_()
    quantized = book(z)
    parts = [F.normalize(F.embedding(quantized.ids, table), dim=-1) for table in book.tables]
    torch.testing.assert_close(quantized.codes, torch.cat(parts, dim=-1))
    sum(quantized.terms.values()).backward()
    for table in book.tables:
        touched = (table.grad.abs().sum(dim=1) > 0).nonzero()[:, 0]
        assert torch.equal(touched, quantized.ids.unique())
    assert all(half.abs().sum() > 0 for half in z.grad.split((12, 5), dim=-1))


@pytest.mark.parametrize("options", [{"ema_decay": 0.5, "revive_after": 2}, {"kmeans": True}])
def test_both_tables_learn_from_batches(options):
    book, z = dual(**options), vectors(4, 64, 17)
    start, before = dual().state_dict(), (book.normalize(z) - book.eval()(z).codes).square().mean()
    book.train()
    for _ in range(4):
        book(z)
    assert (book.normalize(z) - book(z).codes).square().mean() < 0.6 * before
    assert not any(torch.equal(table, start[f"tables.{i}"]) for i, table in enumerate(book.tables))
    for half in book.rows().split((12, 5), dim=-1):
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(128))


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(UserError, match="must be at least 0"):
        dual(weight)
