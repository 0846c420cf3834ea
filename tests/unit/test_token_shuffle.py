"""Token-Shuffle: windows of a grid share a position, and nothing else changes."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiny_models.models import make_generator
from vistok.errors import UserError
from vistok.generators.sampling import SCHEDULES, scheduled
from vistok.generators.token_shuffle import Config, TokenShuffle, window_order
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.rng import SampleRng, seeded_generator
from vistok.tokens import Grid2D, MultiScale, Ordered1D, Tokens, TokenSpec

SPEC = TokenSpec(Grid2D(4, 8), (11,), 2, 16)


@pytest.fixture(params=[2, 4])
def gpt(request):
    return make_generator("gpt", SPEC, shuffle={"window": request.param})


def tokens(seed=0, batch=2):
    return Tokens(torch.randint(0, 11, (batch, 32, 1), generator=torch.Generator().manual_seed(seed)), SPEC)


CONDITION = ClassCondition(torch.tensor([3, 5]))


def test_windows_are_torchs_pixel_unshuffle():
    grid = torch.arange(32.0).view(1, 1, 4, 8)
    windows = F.pixel_unshuffle(grid, 2).flatten(2)[0].T  # (windows, codes of a window)
    assert window_order(Grid2D(4, 8), 2).tolist() == windows.flatten().tolist()


def test_arranging_comes_back(gpt):
    ids = tokens().ids
    assert torch.equal(gpt.adapter.restore(gpt.adapter.arrange(ids)), ids)


def test_the_backbone_has_one_position_for_each_window(gpt):
    window = gpt.config.shuffle.window
    ids = gpt.adapter.arrange(tokens().ids)
    assert gpt.adapter.num_positions == 32 // window**2
    assert gpt.hidden(ids, CONDITION).shape[1] == 1 + 32 // window**2


def test_a_window_changes_later_windows_only(gpt):
    size = gpt.config.shuffle.window**2
    ids = gpt.adapter.arrange(tokens().ids)
    before = gpt.logits(ids, CONDITION)
    changed = ids.clone()
    changed[:, :size] = (changed[:, :size] + 1) % 11
    moved = (gpt.logits(changed, CONDITION) - before).abs().amax((0, 2)) > 1e-6
    assert not moved[:size].any() and moved[size:].all()


def test_cached_and_uncached_sampling_agree(gpt):
    options = {"cfg_scale": 2.0, "top_k": 5}
    cached, again = (
        gpt.generate(CONDITION, SampleOptions(**options, use_cache=cache), SampleRng.from_seed(0, 2))
        for cache in (True, False)
    )
    assert torch.equal(cached.ids, again.ids)


def test_samples_are_in_raster_order():
    """Overfit one image: greedy sampling returns it, which it could not in any other order."""
    torch.manual_seed(0)
    gpt = make_generator("gpt", SPEC, shuffle={"window": 2}, dropout=0.0, condition_dropout=0.0).train()
    gpt.reset_parameters()
    wanted = tokens(batch=2)
    optimizer = torch.optim.AdamW(gpt.parameters(), 5e-3)
    for step in range(120):
        loss = gpt.loss(wanted, CONDITION, seeded_generator(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    drawn = gpt.eval().generate(CONDITION, SampleOptions(temperature=0), SampleRng.from_seed(0, 2))
    assert torch.equal(drawn.ids, wanted.ids)


def test_the_first_loss_is_the_log_of_the_vocabulary(gpt):
    gpt.reset_parameters()
    loss = gpt.loss(tokens(), CONDITION, seeded_generator(0)).total
    assert loss.item() == pytest.approx(math.log(11), rel=1e-5)


def test_a_window_of_one_is_the_plain_model():
    plain, one = (make_generator("gpt", SPEC, **args) for args in ({}, {"shuffle": {"window": 1}}))
    assert plain.state_dict().keys() == one.state_dict().keys()


@pytest.mark.parametrize(
    ("spec", "window", "message"),
    [
        (TokenSpec(Ordered1D(16), (11,), 2, 16), 2, "Ordered1D has none"),
        (TokenSpec(MultiScale(((1, 1), (2, 2))), (11,), 2, 16), 2, "MultiScale has none"),
        (TokenSpec(Grid2D(4, 4), (5, 5), 2, 16), 2, "2 slots"),
        (TokenSpec(Grid2D(4, 6), (11,), 2, 16), 4, "4 do not divide 4 x 6"),
        (SPEC, 0, "side 0"),
    ],
)
def test_tokens_without_such_windows_are_refused(spec, window, message):
    with pytest.raises(UserError, match=message):
        TokenShuffle(spec, 32, Config(window=window))


def test_a_width_that_windows_do_not_divide_is_refused():
    with pytest.raises(UserError, match="width 30 must be a multiple of the 4"):
        TokenShuffle(SPEC, 30, Config(window=2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_never_fall_and_end_at_the_scale_asked_for(schedule):
    scales = [scheduled(schedule, 7.5, step / 20) for step in range(21)]
    assert scales == sorted(scales) and scales[-1] == pytest.approx(7.5)
    assert scales[0] == (7.5 if schedule == "constant" else 1.0)


def test_nothing_grows_to_a_scale_below_one():
    assert scheduled("linear", 0.0, 0.5) == 0.0


def test_linear_is_tokenflows_ramp():
    assert [scheduled("linear", 8.5, number / 3) for number in range(4)] == [1.0, 3.5, 6.0, 8.5]  # 1 + 7.5 k / (K - 1)


def test_half_linear_is_full_from_the_middle_on():
    assert scheduled("half_linear", 7.5, 0.25) == pytest.approx(4.25)
    assert scheduled("half_linear", 7.5, 0.5) == scheduled("half_linear", 7.5, 0.9) == 7.5


def test_a_schedule_changes_guided_samples_alone(gpt):
    def draw(scale, schedule):
        options = SampleOptions(cfg_scale=scale, extra={"guidance_schedule": schedule})
        return gpt.generate(CONDITION, options, SampleRng.from_seed(0, 2)).ids

    assert not torch.equal(draw(6.0, "constant"), draw(6.0, "linear"))
    assert torch.equal(draw(1.0, "constant"), draw(1.0, "linear"))
    with pytest.raises(UserError, match="guidance_schedule must be one of"):
        draw(2.0, "no_such")
