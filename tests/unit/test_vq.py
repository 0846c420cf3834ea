import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.quantizers import vq
from vistok.quantizers.vq import Codebook, CodebookOptions


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codebook(vocab_size=32, dim=6, seed=0, **options):
    torch.manual_seed(seed)
    return Codebook(vocab_size, dim, CodebookOptions(**options))


def clusters(count, dim=6, around=40, spread=0.05):
    """``around`` vectors near each of ``count`` directions, in one batch, and the directions."""
    centres = F.normalize(vectors(count, dim, seed=9), dim=-1)
    return (centres[:, None] + spread * vectors(count, around, dim)).view(1, -1, dim), centres


@pytest.mark.parametrize("normalized", [True, False])
def test_nearest_is_the_least_distance_in_every_chunk(normalized, monkeypatch):
    monkeypatch.setattr(vq, "SCORES", {"cpu": 7 * 32})
    book = codebook(normalized=normalized)
    if not normalized:
        book.set_rows(vectors(32, 6, seed=1) * torch.linspace(0.1, 3, 32)[:, None])
    z = vectors(3, 11, 6)
    distances = torch.cdist(book.normalize(z).flatten(0, 1).double(), book.rows().detach().double())
    assert torch.equal(book.nearest(z).flatten(), distances.argmin(dim=1))


def test_a_row_finds_itself_and_permuted_rows_permute_ids():
    book, ids = codebook(), torch.arange(32)
    assert torch.equal(book.nearest(book.embed(ids)), ids)
    z, order = vectors(2, 20, 6), torch.randperm(32, generator=torch.Generator().manual_seed(1))
    before = book.nearest(z)
    book.set_rows(book.rows()[order])
    assert torch.equal(order[book.nearest(z)], before)


def test_normalised_codes_have_unit_norm_whatever_the_table_holds():
    book = codebook()
    book.tables[0].data.mul_(7)
    torch.testing.assert_close(book.embed(torch.arange(32)).norm(dim=-1), torch.ones(32))
    assert torch.equal(book.nearest(5 * vectors(2, 9, 6)), book.nearest(vectors(2, 9, 6)))


def test_gradients_pass_straight_through_and_reach_only_chosen_rows():
    book, z = codebook(beta=0.0), vectors(2, 9, 6).requires_grad_()
    weight = vectors(2, 9, 6, seed=2)
    quantized = book(z)
    (quantized.codes * weight).sum().backward()
    again = z.detach().clone().requires_grad_()
    (book.normalize(again) * weight).sum().backward()
    torch.testing.assert_close(z.grad, again.grad)
    assert book.tables[0].grad is None
    book(z).terms["codebook"].backward()
    touched = book.tables[0].grad.abs().sum(dim=1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(quantized.ids.unique().tolist())


def test_terms_are_weighted_and_entropy_is_only_computed_when_asked_for(monkeypatch):
    z = vectors(2, 9, 6)
    book = codebook(beta=0.25)
    terms = book(z).terms
    torch.testing.assert_close(terms["commitment"], 0.25 * terms["codebook"])
    assert set(terms) == {"codebook", "commitment"}
    monkeypatch.setattr(vq, "SCORES", {"cpu": 5 * 32})
    asked = codebook(entropy=0.1)(z).terms["entropy"]
    scores = -((book.normalize(z).flatten(0, 1)[:, None] - book.rows()) ** 2).sum(-1) / 0.01
    shares = scores.softmax(dim=-1)
    each = -(shares * scores.log_softmax(dim=-1)).sum(-1).mean()
    together = -(shares.mean(0) * (shares.mean(0) + 1e-5).log()).sum()
    torch.testing.assert_close(asked, 0.1 * (each - together))


def test_autocast_changes_nothing():
    book, z = codebook(entropy=0.1), vectors(2, 50, 6)
    plain = book(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = book(z)
    assert torch.equal(plain.ids, cast.ids) and torch.equal(plain.codes, cast.codes)
    assert all(torch.equal(plain.terms[name], cast.terms[name]) for name in plain.terms)


@pytest.mark.parametrize("normalized", [True, False])
def test_moving_averages_are_those_of_the_paper(normalized):
    book = codebook(8, ema_decay=0.9, normalized=normalized)
    assert not [p for p in book.parameters() if p.requires_grad]
    count, total = torch.zeros(8), torch.zeros(8, 6)
    for seed in range(3):
        z, rows = vectors(4, 5, 6, seed=seed), book.rows()
        quantized = book(z)
        assert set(quantized.terms) == {"commitment"}
        torch.testing.assert_close(rows[quantized.ids], quantized.codes)  # learnt after the lookup
        chosen = F.one_hot(quantized.ids.flatten(), 8).float()
        count = 0.9 * count + 0.1 * chosen.sum(0)
        total = 0.9 * total + 0.1 * chosen.T @ book.normalize(z).flatten(0, 1)
    seen = count > 0
    expected = total[seen] / count[seen, None]
    torch.testing.assert_close(book.rows()[seen], book.normalize(expected))


def test_entries_that_nothing_chooses_survive_any_number_of_batches():
    book, z = codebook(4, ema_decay=0.5), vectors(1, 1, 6)
    kept = book.rows()
    for _ in range(300):  # 0.5 ** 300 is no float32
        chosen = book(z).ids.item()
    others = torch.arange(4) != chosen
    assert torch.equal(book.rows()[others], kept[others])
    assert book.rows().isfinite().all()


def test_evaluation_learns_nothing():
    book = codebook(ema_decay=0.9, kmeans=True, revive_after=1).eval()
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book(vectors(2, 9, 6))
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())


def test_kmeans_finds_clusters_once():
    z, centres = clusters(8)
    book = codebook(8, kmeans=True, ema_decay=0.99)
    book.start(lambda: z, torch.Generator().manual_seed(0))
    # As good as k-means gets from a random start: no worse than two clusters in one.
    found = (book.rows() @ centres.T).amax(dim=0)
    assert (found > 0.99).sum() >= 6
    rows = book.rows()
    book.start(lambda: -z)
    assert torch.equal(book.rows(), rows)
    again = codebook(8, seed=5, kmeans=True, ema_decay=0.99)
    again.start(lambda: z, torch.Generator().manual_seed(0))
    assert torch.equal(again.rows(), rows)


def test_kmeans_of_few_vectors_leaves_the_other_rows():
    book = codebook(kmeans=True)
    before, z = book.rows().detach(), vectors(1, 10, 6)
    book.start(lambda: z)
    torch.testing.assert_close(book.rows()[10:], before[10:])
    torch.testing.assert_close(book.embed(book.nearest(z)), book.normalize(z))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_unused_entries_come_back_as_vectors_of_the_batch(ema_decay):
    book, (z, _) = codebook(64, revive_after=3, ema_decay=ema_decay), clusters(4)
    used, before = [book(z).ids for _ in range(2)], book.rows().detach()
    used.append(book(z, torch.Generator().manual_seed(0)).ids)  # the third batch without the others
    dead = torch.ones(64, dtype=torch.bool)
    dead[torch.cat(used).unique()] = False
    assert dead.sum() > 30
    rows = book.rows().detach()[dead]
    assert (rows - before[dead]).abs().amax(dim=1).min() > 0
    assert torch.cdist(rows, book.normalize(z)[0]).amin(dim=1).max() < 1e-3
    assert len(book.nearest(z).unique()) > 2 * (64 - int(dead.sum()))
    assert book._idle[dead].max() == 0


def test_a_revived_entry_forgets_its_old_vectors():
    book, z = codebook(8, ema_decay=0.9, revive_after=2), vectors(1, 1, 6).expand(1, 16, 6)
    old = book(z).ids[0, 0]
    for _ in range(2):
        book(-z)
    torch.testing.assert_close(book.embed(old), book.normalize(-z[0, 0]))
    assert book._count[old] == 0 and not book._sum[old].any()


def test_everything_learnt_survives_a_state_dict():
    options = {"ema_decay": 0.9, "kmeans": True, "revive_after": 2}
    one, other = codebook(**options), codebook(seed=3, **options)
    for seed in range(2):
        one(vectors(2, 9, 6, seed=seed), torch.Generator().manual_seed(seed))
    other.load_state_dict(one.state_dict())
    for seed in range(2, 5):
        results = [book(vectors(2, 9, 6, seed=seed), torch.Generator().manual_seed(seed)) for book in (one, other)]
        assert torch.equal(results[0].codes, results[1].codes)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="at least 0, got -1"):
        CodebookOptions(beta=-1)
    with pytest.raises(UserError, match="below 1, got 1"):
        CodebookOptions(ema_decay=1.0)
    with pytest.raises(UserError, match="0 x 4"):
        Codebook(0, 4)
    with pytest.raises(UserError, match="6 channels, got 5"):
        codebook().nearest(vectors(2, 5))
