"""How classes and texts enter the GPT, and FlexTok's generators as configs of it."""

from dataclasses import replace

import pytest
import torch

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator
from tiny_models.text import condition_for
from vistok.errors import UserError
from vistok.generators.gpt import Config, build
from vistok.interfaces import NULL_CLASS, ClassCondition, SampleOptions, TextCondition
from vistok.rng import SampleRng
from vistok.tokens import Ordered1D, TokenSpec

SPEC = SPECS["ordered"]
TEXTS = ("text", "prefix", "read_text", "read_prefix")
FLEXTOK = TokenSpec(Ordered1D(256), (64000,), 6, 256)


def random_ids(count=4):
    return torch.randint(0, 11, (count, 6, 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def texts():
    """Three texts of one, two and three states; the empty one has two."""
    states, null = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 3, 16), (1, 2, 16))
    )
    mask = torch.arange(3) <= torch.arange(3)[:, None]
    return TextCondition(states, mask, null, torch.ones(1, 2, dtype=torch.bool))


def test_rows_of_texts_are_joined_dropped_and_made_null(texts):
    null = texts.null()
    assert null.states.shape == (3, 2, 16) and torch.equal(null.states[1], texts.null_states[0])
    both = texts[:2].join(null[:1])
    assert both.states.shape == (3, 3, 16) and both.mask.sum(1).tolist() == [1, 2, 2]
    dropped = texts.dropped(torch.tensor([False, True, False]))
    assert dropped.mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(dropped.states[[0, 2]], texts.states[[0, 2]])
    assert torch.equal(dropped.states[1, :2], texts.null_states[0])
    classes = ClassCondition(torch.tensor([3, 4])).dropped(torch.tensor([True, False]))
    assert classes.class_ids.tolist() == [NULL_CLASS, 4]


@pytest.mark.parametrize("variant", VARIANTS["gpt"])
def test_a_code_changes_only_later_predictions(variant):
    model, ids = make_generator("gpt", SPEC, **VARIANTS["gpt"][variant]), random_ids()
    condition = condition_for(model)
    before = model.logits(ids, condition)
    ids[:, 2] = (ids[:, 2] + 1) % 11
    after = model.logits(ids, condition)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


@pytest.mark.parametrize("variant", TEXTS)
def test_every_prediction_depends_on_every_state_of_the_text_and_on_no_other(variant, texts):
    model, ids = make_generator("gpt", SPEC, **VARIANTS["gpt"][variant]), random_ids(3)
    before = model.logits(ids, texts)
    for position in range(3):
        states = texts.states.clone()
        states[:, position] += 1
        changed = (model.logits(ids, replace(texts, states=states)) != before).any(-1)
        for row in range(3):
            assert changed[row].all() if position <= row else not changed[row].any()


@pytest.mark.parametrize("variant", TEXTS)
def test_padding_changes_nothing(variant, texts):
    model, ids = make_generator("gpt", SPEC, **VARIANTS["gpt"][variant]), random_ids(3)
    alone = model.logits(
        ids[:1], TextCondition(texts.states[:1, :1], texts.mask[:1, :1], texts.null_states, texts.null_mask)
    )
    torch.testing.assert_close(model.logits(ids, texts)[:1], alone)


def test_keys_and_values_of_the_text_are_made_once_for_a_generation(texts):
    model, calls = make_generator("gpt", SPEC, **VARIANTS["gpt"]["text"]), []
    for block in model.blocks:
        block.cross_attention.kv.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    model.generate(texts, SampleOptions(cfg_scale=3.0), SampleRng.from_seed(0, 3))
    assert calls == [(6, 3, 32)] * len(model.blocks)  # both branches of guidance


def texts_of(*lengths, width=16, seed=0):
    """Texts of so many states in the midst of others, which are nothing; and the states alone, in a list."""
    rng = torch.Generator().manual_seed(seed)
    size = max(lengths) + 2
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in zip(mask, lengths):
        row[torch.randperm(size, generator=rng)[:length]] = True
    states = torch.randn(len(lengths), size, width, generator=rng)
    null = torch.randn(1, 1, width, generator=rng)
    return TextCondition(states, mask, null, torch.ones(1, 1) > 0), [row[there] for row, there in zip(states, mask)]


def test_a_text_stands_right_before_the_codes_wherever_its_padding_was():
    model, (condition, states) = make_generator("gpt", SPEC, condition="text_prefix", text_positions=9), texts_of(5, 1)
    x, there, _ = model.condition(condition)
    assert there.tolist() == [[False] * 4 + [True] * 5, [False] * 8 + [True]]
    for row, text in zip(x, states):
        torch.testing.assert_close(row[9 - len(text) :], model.condition.mlp(text))


@pytest.mark.parametrize("positions", [1, 2, 120])
@pytest.mark.parametrize("compatible", [False, True])
def test_the_cache_and_the_batch_change_no_prediction(positions, compatible):
    options = {"zero_prefix_rotation": compatible, "own_null": compatible}
    model = make_generator("gpt", SPECS["grid"], condition="text_prefix", text_positions=positions, **options)
    lengths = torch.randint(1, positions + 1, (3,), generator=torch.Generator().manual_seed(1)).tolist()
    whole, states = texts_of(positions, *lengths)
    mask = torch.arange(positions) >= positions - torch.tensor([[positions], *[[n] for n in lengths]])
    padded = torch.zeros(4, positions, 16).masked_scatter(mask[..., None], torch.cat(states))
    condition = replace(whole, states=padded, mask=mask)  # on the left, as LlamaGen's are
    outputs = []
    model.norm.register_forward_hook(lambda module, args, output: outputs[-1].append(output[:, -1]))

    def hidden(condition, first=0, **options):
        outputs.append([])
        rng = SampleRng.from_seed(0, len(condition), start=first)
        model.generate(condition, SampleOptions(cfg_scale=3.0, **options), rng)
        return torch.stack(outputs[-1], dim=1)

    cached, alone = hidden(condition), hidden(condition[2:3], 2)
    torch.testing.assert_close(cached, hidden(condition, use_cache=False), atol=2e-5, rtol=0)
    torch.testing.assert_close(alone, cached[[2, 6]], atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", TEXTS)
def test_rows_of_the_null_leave_when_guidance_is_over(variant, texts):
    model = make_generator("gpt", SPEC, **VARIANTS["gpt"][variant])
    cached, uncached = (
        model.generate(
            texts, SampleOptions(cfg_scale=4.0, guidance_interval=(0, 0.5), use_cache=use), SampleRng.from_seed(0, 3)
        ).ids
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_the_order_of_words_matters_unless_their_rotation_is_zero():
    """LlamaGen's zeros leave a block the mean of what the words say; what it adds are those of the blocks before."""
    (condition, _), ids = texts_of(6), torch.randint(0, 11, (1, 15, 1), generator=torch.Generator().manual_seed(0))
    condition = replace(condition, states=condition.states[:, :6], mask=torch.ones(1, 6, dtype=torch.bool))
    turned = replace(condition, states=condition.states[:, [3, 0, 4, 2, 1, 5]])
    for zeros in (False, True):
        model = make_generator(
            "gpt", SPECS["grid"], condition="text_prefix", depth=1, text_positions=8, zero_prefix_rotation=zeros
        )
        difference = (model.logits(ids, turned) - model.logits(ids, condition)).abs().amax(dim=-1)
        assert (difference < 1e-6).all() if zeros else (difference > 1e-4).all()


def test_a_null_of_the_models_own_keeps_the_length_of_the_text():
    model = make_generator("gpt", SPEC, condition="text_prefix", text_positions=5, own_null=True)
    (condition, _), ids = texts_of(3, 1), random_ids(2)
    null = model.condition.null(condition)
    other = model.condition.null(replace(condition, states=condition.states + 1))
    assert torch.equal(null.states, model.condition.null_states.expand(2, -1, -1)) and null.mask.sum(1).tolist() == [
        3,
        1,
    ]
    assert torch.equal(model.logits(ids, null), model.logits(ids, other))
    assert "condition.null_states" in model.state_dict() and "condition.null_states" not in dict(
        model.named_parameters()
    )
    # Training drops texts for it, and guidance leads away from it, unless there is a negative prompt.
    dropped = model.condition.drop_some(condition, 1.0, torch.Generator())
    assert torch.equal(model.logits(ids, dropped), model.logits(ids, null))
    negative, _ = texts_of(2, seed=1)
    away = condition.away_from(negative)
    assert torch.equal(model.logits(ids, model.condition.null(away)), model.logits(ids, away.null()))
    drawn = [
        model.generate(texts, SampleOptions(cfg_scale=0.0), SampleRng.from_seed(0, 2)).ids
        for texts in (condition, null)
    ]
    assert torch.equal(*drawn)


def test_a_text_that_is_longer_than_its_place():
    model = make_generator("gpt", SPEC, condition="text_prefix", text_positions=4)
    with pytest.raises(UserError, match=r"room for 4 states of a text, got 5: set .*max_length=4"):
        model.generate(texts_of(3)[0], SampleOptions(), SampleRng.from_seed(0, 1))


def test_the_null_class_is_the_start_alone():
    model, ids = make_generator("gpt", SPEC, **VARIANTS["gpt"]["start"]), random_ids(2)
    null = model.logits(ids, ClassCondition(torch.tensor([NULL_CLASS, NULL_CLASS])))
    classes = ClassCondition(torch.tensor([0, 9]))
    assert (model.logits(ids, classes) != null).any(-1).all()
    with torch.no_grad():
        model.condition.table.weight.zero_()
    assert torch.equal(model.logits(ids, classes), null)
    without = make_generator("gpt", SPEC, **VARIANTS["gpt"]["start"], num_classes=0)
    without.generate(ClassCondition(torch.tensor([NULL_CLASS])), SampleOptions(), SampleRng.from_seed(0, 1))


def test_learned_positions_have_a_row_for_every_input():
    model = make_generator("gpt", SPEC, **VARIANTS["gpt"]["start"])
    assert model.positions.weight.shape == (6, 32) and not list(model.buffers())
    same = random_ids() * 0
    hidden = model.hidden(same[:, :-1], ClassCondition(torch.zeros(4, dtype=torch.int64)))
    assert not torch.allclose(hidden[:, 2], hidden[:, 3])


SIZES = [("class_start", depth, 12) for depth in (10, 12, 16, 20, 24, 30)] + [
    ("text_cross", depth, 16) for depth in (12, 18, 26, 36)
]


@pytest.mark.parametrize(("condition", "depth", "factor"), SIZES)
def test_parameters_of_the_papers_sizes(condition, depth, factor):
    """``12 * width^2 * depth`` in the blocks, and four more squares for cross-attention (sheet, section 3.3)."""
    config = Config(64 * depth, depth, heads=depth, condition=condition, positions="learned", mlp_multiple=8)
    with torch.device("meta"):
        model = build(config, FLEXTOK)
    in_blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert in_blocks == pytest.approx(factor * (64 * depth) ** 2 * depth, rel=0.01)
    outside = sum(parameter.numel() for parameter in model.parameters()) - in_blocks
    entry = 1000 * 64 * depth if condition == "class_start" else 2048 * (2048 + 64 * depth)
    # Start, 256 positions, embedding and head of 64,000 codes, and the last norm.
    assert outside == (1 + 256 + 2 * 64000 + 1) * 64 * depth + entry


@pytest.mark.parametrize(
    "wrong",
    [
        {"text_width": 0},
        {"condition_dropout": 1.5},
        {"text_positions": 0},
        {"own_null": True},
        {"zero_prefix_rotation": True, "positions": "learned"},
        {"text_depth": 1, "width": 6, "positions": "learned"},
    ],
)
def test_what_no_condition_can_have(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_generator("gpt", SPEC, condition="text_cross", **wrong)
