"""Scale after scale: what sees what, guidance and refinement, the tokenizer's code vectors."""

import pytest
import torch
import yaml

from tiny_models.args import TINY_ARGS
from tiny_models.models import exported_tokenizer, make_generator, make_tokenizer, randomized
from tiny_models.text import condition_for
from vistok.checkpoint import load_generator, load_tokenizer
from vistok.config import typed
from vistok.errors import UserError
from vistok.generators.next_scale import Config, NextScale, build
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.rng import SampleRng, seeded_generator
from vistok.tokenizers import vqgan
from vistok.tokens import Grid2D, MultiScale, Tokens, TokenSpec
from vistok.training.run import train
from vistok.training.run_config import load_config

SPEC = TokenSpec(MultiScale(((1, 1), (2, 2), (2, 3), (4, 4))), (13,), 3, 16)
ENDS = (1, 5, 11, 27)
KINDS = {
    "residual": ("next_scale", {"mode": "residual", "phi": 2}),
    "cascade": ("next_scale", {"mode": "cascade", "rotary": True}),
    "text": ("next_scale", {"condition": "text_cross"}),
    "t2i": ("tokenflow_t2i", {}),
}


@pytest.fixture(params=KINDS)
def model(request):
    name, args = KINDS[request.param]
    return make_generator(name, SPEC, **args)


def random_ids(count=3):
    return torch.randint(0, 13, (count, 27, 1), generator=torch.Generator().manual_seed(0))


def generate(model, condition, seed=0, **options):
    return model.generate(condition, SampleOptions(**options), SampleRng.from_seed(seed, len(condition))).ids


@pytest.mark.parametrize("scale", range(4))
def test_a_code_changes_only_the_predictions_of_later_scales(model, scale):
    ids, condition = random_ids(), condition_for(model, 3)
    before = model.logits(ids, condition)
    ids[:, ENDS[scale] - 1] = (ids[:, ENDS[scale] - 1] + 1) % 13
    after = model.logits(ids, condition)
    torch.testing.assert_close(before[:, : ENDS[scale]], after[:, : ENDS[scale]])
    changed = ((before - after).abs() > 1e-4).any(-1)[:, ENDS[scale] :]
    assert changed.all()


def test_the_first_scales_alone_are_predicted_alike(model):
    ids, condition = random_ids(), condition_for(model, 3)
    whole = model.logits(ids, condition)
    for end in ENDS[:-1]:
        torch.testing.assert_close(model.logits(ids[:, :end], condition), whole[:, :end])


def test_positions_of_a_scale_see_each_other(model):
    """The last position of a scale is heard by its first, through the input that belongs to it alone."""
    condition = condition_for(model, 3)
    start, there, contexts = model.condition.prefix(condition, model.blocks)
    x = model.sequence(start, random_ids()[:, :11, 0])
    before = model.backbone(x, there, contexts)
    x[:, -1] += 1
    changed = ((model.backbone(x, there, contexts) - before).abs() > 1e-5).any(-1)
    assert not changed[:, :-16].any() and changed[:, -16:].all()


@pytest.mark.parametrize("rounds", [[], [[0, 0.9], [3, 0.8], [2, 1]]], ids=["one", "refined"])
def test_the_cache_changes_nothing(model, rounds):
    condition = condition_for(model, 3)
    options = {"cfg_scale": 3.0, "extra": {"rounds": rounds}}
    cached, uncached = (generate(model, condition, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_sampling_follows_the_teacher_forced_predictions(model):
    condition = condition_for(model, 3)
    ids = generate(model, condition, temperature=0.0)
    assert torch.equal(model.logits(ids, condition)[..., -13:].argmax(-1), ids[:, :, 0])


def test_a_prefix_of_whole_scales_is_what_a_longer_code_begins_with(model):
    condition = condition_for(model, 3)
    full = generate(model, condition)
    for end in ENDS:
        assert torch.equal(generate(model, condition, num_tokens=end), full[:, :end])
    with pytest.raises(UserError, match=r"num_tokens: 6 is no prefix of whole scales \(1, 5, 11, 27\)"):
        generate(model, condition, num_tokens=6)


def test_linear_guidance_guides_from_the_second_scale_on(model):
    condition = condition_for(model, 3)[:2]
    free, linear, constant = (
        generate(model, condition, temperature=0.0, cfg_scale=scale, extra={"guidance_schedule": schedule})
        for scale, schedule in ((1.0, "linear"), (9.0, "linear"), (9.0, "constant"))
    )
    assert torch.equal(free[:, :1], linear[:, :1]) and not torch.equal(free[:, 1:], linear[:, 1:])
    assert not torch.equal(linear, constant)


def test_the_likeliest_codes_of_a_refined_scale_are_sampled_again(model):
    """Rounds that take the likeliest code do not depend on the draws, except through the codes that they refine."""
    condition = condition_for(model, 3)
    greedy = [[1, 1.0], [1, 1.0]]
    first, second = (generate(model, condition, seed, extra={"rounds": greedy}) for seed in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first[:, :1], generate(model, condition, temperature=0.0)[:, :1])
    sampled = generate(model, condition, extra={"rounds": [[0, 1.0]]})
    assert torch.equal(sampled, generate(model, condition))


def test_refining_what_is_refined_already_changes_nothing():
    """On codes of zeros the inputs of all rounds are alike: rounds that take the likeliest code agree with one."""
    model = make_generator("next_scale", SPEC)
    model.codes.codes.zero_()
    condition = condition_for(model, 3)
    once, thrice = (generate(model, condition, extra={"rounds": [[1, 1.0]] * count}) for count in (1, 3))
    assert torch.equal(once, thrice)


def test_refinement_changes_codes():
    model = make_generator("next_scale", SPEC, mode="cascade")
    condition = condition_for(model, 3)
    once, twice = (generate(model, condition, extra={"rounds": [[1, 1.0]] * count}) for count in (1, 2))
    assert torch.equal(once[:, :1], twice[:, :1]) and not torch.equal(once, twice)


def test_refinement_costs_one_pass_for_each_scale_but_the_first(model):
    passes = []
    model.norm.register_forward_hook(lambda *args: passes.append(args))
    generate(model, condition_for(model, 3), extra={"rounds": [[0, 1.0], [1, 1.0]]})
    assert len(passes) == 1 + 2 * 3


def test_the_inputs_of_a_scale_are_what_the_coarser_ones_add_up_to():
    model = make_generator("next_scale", SPEC, mode="cascade")
    ids = random_ids()[:, :5, 0]
    start, _, _ = model.condition.prefix(condition_for(model, 3), model.blocks)
    x = model.sequence(start, ids)
    vectors = model.codes.codes[ids]
    first = vectors[:, :1].expand(-1, 4, -1)  # one code upsampled
    expected = model.embedding(first) + model.levels.weight[1] + model.positions.weight[1:5]
    torch.testing.assert_close(x[:, 1:5], expected)
    assert not torch.allclose(model.embedding(vectors[:, 1:]), x[:, 1:5])


def test_it_adopts_the_code_vectors_of_its_tokenizer():
    tokenizer = make_tokenizer("tokenflow")
    model = make_generator("next_scale", tokenizer.spec)
    model.adopt(tokenizer)
    assert torch.equal(model.codes.codes, tokenizer.scale_codes.codes)
    assert "codes.codes" in model.state_dict() and not any(p.requires_grad for p in model.codes.parameters())
    ids = torch.randint(0, 24, (2, 21), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.codes.decode(ids), tokenizer.quantizer.decode(ids))


def test_a_run_adopts_once(tmp_path, monkeypatch):
    """A run that goes on has the vectors in its checkpoint."""
    tokenizer = exported_tokenizer("tokenflow").name
    run = {
        "output": str(tmp_path / "run"),
        "tokenizer": tokenizer,
        "generator": {"name": "next_scale", "args": TINY_ARGS["generators"]["next_scale"]},
        "data": {"name": "digits", "batch_size": 2},
        "trainer": {"max_updates": 1, "accelerator": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    train(load_config(tmp_path / "run.yaml", []))
    monkeypatch.setattr(NextScale, "adopt", None)
    train(load_config(tmp_path / "run.yaml", ["resume=auto", "trainer.max_updates=2"]))
    codes = load_generator(tmp_path / "run").codes.codes
    assert torch.equal(codes, load_tokenizer(tokenizer).scale_codes.codes)


def test_a_tokenizer_without_scales_cannot_be_adopted():
    model = make_generator("next_scale", SPEC)
    with pytest.raises(UserError, match="needs scale codes, and FlexTok has none"):
        model.adopt(make_tokenizer("flextok"))
    with pytest.raises(UserError, match=r"codes is \(24, 7\), expected \(13, 3\)"):
        model.adopt(make_tokenizer("tokenflow"))


def test_another_phi_is_refused():
    args = {**TINY_ARGS["tokenizers"]["vqgan"], "scales": [1, 2, 4], "phi": 2, "mode": "residual"}
    tokenizer = randomized(vqgan.build(typed(vqgan.Config, args, "test")))
    model = make_generator("next_scale", tokenizer.spec)
    with pytest.raises(UserError, match=r"set generator\.args\.phi=2"):
        model.adopt(tokenizer)
    make_generator("next_scale", tokenizer.spec, phi=2).adopt(tokenizer)
    with pytest.raises(UserError, match=r"set generator\.args\.phi=0"):
        make_generator("next_scale", make_tokenizer("tokenflow").spec, phi=2).adopt(make_tokenizer("tokenflow"))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TokenSpec(Grid2D(2, 2), (13,), 3, 16), "has none"),
        (TokenSpec(SPEC.layout, (13, 4), 3, 16), "one discrete code"),
        (TokenSpec(SPEC.layout, (), 3, 16), "one discrete code"),
    ],
)
def test_other_tokens_are_refused(spec, reason):
    with pytest.raises(UserError, match=reason):
        make_generator("next_scale", spec)


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"guidance_schedule": "ramp"}, "guidance_schedule must be one of constant, linear, .*, got 'ramp'"),
        ({"rounds": [1, 2]}, r"rounds must be pairs \[\[top_k, top_p\], ...\], got \[1, 2\]"),
        ({"rounds": [[1, 2.0]]}, "top_p must lie in"),
        ({"round": []}, "no sampling option 'round'"),
    ],
)
def test_sampling_options_that_there_are_not(extra, complaint):
    model = make_generator("next_scale", SPEC)
    with pytest.raises(UserError, match=complaint):
        generate(model, condition_for(model, 3), extra=extra)


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"width": 0}, {"num_classes": -1}, {"dropout": 2.0}, {"mlp_hidden": 0}]
)
def test_numbers_that_no_model_can_have(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_generator("next_scale", SPEC, **wrong)


def test_it_learns_sequences_by_heart():
    torch.manual_seed(0)
    model = build(Config(64, 2, 2, 128, condition_dropout=0.0, phi=0, num_classes=10), SPEC)
    tokens, condition = Tokens(random_ids(8), SPEC), ClassCondition(torch.arange(8))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    model.train()
    for update in range(120):
        loss = model(tokens, condition, seeded_generator("learn", update)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    model.eval()
    assert torch.equal(generate(model, condition, temperature=0.0), tokens.ids)
