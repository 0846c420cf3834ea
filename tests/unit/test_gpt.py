import math
from dataclasses import replace

import pytest
import torch

from tiny_models.runs import ROOT
from vistok.config import Component, component_config, read_yaml
from vistok.errors import UserError
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.gpt import Config, build
from vistok.generators.gpt_published import PUBLISHED_KEYS
from vistok.generators.losses import cross_entropy
from vistok.generators.sampling import draw, filter_logits
from vistok.generators.token_shuffle import Config as ShuffleConfig
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions
from vistok.nn.rope import rotate, rotation
from vistok.tokens import Grid2D, Ordered1D, Tokens, TokenSpec

SPEC = TokenSpec(Grid2D(3, 4), (17,), 4, 16)
LLAMAGEN = {"b": 110_888_448, "l": 342_910_976, "xl": 774_699_520, "xxl": 1_410_972_672, "3b": 3_096_659_200}
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


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (SPEC, {}),
        (TokenSpec(Grid2D(2, 4), (17,), 4, 16), {"shuffle": ShuffleConfig(window=2)}),
        (TokenSpec(Grid2D(3, 4), (3, 7), 4, 16), {"head": HeadConfig(width=16, depth=1, heads=2)}),
    ],
    ids=["codes", "windows", "slots"],
)
def test_z_loss_is_a_term_of_its_own_in_training_only(spec, parts):
    model = build(replace(TINY, z_loss=0.5, dropout=0.0, condition_dropout=0.0, **parts), spec)
    classes, rng = ClassCondition(torch.arange(3)), torch.Generator()
    slots = [torch.randint(0, n, (3, spec.num_positions)) for n in spec.vocab_sizes]
    tokens = Tokens(torch.stack(slots, dim=-1), spec)
    report = model.loss(tokens, classes, rng)
    # Of a fresh model every code of a vocabulary has the logit 0.
    expected = 0.5 * sum(math.log(n) ** 2 for n in spec.vocab_sizes) / spec.num_slots
    assert report.terms["z_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert report.total.item() == pytest.approx(sum(term.item() for term in report.terms.values()))
    report.total.backward()
    head = model.adapter.head
    assert (head.weight.grad if head.bias is None else head.bias.grad).any()
    assert model.eval().loss(tokens, classes, rng).terms.keys() == {"cross_entropy"}


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

    full, partly, none = (ids(cfg_scale=6.0, guidance_interval=(0, first / 12)) for first in (12, 4, 0))
    assert torch.equal(full[:, :4], partly[:, :4]) and not torch.equal(full, partly)
    assert torch.equal(none, ids())


def test_llamagen_key_map_is_invertible(model):
    state = model.state_dict()
    again = PUBLISHED_KEYS.to_ours(PUBLISHED_KEYS.to_published(state))
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("name", LLAMAGEN)
def test_shipped_configs_have_the_sizes_of_the_published_models(name, side):
    written = read_yaml(ROOT / f"configs/imagenet/gpt_{name}.yaml")["generator"]
    config = component_config("generators", Component(**written), name)
    with torch.device("meta"):
        model = build(config, TokenSpec(Grid2D(side, side), (16384,), 8, 16 * side))
    assert sum(p.numel() for p in model.parameters()) == LLAMAGEN[name]


@pytest.fixture(params=["rope", "learned"])
def any_order(request):
    torch.manual_seed(0)
    model = build(replace(TINY, order="random", dropout=0.0, condition_dropout=0.0, positions=request.param), SPEC)
    torch.nn.init.normal_(model.adapter.head.weight)
    return model


def orders(count=3):
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(1)).argsort(dim=1)


def test_raster_order_is_one_of_the_orders(any_order):
    ids, classes = random_ids(), ClassCondition(torch.arange(3))
    raster = any_order.logits(ids, classes, torch.arange(12).expand(3, -1))
    torch.testing.assert_close(raster, any_order.logits(ids, classes))


def test_in_an_order_a_code_changes_only_later_predictions(any_order):
    ids, classes, order = random_ids(), ClassCondition(torch.arange(3)), orders()
    before = any_order.logits(ids, classes, order)
    ids[:, 5] = (ids[:, 5] + 1) % 17
    after = any_order.logits(ids, classes, order)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_a_prediction_knows_its_position_and_those_of_the_codes_before_it(any_order):
    ids, classes, order = random_ids(), ClassCondition(torch.arange(3)), orders()
    before = any_order.logits(ids, classes, order)
    order[:, [3, 8]] = order[:, [8, 3]]
    after = any_order.logits(ids, classes, order)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] != after[:, 3]).any(-1).all() and (before[:, 4:] != after[:, 4:]).any(-1).all()


def test_an_order_needs_no_more_than_to_be_followed(any_order):
    """The loss in a random order is that of codes laid out in it, whatever the draw."""
    any_order.train().at_progress(0.0)
    tokens, classes = Tokens(random_ids(), SPEC), ClassCondition(torch.arange(3))
    total = any_order.loss(tokens, classes, torch.Generator().manual_seed(7)).total
    rng = torch.Generator().manual_seed(7)
    torch.rand(3, generator=rng)  # who loses the condition
    order = torch.rand(3, 12, generator=rng).argsort(dim=1)
    assert (order.sort(dim=1).values == torch.arange(12)).all() and (order != torch.arange(12)).any(1).all()
    ids = tokens.ids.gather(1, order[..., None])
    expected = cross_entropy(any_order.logits(ids, classes, order), ids).mean()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 1.0), (0.625, 0.5), (0.75, 0.0), (1.0, 0.0)])
def test_the_share_of_random_orders_is_annealed(any_order, progress, share):
    any_order.at_progress(progress)
    drawn = any_order._draw_order(2000, 12, torch.Generator().manual_seed(0))
    # 4 standard errors at a half: a false alarm in about 1 of 10,000 seeds.
    assert (drawn != torch.arange(12)).any(1).float().mean().item() == pytest.approx(share, abs=0.045)
    if share == 0:
        tokens, classes = Tokens(random_ids(), SPEC), ClassCondition(torch.arange(3))
        raster = any_order.eval().loss(tokens, classes, torch.Generator()).total
        torch.testing.assert_close(any_order.train().loss(tokens, classes, torch.Generator()).total, raster)


def test_raster_order_adds_nothing_to_the_model(model):
    assert "targets.weight" not in model.state_dict()
    assert model.state_dict().keys() == build(replace(TINY, order="raster"), SPEC).state_dict().keys()


def test_heads_must_leave_channels_for_both_axes():
    with pytest.raises(UserError, match="multiple of 20 for its 5 heads"):
        build(Config(width=30, depth=1, heads=5), SPEC)
    build(Config(width=30, depth=1, heads=5), TokenSpec(Ordered1D(4), (5,), 2, 16))


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 0},
        {"mlp_multiple": 0},
        {"num_classes": -1},
        {"dropout": 2.0},
        {"z_loss": -1.0},
        {"shuffle": ShuffleConfig(blocks=-1)},
    ],
)
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
