import math
from dataclasses import replace

import pytest
import torch

from vistok.errors import UserError
from vistok.generators.gpt import Config, build
from vistok.generators.gpt_published import PUBLISHED_KEYS
from vistok.generators.sampling import draw, filter_logits
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions
from vistok.nn.rope import rotate, rotation
from vistok.tokens import Grid2D, Ordered1D, Tokens, TokenSpec

SPEC = TokenSpec(Grid2D(3, 4), (17,), 4, 16)
TINY = Config(width=32, depth=2, heads=2, num_classes=5, mlp_multiple=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build(TINY, SPEC)
    torch.nn.init.normal_(model.adapter.head.weight)
    return model.eval()


def random_ids(count=3, seed=0):
    return torch.randint(0, 17, (count, 12, 1), generator=torch.Generator().manual_seed(seed))


def test_a_code_changes_only_later_predictions(model):
    ids, classes = random_ids(), ClassCondition(torch.tensor([0, 1, 2]))
    before = model.logits(ids, classes)
    ids[:, 5] = (ids[:, 5] + 1) % 17
    after = model.logits(ids, classes)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_the_class_changes_every_prediction(model):
    ids = random_ids()
    first, second = (model.logits(ids, ClassCondition(torch.full((3,), c))) for c in (0, NULL_CLASS))
    assert (first != second).any(-1).all()


def test_the_first_loss_is_the_log_of_the_vocabulary():
    fresh = build(TINY, SPEC)
    report = fresh.loss(Tokens(random_ids(), SPEC), ClassCondition(torch.arange(3)), torch.Generator().manual_seed(0))
    assert report.total.item() == pytest.approx(math.log(17), abs=1e-5)


def test_condition_dropout_reaches_the_stated_share():
    model = build(Config(width=32, depth=1, heads=2, num_classes=5, condition_dropout=1.0, dropout=0.0), SPEC)
    tokens = Tokens(random_ids(), SPEC)
    reports = [model.loss(tokens, ClassCondition(torch.full((3,), c)), torch.Generator()).total for c in (0, 4)]
    assert torch.equal(*reports)


def test_only_the_first_tokens_are_guided(model):
    from vistok.rng import SampleRng

    condition = ClassCondition(torch.arange(3))

    def ids(**options):
        return model.generate(condition, SampleOptions(**options), SampleRng.from_seed(0, 3)).ids

    full, partly, none = ids(cfg_scale=6.0), ids(cfg_scale=6.0, guided_tokens=4), ids(cfg_scale=6.0, guided_tokens=0)
    assert torch.equal(full[:, :4], partly[:, :4]) and not torch.equal(full, partly)
    assert torch.equal(none, ids())


def test_llamagen_key_map_is_invertible(model):
    state = model.state_dict()
    again = PUBLISHED_KEYS.to_ours(PUBLISHED_KEYS.to_published(state))
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_sizes_of_the_published_models():
    spec = TokenSpec(Grid2D(16, 16), (16384,), 8, 256)
    for width, depth, heads, count in [(768, 12, 12, 110_888_448), (1024, 24, 16, 342_910_976)]:
        with torch.device("meta"):
            model = build(Config(width=width, depth=depth, heads=heads), spec)
        assert sum(p.numel() for p in model.parameters()) == count


def test_heads_must_leave_channels_for_both_axes():
    with pytest.raises(UserError, match="multiple of 4"):
        build(Config(width=30, depth=1, heads=5), SPEC)
    build(Config(width=30, depth=1, heads=5), TokenSpec(Ordered1D(4), (5,), 2, 16))


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"mlp_multiple": 0}, {"num_classes": -1}, {"dropout": 2.0}])
def test_numbers_that_no_model_can_have(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(replace(TINY, **wrong), SPEC)


def test_rotation_depends_on_relative_positions():
    x = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(a, b):
        tables = [rotation(torch.tensor([p], dtype=torch.float32), 8) for p in (a, b)]
        return (rotate(x[:1], tables[0]) * rotate(x[1:], tables[1])).sum()

    torch.testing.assert_close(product((1, 5), (4, 7)), product((3, 0), (6, 2)))
    assert not torch.isclose(product((1, 5), (4, 7)), product((1, 5), (7, 4)))


def test_grid_rotation_turns_rows_in_the_first_half():
    cos, _ = rotation(torch.tensor([[0.0, 1.0]]), 32)
    torch.testing.assert_close(cos[0, :8], torch.ones(8))
    torch.testing.assert_close(cos[0, 8:11], torch.tensor([0.5403, 0.9504, 0.9950]), atol=1e-4, rtol=0)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    count = 20000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    ids = draw(logits.expand(count, -1), uniform, 1.0, 0, 1.0)
    frequency = ids.bincount(minlength=4) / count
    # 4 standard errors of the largest frequency: a false alarm in about 1 of 10,000 seeds.
    torch.testing.assert_close(frequency, logits.softmax(-1)[0], atol=0.014, rtol=0)


def test_draw_at_the_edges():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert draw(logits, uniform, 1.0, 0, 1.0).tolist() == [1, 2, 2]
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), torch.zeros(1), 0.0, 0, 1.0).tolist() == [1]
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), 1.0, 1, 1.0).tolist() == [1]


def test_filters_keep_what_they_say():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = [filter_logits(logits, k, p).isfinite().sum().item() for k, p in [(0, 1.0), (2, 1.0), (0, 0.6), (0, 0.4)]]
    assert kept == [4, 2, 2, 1]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"cfg_scale": -2}])
def test_sampling_options_outside_their_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SampleOptions(**wrong)
