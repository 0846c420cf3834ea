import math
from dataclasses import replace

import pytest
import torch

from tiny_models.models import randomized
from vistok.errors import UserError
from vistok.flow.guidance import guide
from vistok.generators import dimensionwise_head, gpt, sampling
from vistok.generators.losses import cross_entropy
from vistok.generators.sampling import Picker
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Tokens, TokenSpec

SPEC = TokenSpec(Grid2D(2, 3), (5, 3, 7, 5), 4, 16)
HEAD = dimensionwise_head.Config(width=16, depth=2, heads=2, dropout=0.0)
TINY = gpt.Config(width=16, depth=1, heads=2, num_classes=5, mlp_multiple=8, dropout=0.0, head=HEAD)


@pytest.fixture
def model():
    return randomized(gpt.build(TINY, SPEC))


def random_ids(spec=SPEC, count=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    slots = [torch.randint(0, size, (count, spec.num_positions), generator=rng) for size in spec.vocab_sizes]
    return torch.stack(slots, dim=-1)


class Forced(Picker):
    """Takes the codes of a test and keeps the guided logits."""

    codes: torch.Tensor
    seen: list

    def __call__(self, logits, uniform):
        slot = len(self.seen)
        self.seen.append(self.guide(logits, len(uniform)))
        return self.codes.flatten(1)[:, slot]


def forced(codes):
    return type("ForcedHere", (Forced,), {"codes": codes, "seen": []})


def test_a_code_changes_only_later_slots_and_positions(model):
    ids, condition = random_ids(), ClassCondition(torch.arange(3))
    before = model.logits(ids, condition).flatten(1, 2)
    ids[:, 2, 1] = (ids[:, 2, 1] + 1) % 3
    after = model.logits(ids, condition).flatten(1, 2)
    changed = 2 * 4 + 1
    assert torch.equal(before[:, : changed + 1], after[:, : changed + 1])
    assert (before[:, changed + 1 :] != after[:, changed + 1 :]).any(-1).all()


def test_one_pass_sees_the_likelihood_that_sampling_draws_from(model, monkeypatch):
    ids, condition = random_ids(), ClassCondition(torch.arange(3))
    picker = forced(ids)
    monkeypatch.setattr(sampling, "Picker", picker)
    sampled = model.generate(condition, SampleOptions(), SampleRng.from_seed(0, 3))
    assert torch.equal(sampled.ids, ids)
    likelihood = torch.stack(picker.seen, dim=1).log_softmax(-1).gather(-1, ids.flatten(1)[..., None])
    loss = model.loss(Tokens(ids, SPEC), condition, torch.Generator())
    torch.testing.assert_close(-likelihood.sum(), loss.total * ids.numel())


@pytest.mark.parametrize("place", ["features", "logits"])
def test_guided_sampling_is_the_same_without_the_cache(model, place):
    model.adapter.config = replace(HEAD, guidance=place)
    options = SampleOptions(cfg_scale=3.0, top_p=0.9, top_k=4)
    cached, uncached = (
        model.generate(ClassCondition(torch.arange(4)), replace(options, use_cache=use), SampleRng.from_seed(0, 4)).ids
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_guidance_meets_the_features_or_the_logits(model):
    head, ids = model.adapter, random_ids(count=4)[:, 0]
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    conditional, null = hidden.split(4)
    both = head.logits(hidden[:, None], ids.repeat(2, 1)[:, None])[:, 0].split(4)
    expected = {
        "features": head.logits(guide(conditional, null, 2.5)[:, None], ids[:, None])[:, 0],
        "logits": guide(*both, 2.5),
    }
    for place, logits in expected.items():
        head.config = replace(HEAD, guidance=place)
        pick = forced(ids)(SampleOptions(), 2.5)
        assert torch.equal(head.sample(hidden, torch.zeros(4, 1, 4), pick)[:, 0], ids)
        torch.testing.assert_close(torch.stack(pick.seen, dim=1), logits)
    assert not torch.allclose(*expected.values(), atol=0.1)


@pytest.mark.parametrize("place", ["features", "logits"])
def test_guidance_of_scale_one_is_none(model, place):
    model.adapter.config = replace(HEAD, guidance=place)
    condition = ClassCondition(torch.arange(4))
    # With no guided token both branches still run, at scale 1.
    both, one = (
        model.generate(condition, options, SampleRng.from_seed(0, 4)).ids
        for options in (SampleOptions(cfg_scale=3.0, guidance_interval=(0, 0)), SampleOptions())
    )
    assert torch.equal(both, one)


def test_the_released_first_step_changes_sampling_alone(model):
    ids, condition = random_ids(), ClassCondition(torch.arange(3))
    results = []
    for switch in (False, True):
        model.adapter.config = replace(HEAD, step_in_first_input=switch)
        loss = model.loss(Tokens(ids, SPEC), condition, torch.Generator()).total
        results.append((loss, model.generate(condition, SampleOptions(temperature=0), SampleRng.from_seed(0, 3)).ids))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def chain(count, rng, slots=4, levels=4):
    """Each slot repeats the one before, or with a chance of 1/4 the next level."""
    first = torch.randint(0, levels, (count, 1), generator=rng)
    steps = (torch.rand(count, slots - 1, generator=rng) < 0.25).long()
    return torch.cat([first, first + steps.cumsum(1)], dim=1) % levels


@pytest.mark.parametrize("parallel", [False, True])
def test_only_a_head_that_sees_the_codes_before_learns_how_slots_depend(parallel):
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(1, 1), (4,) * 4, 4, 16)
    head = dimensionwise_head.DimensionwiseHead(spec, 1, replace(HEAD, depth=1, parallel=parallel))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(80):
        ids = chain(256, rng)[:, None]
        loss = cross_entropy(head.logits(torch.ones(256, 1, 1), ids), ids).mean((0, 1))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    step_entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = [math.log(4), *[math.log(4) if parallel else step_entropy] * 3]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), atol=0.08, rtol=0)


def test_a_parallel_head_does_not_look_at_codes(model):
    parallel = randomized(gpt.build(replace(TINY, head=replace(HEAD, parallel=True)), SPEC))
    ids, condition = random_ids(), ClassCondition(torch.arange(3))
    before = parallel.logits(ids, condition)
    ids[:, 2, 0] = (ids[:, 2, 0] + 1) % 5
    assert torch.equal(before[:, 2], parallel.logits(ids, condition)[:, 2])


def test_codes_and_their_places_are_learned_by_heart():
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(2, 2), (8,) * 4, 4, 16)
    model = gpt.build(replace(TINY, width=32, num_classes=4, condition_dropout=0.0, head=replace(HEAD, width=32)), spec)
    tokens, condition = Tokens(random_ids(spec, 4), spec), ClassCondition(torch.arange(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens, condition, torch.Generator()).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05
    sampled = model.eval().generate(condition, SampleOptions(temperature=0), SampleRng.from_seed(0, 4))
    assert torch.equal(sampled.ids, tokens.ids)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"width": 15}, "multiple of 2 for its 2 heads"), ({"depth": 0}, "depth"), ({"dropout": 1.5}, "dropout")],
)
def test_numbers_that_no_head_can_have(wrong, message):
    with pytest.raises(UserError, match=message):
        gpt.build(replace(TINY, head=replace(HEAD, **wrong)), SPEC)


def test_a_vocabulary_without_a_table_is_refused():
    with pytest.raises(UserError, match="number of levels"):
        gpt.GPT.check(TokenSpec(Grid2D(2, 2), (8, 16384), 2, 16))
