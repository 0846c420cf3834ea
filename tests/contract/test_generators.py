"""The laws of ``vistok.interfaces.Generator``, for every registered generator on every layout it accepts."""

import math
from dataclasses import replace

import pytest
import torch

from tiny_models.args import TINY_ARGS
from tiny_models.models import SPECS, component_of, make_generator
from tiny_models.text import condition_for
from vistok.checkpoint import export, load_generator
from vistok.config import available, build
from vistok.errors import UserError
from vistok.interfaces import ClassCondition, SampleOptions, TextCondition
from vistok.rng import SampleRng
from vistok.tokens import Ordered1D, Tokens


def test_every_generator_has_a_tiny_size():
    assert available("generators") == sorted(TINY_ARGS["generators"])


def random_tokens(spec, count=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    slots = [torch.randint(0, size, (count, spec.num_positions), generator=rng) for size in spec.vocab_sizes]
    return Tokens(torch.stack(slots, dim=-1), spec)


@pytest.mark.parametrize("name", available("generators"))
def test_a_generator_accepts_some_layout_and_says_why_it_refuses_another(name):
    accepted = 0
    for spec in SPECS.values():
        try:
            type(make_generator(name, spec)).check(spec)
            accepted += 1
        except UserError as refusal:
            assert len(str(refusal).split()) > 5, "a refusal is a sentence with its reason"
    assert accepted


def test_a_fresh_loss_is_the_log_of_the_vocabulary(generator, condition):
    fresh = build("generators", component_of(generator), generator.spec)
    report = fresh(random_tokens(generator.spec), condition, torch.Generator().manual_seed(0))
    expected = sum(map(math.log, generator.spec.vocab_sizes)) / generator.spec.num_slots
    assert report.total.item() == pytest.approx(expected, abs=0.1)


def test_loss_is_reproducible_and_reaches_every_parameter(generator):
    generator.train()
    tokens, condition = random_tokens(generator.spec, 64), condition_for(generator, 64)

    def report():
        torch.manual_seed(0)
        return generator(tokens, condition, torch.Generator().manual_seed(0))

    first, second = report(), report()
    assert torch.equal(first.total, second.total)
    torch.testing.assert_close(first.total, sum(first.terms.values()))
    first.total.backward()
    silent = [n for n, p in generator.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent


def test_samples_are_legal_and_reproducible(generator, condition):
    options = SampleOptions(cfg_scale=2.0, top_p=0.9)
    first = generator.generate(condition, options, SampleRng.from_seed(0, 4))
    assert first.ids.shape == (4, generator.spec.num_positions, generator.spec.num_slots)
    assert torch.equal(first.ids, generator.generate(condition, options, SampleRng.from_seed(0, 4)).ids)
    assert not torch.equal(first.ids, generator.generate(condition, options, SampleRng.from_seed(1, 4)).ids)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_cache_changes_nothing(generator, condition, scale):
    cached, uncached = (
        generator.generate(condition, SampleOptions(cfg_scale=scale, use_cache=use), SampleRng.from_seed(0, 4))
        for use in (True, False)
    )
    assert torch.equal(cached.ids, uncached.ids)


def test_samples_are_legal_under_bf16_autocast(generator, condition):
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generator.generate(condition, SampleOptions(cfg_scale=2.0), SampleRng.from_seed(0, 4))
    assert tokens.ids.shape[1] == generator.spec.num_positions


def test_a_sample_does_not_depend_on_its_batch(generator, condition):
    options = SampleOptions(cfg_scale=2.0)
    together = generator.generate(condition, options, SampleRng.from_seed(5, 4))
    for row in range(4):
        alone = generator.generate(condition[row : row + 1], options, SampleRng.from_seed(5, 1, start=row))
        assert torch.equal(together.ids[row : row + 1], alone.ids)


def test_a_shorter_code_is_a_prefix_of_a_longer_one(generator, condition):
    options = SampleOptions(num_tokens=2)
    if not isinstance(generator.spec.layout, Ordered1D):
        with pytest.raises(UserError, match="prefix"):
            generator.generate(condition, options, SampleRng.from_seed(0, 4))
        return
    short = generator.generate(condition, options, SampleRng.from_seed(0, 4))
    full = generator.generate(condition, SampleOptions(), SampleRng.from_seed(0, 4))
    assert torch.equal(short.ids, full.ids[:, :2])


def test_guidance_at_the_ends_of_its_scale(generator, condition):
    rng = [SampleRng.from_seed(0, 4) for _ in range(2)]
    unconditional = generator.generate(generator.condition.null(condition), SampleOptions(), rng[0])
    assert torch.equal(generator.generate(condition, SampleOptions(cfg_scale=0.0), rng[1]).ids, unconditional.ids)


def test_a_condition_matters_and_its_null_does_not_depend_on_it(generator, condition):
    def loss(rows):
        return generator.loss(random_tokens(generator.spec, len(rows)), rows, torch.Generator()).total

    assert loss(condition) != loss(condition.null())
    torch.testing.assert_close(loss(condition[3:]), loss(condition.null()[3:]))  # the last row is null already


def test_progress_counts_every_position(generator, condition):
    seen = []
    generator.generate(condition, SampleOptions(), SampleRng.from_seed(0, 4), progress=seen.append)
    assert sum(seen) == generator.spec.num_positions


def test_tokens_of_another_spec_are_refused_and_prefixes_are_not(generator, condition):
    spec = generator.spec
    for other in (replace(spec, layout=Ordered1D(2 * spec.num_positions)), replace(spec, vocab_sizes=(5,))):
        with pytest.raises(UserError, match=r"models tokens of TokenSpec\(.*\), got TokenSpec"):
            generator(random_tokens(other), condition, torch.Generator())
    whole = random_tokens(spec)
    for count in spec.layout.prefixes[:-1]:
        try:
            assert generator.train()(whole.prefix(count), condition, torch.Generator()).total.isfinite()
        except UserError as refusal:
            assert "behind all scales" in str(refusal)


@pytest.mark.parametrize("class_id", [10, -2])
def test_a_class_outside_the_range_is_refused(generator, class_id):
    with pytest.raises(UserError, match="conditioned on text" if generator.text_width else r"0\.\.9"):
        generator.generate(ClassCondition(torch.tensor([class_id])), SampleOptions(), SampleRng.from_seed(0, 1))


def test_another_condition_is_refused(generator, condition):
    width = generator.text_width or 16
    text = TextCondition(torch.zeros(1, 2, width), torch.ones(1, 2) > 0, torch.zeros(1, 1, width), torch.ones(1, 1) > 0)
    if generator.text_width:
        wrong = {
            "16 channels, got 8": replace(text, states=text.states[..., :8]),
            "without any state": replace(text, mask=~text.mask),
        }
    else:
        wrong = {"conditioned on classes": text}
    for message, other in wrong.items():
        with pytest.raises(UserError, match=message):
            generator.generate(other, SampleOptions(), SampleRng.from_seed(0, 1))


def test_export_round_trip(generator, condition, tmp_path):
    component = component_of(generator)
    export(tmp_path, "generator", component, generator.spec, generator.state_dict())
    loaded = load_generator(tmp_path)
    options = SampleOptions(cfg_scale=1.5)
    samples = [model.generate(condition, options, SampleRng.from_seed(0, 4)).ids for model in (loaded, generator)]
    assert torch.equal(*samples)
