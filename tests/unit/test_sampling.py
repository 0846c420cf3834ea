"""From logits to codes: filters, schedules of guidance and temperature, the cache, packed and compiled steps."""

import math

import pytest
import torch
from torch import nn

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator
from tiny_models.text import condition_for
from vistok.errors import UserError
from vistok.generators.sampling import POWER, Sampler, draw, filter_logits, scheduled
from vistok.interfaces import SampleOptions
from vistok.nn.attention import KVCache
from vistok.nn.packed import packed_linears
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, MultiScale, TokenSpec

SPEC = TokenSpec(Grid2D(4, 4), (11,), 2, 16)
SCALES = TokenSpec(MultiScale(((1, 1), (2, 2), (3, 3))), (11,), 2, 16)
GPTS = {"plain": {}, **VARIANTS["gpt"], "shuffle": {"shuffle": {"window": 2}}}
PROBABILITY = torch.tensor([0.02, 0.4, 0.08, 0.3, 0.05, 0.15])


def sampler(schedule="constant", power=POWER, **options):
    return Sampler(SampleOptions(**options), {"guidance_schedule": schedule, "guidance_power": power})


def ids(generator, seed=0, **options):
    return generator.generate(condition_for(generator, 4), SampleOptions(**options), SampleRng.from_seed(seed, 4)).ids


# ---------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 6),
        ({"top_k": 3}, 3),
        ({"top_p": 0.8}, 3),
        ({"min_p": 0.2}, 4),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.3}, 3),
    ],
)
def test_draws_follow_what_the_filters_leave(options, kept):
    expected = PROBABILITY.clone()
    expected[PROBABILITY.argsort(descending=True)[kept:]] = 0
    expected /= expected.sum()
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    found = draw(PROBABILITY.log().expand(count, -1), uniform, **options).bincount(minlength=6)
    assert not found[expected == 0].any()
    left = expected > 0
    chi_squared = ((found[left] - count * expected[left]) ** 2 / (count * expected[left])).sum()
    # Six standard deviations above the mean of a chi-squared of kept - 1 degrees: never for the right distribution.
    assert chi_squared < kept - 1 + 6 * math.sqrt(2 * (kept - 1))


def test_temperature_is_a_power_of_the_probability():
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1))
    found = draw(PROBABILITY.log().expand(count, -1), uniform, temperature=0.5).bincount(minlength=6) / count
    torch.testing.assert_close(found, PROBABILITY**2 / (PROBABILITY**2).sum(), atol=0.014, rtol=0)


def test_min_p_is_a_share_of_the_likeliest():
    logits = torch.stack([PROBABILITY.log(), 3 + PROBABILITY.log()])  # logits need not be normalised
    for share, kept in ((0.01, 6), (0.19, 4), (0.21, 3), (1.0, 1)):
        assert filter_logits(logits, min_p=share).isfinite().sum(-1).tolist() == [kept, kept]


# ---------------------------------------------------------------------- schedules


def test_power_cosine_is_rars():
    # 1 + (16 - 1) * (1 - cos(pi * 0.5^p)) / 2
    for power in (2.75, 1.2):
        expected = 1 + 15 * (1 - math.cos(math.pi * 0.5**power)) / 2
        assert scheduled("power_cosine", 16.0, 0.5, power) == pytest.approx(expected)
        assert sampler("power_cosine", power, cfg_scale=16.0).at(0.5).scale == pytest.approx(expected)


def test_guidance_lies_in_the_interval_alone():
    guided = sampler("linear", cfg_scale=5.0, guidance_interval=(0.25, 0.75))
    assert [guided.at(known / 8).scale for known in range(8)] == [1, 1, 2, 2.5, 3, 3.5, 1, 1]
    assert [guided.will_guide(known / 8) for known in range(8)] == [True] * 6 + [False] * 2
    assert not sampler(guidance_interval=(0, 1)).will_guide(0)
    assert not sampler(cfg_scale=5.0, guidance_interval=(0, 0)).will_guide(0)


def test_the_temperature_moves_with_the_known_share():
    moving = sampler(temperature=1.2, final_temperature=0.2)
    assert [moving.at(share).options.temperature for share in (0.0, 0.5, 0.9)] == pytest.approx([1.2, 0.7, 0.3])
    assert sampler(temperature=0.7).at(0.5).options.temperature == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\]"),
        ({"final_temperature": -1.0}, "final_temperature must be at least 0"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
        ({"cfg_scale": math.inf}, "cfg_scale must be at least 0 and finite, got inf"),
        ({"guidance_interval": (0.5, 0.2)}, "0 <= a <= b <= 1, got 0.5 and 0.2"),
        ({"guidance_interval": (0.5, 1.5)}, "0 <= a <= b <= 1"),
        ({"compile": True, "use_cache": False}, "compile needs use_cache"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(UserError, match=message):
        SampleOptions(**options)


@pytest.mark.parametrize(("name", "value"), [("guidance_schedule", "cosine"), ("guidance_power", 0.0)])
def test_settings_that_are_none(name, value):
    with pytest.raises(UserError, match=name):
        ids(make_generator("gpt", SPEC), extra={name: value})


# ---------------------------------------------------------------------- what all generators make of them


@pytest.mark.parametrize(
    ("name", "spec"), [("gpt", SPEC), ("gpt", SPECS["slots"]), ("next_scale", SCALES), ("masked", SPEC)]
)
def test_an_interval_and_temperatures_reach_every_generator(name, spec):
    generator = make_generator(name, spec)
    full, none = ids(generator, cfg_scale=200.0), ids(generator)
    assert not torch.equal(full, none)
    assert torch.equal(ids(generator, cfg_scale=200.0, guidance_interval=(0, 0)), none)
    half = ids(generator, cfg_scale=200.0, guidance_interval=(0, 0.3))
    assert not torch.equal(half, full) and not torch.equal(half, none)
    assert torch.equal(ids(generator, temperature=0.6, final_temperature=0.6), ids(generator, temperature=0.6))
    assert not torch.equal(ids(generator, final_temperature=0.1), none)
    assert torch.equal(ids(generator, min_p=1.0), ids(generator, temperature=0.0))


@pytest.mark.parametrize("variant", GPTS)
def test_a_batch_without_its_null_rows_goes_on_alike(variant, monkeypatch):
    generator = make_generator("gpt", SPEC, **GPTS[variant])
    options = {"cfg_scale": 5.0, "guidance_interval": (0.25, 0.5)}
    rows = []
    hook = generator.norm.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    short = ids(generator, **options)
    hook.remove()
    assert rows == [8] * (len(rows) // 2) + [4] * (len(rows) // 2), "null rows are dropped where guidance is over"
    assert torch.equal(short, ids(generator, **options, use_cache=False))
    monkeypatch.setattr(Sampler, "will_guide", lambda self, known: True)
    assert torch.equal(short, ids(generator, **options)), "with the null rows to the end"


def test_scales_without_their_null_rows_go_on_alike(monkeypatch):
    for name in ("text", "prefix"):
        generator = make_generator("next_scale", SCALES, **VARIANTS["next_scale"][name])
        options = {"cfg_scale": 200.0, "guidance_interval": (0, 0.3), "extra": {"rounds": [[0, 1.0], [5, 1.0]]}}
        short = ids(generator, **options)
        assert not torch.equal(short, ids(generator, cfg_scale=1.0, extra=options["extra"]))
        assert torch.equal(short, ids(generator, **options, use_cache=False))
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "will_guide", lambda self, known: True)
            assert torch.equal(short, ids(generator, **options))


# ---------------------------------------------------------------------- steps of one shape


@pytest.mark.parametrize(
    ("variant", "spec"),
    [(name, SPEC) for name in ("plain", "text", "read_prefix", "any_order", "shuffle")] + [("plain", SPECS["slots"])],
)
def test_compiled_steps_give_the_same_codes_from_one_graph(variant, spec, monkeypatch):
    """By a backend that runs the traced graph; ``fullgraph`` fails where Python would be left in a step."""
    generator, graphs, compile_ = make_generator("gpt", spec, **GPTS[variant]), [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def traced(step, mode, **options):
        assert mode is None and options == {"fullgraph": True, "dynamic": False}
        return compile_(step, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    whole = {"cfg_scale": 3.0}
    assert torch.equal(ids(generator, **whole, compile=True), ids(generator, **whole))
    assert len(graphs) == 1
    ids(generator, **whole, compile=True, seed=1)
    assert len(graphs) == 1, "another generation needs no other graph"
    half = {"cfg_scale": 3.0, "guidance_interval": (0, 0.5)}
    assert torch.equal(ids(generator, **half, compile=True), ids(generator, **half))
    assert len(graphs) == 2, "and a smaller batch one more"
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "spec"), [("masked", SPEC), ("next_scale", SCALES)])
def test_steps_that_differ_in_shape_are_not_compiled(name, spec):
    with pytest.raises(UserError, match=r"compile: the steps of a .* differ in shape"):
        ids(make_generator(name, spec), compile=True)


def test_a_fixed_cache_holds_what_a_growing_one_does():
    rng = torch.Generator().manual_seed(0)
    past, new = (torch.randn(2, 3, 2, count, 4, generator=rng) for count in (3, 1))
    caches = [KVCache(1, 6), KVCache(1, 6)]
    for cache in caches:
        cache.extend(0, *past)
        cache.advance(3)
    growing, fixed = caches[0], caches[1].fixed()
    for _ in range(2):
        grown, whole = growing.extend(0, *new), fixed.extend(0, *new)
        length = grown[0].shape[2]
        for short, long in zip(grown, whole):
            assert torch.equal(long[:, :, :length], short) and not long[:, :, length:].any()
        growing.advance(1)
        fixed.advance(1)
    assert fixed.place(1).tolist() == [growing.place(1).start] == [5]


def test_the_cache_has_the_type_of_the_keys():
    cache = KVCache(1, 4)
    keys, _ = cache.extend(0, *torch.ones(2, 1, 2, 1, 4, dtype=torch.bfloat16))
    assert keys.dtype == torch.bfloat16


# ---------------------------------------------------------------------- packed weights


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512, bias=False), nn.Linear(512, 3)).eval()


@torch.no_grad()
def test_packed_layers_compute_the_same(layers):
    x = torch.randn(5, 2, 512, generator=torch.Generator().manual_seed(1))
    plain = layers(x)
    with packed_linears(layers):
        assert ["forward" in vars(layer) for layer in layers] == [True, True, False], "the small one stays as it is"
        torch.testing.assert_close(layers(x), plain, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError):
            layers(x[..., :100])
    assert not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(layers(x), plain)
    with pytest.raises(KeyError), packed_linears(layers):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers)
    with packed_linears(layers, enabled=False):
        assert not any("forward" in vars(layer) for layer in layers)


@torch.no_grad()
def test_packed_layers_follow_autocast(layers):
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        half = layers(x)
        with packed_linears(layers):
            packed = layers(x)
    assert packed.dtype == half.dtype == torch.bfloat16
    torch.testing.assert_close(packed, half, atol=0.02, rtol=0.02)


def test_a_generator_packs_its_large_layers():
    generator = make_generator("gpt", SPEC, width=256, heads=4, mlp_multiple=256)
    mlp, seen = generator.blocks[0].mlp, []
    mlp.register_forward_hook(lambda module, args, output: seen.append("forward" in vars(module.gate_up)))
    packed = ids(generator, cfg_scale=2.0)
    assert all(seen) and "forward" not in vars(mlp.gate_up)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vistok.nn.packed._LEAST_WEIGHTS", 1 << 40)
        assert torch.equal(ids(generator, cfg_scale=2.0), packed)
