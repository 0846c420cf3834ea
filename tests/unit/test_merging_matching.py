import pytest
import torch
import torch.nn.functional as F

from vistok.errors import UserError
from vistok.merging.matching import Matching, group_means
from vistok.merging.pitome import PiToMe, energy
from vistok.merging.schedules import Schedule
from vistok.merging.tome import Random, ToMe

METHODS = {
    "tome": ToMe(),
    "tome by similarity": ToMe(in_order=False),
    "pitome": PiToMe(),
    "pitome bsm": PiToMe(0.75, "elu", "bsm"),
    "pitome halves": PiToMe(0.5, "gauss", "halves"),
    "random": Random(),
}


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=[(20, 0, 5), (21, 1, 10), (21, 4, 8), (22, 2, 3)], ids=str)
def sizes(request):
    """Tokens, prefix, merges."""
    return request.param


@pytest.fixture
def matching(method, sizes):
    tokens, prefix, r = sizes
    return method.match(draws(2, tokens, 8), r, prefix, layer=1, depth=4)


def test_every_token_is_in_one_place(matching, sizes):
    tokens, _, r = sizes
    assert matching.slots.shape == (2, tokens)
    for keep, sources, slots in zip(matching.keep, matching.sources, matching.slots):
        assert sorted([*keep.tolist(), *sources.tolist()]) == list(range(tokens))
        assert slots.unique().tolist() == list(range(tokens - r))


def test_the_prefix_stays_where_it_is_and_alone(matching, sizes):
    prefix = sizes[1]
    first = torch.arange(prefix)
    assert (matching.keep[:, :prefix] == first).all() and (matching.slots[:, :prefix] == first).all()
    assert (matching.targets >= prefix).all()


def test_merging_conserves_what_tokens_hold(matching, sizes):
    x, size = draws(2, sizes[0], 3, seed=1), 1 + draws(2, sizes[0], seed=2).abs()
    merged, total = matching.merge(x, size)
    torch.testing.assert_close(total.sum(1), size.sum(1))
    torch.testing.assert_close((merged * total[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-5, rtol=1e-5)


def test_tokens_that_nothing_joins_come_back_bit_for_bit(matching, sizes):
    x = draws(2, sizes[0], 3, seed=1)
    back = matching.unmerge(matching.merge(x)[0])
    alone = torch.ones(2, sizes[0], dtype=torch.bool)
    alone.scatter_(1, matching.sources, False)
    alone.scatter_(1, matching.keep.gather(1, matching.targets), False)
    assert alone.any() and torch.equal(back[alone], x[alone]) and not torch.equal(back[~alone], x[~alone])


def test_unmerged_values_merge_to_themselves(matching, sizes):
    y = draws(2, sizes[0] - sizes[2], 3, seed=1)
    torch.testing.assert_close(matching.merge(matching.unmerge(y))[0], y)


def test_gradients_are_those_of_the_weighted_mean(matching, sizes):
    x = draws(2, sizes[0], 3, seed=1).requires_grad_()
    size = (1 + draws(2, sizes[0], seed=2).abs()).requires_grad_()
    weight = draws(2, sizes[0] - sizes[2], 3, seed=3)
    got = torch.autograd.grad((matching.merge(x, size)[0] * weight).sum(), (x, size))
    member = F.one_hot(matching.slots).mT * size[:, None]
    mean = member / member.sum(2, keepdim=True) @ x
    for ours, theirs in zip(got, torch.autograd.grad((mean * weight).sum(), (x, size))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_image_merges_alike_in_every_batch(method, sizes):
    tokens, prefix, r = sizes
    metric = draws(3, tokens, 8)
    together, alone = (method.match(m, r, prefix, 1, 4).slots for m in (metric, metric[1:2]))
    assert torch.equal(together[1:2], alone)


def test_tome_merges_the_pairs_that_are_most_alike():
    metric = draws(1, 12, 4)
    metric[0, 4], metric[0, 6] = 2 * metric[0, 9], 3 * metric[0, 1]  # cosine 1, whatever the length
    matching = ToMe().match(metric, 2, 0, 0, 1)
    pairs = zip(matching.sources[0].tolist(), matching.keep.gather(1, matching.targets)[0].tolist())
    assert set(pairs) == {(4, 9), (6, 1)}
    assert matching.keep[0].tolist() == [0, 2, 8, 10, 1, 3, 5, 7, 9, 11]


def test_pitome_protects_tokens_that_stand_alone():
    crowd = F.normalize(torch.ones(8) + 0.05 * draws(1, 12, 8), dim=-1)
    lonely = F.normalize(draws(1, 4, 8, seed=3) - torch.ones(8), dim=-1)
    matching = PiToMe().match(torch.cat([lonely, crowd], dim=1), 6, 0, 0, 12)
    assert matching.sources.min() >= 4 and matching.keep[0, :4].sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", ["elu", "paper", "gauss"])
def test_energy_is_the_mean_of_a_bent_cosine(form):
    unit, margin = F.normalize(draws(2, 300, 6), dim=-1), 0.4  # more tokens than rows at a time
    s = unit @ unit.mT
    below = (s - margin).exp() - 1
    bent = {
        "elu": torch.where(s >= margin, s - margin, below),
        "paper": torch.where(s >= margin, s, below),
        "gauss": torch.distributions.Normal(0.0, 1 - margin).log_prob(1 - s).exp(),
    }
    torch.testing.assert_close(energy(unit, margin, form), bent[form].mean(2), atol=1e-5, rtol=1e-5)


def test_the_halves_of_pitome_by_layer():
    metric = draws(1, 30, 4)
    for layer in range(5):
        bsm, ordered = (PiToMe(partition=name).match(metric, 4, 1, layer, 5).slots for name in ("bsm", "ordered"))
        first, last = (PiToMe(partition=name).match(metric, 4, 1, layer, 5).slots for name in ("bsm_first", "bsm_last"))
        assert not torch.equal(bsm, ordered)
        assert torch.equal(first, bsm if layer < 3 else ordered) and torch.equal(last, ordered if layer < 3 else bsm)


def test_keys_of_zero_and_half_precision_match():
    metric = draws(1, 10, 4).bfloat16()
    metric[0, 2] = 0
    x = draws(1, 10, 4).bfloat16()
    merged, size = ToMe().match(metric, 3, 0, 0, 1).merge(x)
    assert merged.dtype == torch.bfloat16 and size.dtype == torch.float32 and merged.isfinite().all()


def test_random_picks_follow_seed_and_layer():
    metric = draws(1, 30, 4)
    picks = [Random(seed).match(metric, 5, 0, layer, 3).sources for seed, layer in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2]) and not torch.equal(picks[0], picks[3])


def test_group_means():
    x = torch.tensor([[[1.0], [2.0], [3.0], [8.0], [5.0]]])
    assert group_means(x, torch.tensor([[1, 0, 1, 1, 2]]), 3).tolist() == [[[2.0], [4.0], [5.0]]]


def test_matching_by_hand():
    matching = Matching(torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    merged, size = matching.merge(torch.tensor([[[8.0], [1.0], [2.0], [6.0]]]), torch.tensor([[1.0, 2.0, 1.0, 1.0]]))
    assert matching.slots.tolist() == [[0, 1, 1, 1]]
    assert merged.tolist() == [[[8.0], [2.5]]] and size.tolist() == [[1.0, 4.0]]


def test_schedules_of_a_vit_small():
    constant, ratio = Schedule(13).merges(12, 196), Schedule(ratio=0.9).merges(12, 196)
    assert constant == [13] * 12 and 197 - sum(constant) == 41
    assert ratio[0] == 19 and 197 - sum(ratio) == 60
    assert Schedule(13, inflection=-1.0).asked(12) == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert Schedule([10, 5]).asked(4) == [10, 5, 0, 0]
    assert Schedule(6, inflection=-1.0).asked(1) == [6]
    assert Schedule(ratio=0.55).merges(1, 100) == [45] and Schedule(ratio=1.0).merges(3, 100) == [0, 0, 0]


def test_more_merges_than_there_are_tokens_warn_and_stop_at_one():
    with pytest.warns(UserWarning, match="block 0 was asked to merge 200 tokens and can merge 98"):
        merges = Schedule(200).merges(12, 196)
    assert merges[:3] == [98, 49, 24] and 196 - sum(merges) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "either r .* or ratio"),
        ({"r": 8, "ratio": 0.9}, "either r .* or ratio"),
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\], got 0.0"),
        ({"ratio": 1.5}, r"ratio must lie in \(0, 1\], got 1.5"),
        ({"r": -1}, "r must not be negative, got -1"),
        ({"r": [3, -2]}, r"r must not be negative, got \[3, -2\]"),
        ({"r": 8, "inflection": 2.0}, r"inflection must lie in \[-1, 1\], got 2.0"),
        ({"ratio": 0.9, "inflection": -1.0}, "inflection bends one r"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        Schedule(**settings)


def test_a_list_longer_than_the_model():
    with pytest.raises(UserError, match="r lists 5 blocks, the model has 4"):
        Schedule([1] * 5).merges(4, 100)
