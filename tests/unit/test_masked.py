import argparse
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator, randomized
from tiny_models.text import condition_for
from vistok.checkpoint import export, load_generator, tokenizer_folder
from vistok.config import Component
from vistok.errors import UserError
from vistok.generators import masked_published
from vistok.generators.dimensionwise_head import Config as HeadConfig
from vistok.generators.losses import cross_entropy
from vistok.generators.masked import Config, Masked, build, hidden_after
from vistok.generators.masked_published import FILE, PUBLISHED_KEYS
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.published import main as published_command
from vistok.quantizers.dimensionwise import gaussian_cells
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Tokens, TokenSpec

SPEC = TokenSpec(Grid2D(3, 4), (8,) * 4, 4, 16)
HEAD = HeadConfig(width=16, depth=1, heads=2)
TINY = Config(width=16, depth=2, heads=2, buffer=3, num_classes=5, head=HEAD, dropout=0.0, steps=5)


@pytest.fixture
def model():
    return randomized(build(TINY, SPEC))


def random_tokens(spec=SPEC, count=3, seed=0):
    shape = (count, spec.num_positions, spec.num_slots)
    ids = torch.randint(0, min(spec.vocab_sizes), shape, generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, spec)


def random_order(count=3, seed=0):
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)


# ---------------------------------------------------------------------- training


def test_hidden_codes_have_no_influence_on_features(model):
    ids, order, prefix = random_tokens().ids, random_order(), model.prefix(ClassCondition(torch.arange(3)))
    hidden, visible = order[:, :7], order[:, 7:].sort(dim=1).values
    other = ids.scatter(1, hidden[..., None].expand(-1, -1, 4), 0)
    assert torch.equal(*(model.features(codes, visible, prefix) for codes in (ids, other)))
    seen = ids.clone()
    seen[torch.arange(3), visible[:, 0], 0] = (seen[torch.arange(3), visible[:, 0], 0] + 1) % 8
    assert (model.features(ids, visible, prefix) != model.features(seen, visible, prefix)).any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS["masked"])
def test_every_state_of_a_text_counts_and_no_padding(variant):
    model = make_generator("masked", SPECS["grid"], **VARIANTS["masked"][variant])
    ids, visible, texts = random_tokens(SPECS["grid"]).ids, torch.tensor([[1, 4]] * 3), condition_for(model, 3)
    before = model.features(ids, visible, model.prefix(texts))
    for position, is_there in enumerate(texts.mask.T):
        states = texts.states.clone()
        states[:, position] += 1
        features = model.features(ids, visible, model.prefix(replace(texts, states=states)))
        assert torch.equal((features != before).any(-1), is_there[:, None].expand(3, 15))


def test_a_text_is_read_once_for_a_generation():
    model, reads = make_generator("masked", SPECS["grid"], **VARIANTS["masked"]["read_prefix"]), []
    model.condition.register_forward_hook(lambda *_: reads.append(1))
    model.generate(condition_for(model, 3), SampleOptions(cfg_scale=3.0), SampleRng.from_seed(0, 3))
    assert len(reads) == 1


def test_only_hidden_positions_are_in_the_loss(model):
    tokens, order, condition = random_tokens(), random_order(), ClassCondition(torch.arange(3))
    report = model.loss_in_order(tokens, condition, order, 7)
    hidden, visible = order[:, :7].sort(dim=1).values, order[:, 7:].sort(dim=1).values
    logits = model.adapter.logits(model.features(tokens.ids, visible, model.prefix(condition)), tokens.ids)
    per_code = cross_entropy(logits, tokens.ids)
    is_hidden = torch.zeros(3, 12, dtype=torch.bool).scatter(1, hidden, True)
    torch.testing.assert_close(report.total, per_code[is_hidden].mean())
    assert report.stats["hidden_share"].item() == pytest.approx(7 / 12)


def test_the_order_of_what_is_hidden_does_not_matter(model):
    tokens, order, condition = random_tokens(), random_order(), ClassCondition(torch.arange(3))
    other = torch.cat([order[:, :7].flip(1), order[:, 7:].flip(1)], dim=1)
    first, second = (model.loss_in_order(tokens, condition, o, 7).total for o in (order, other))
    torch.testing.assert_close(first, second)


def test_hidden_shares_follow_the_truncated_normal():
    model = build(replace(TINY, depth=1), TokenSpec(Grid2D(16, 16), (8,) * 4, 4, 256))
    rng = torch.Generator().manual_seed(0)
    counts = torch.tensor([model.num_hidden(rng) for _ in range(4000)])
    assert counts.min() == math.ceil(256 * 0.7) and counts.max() == 256
    # Of the published schedule: 222.5 positions in the mean, all of them in 1.6 % of the batches.
    assert counts.double().mean().item() == pytest.approx(222.5, abs=1.2)
    assert (counts == 256).double().mean().item() == pytest.approx(0.016, abs=0.008)
    assert build(replace(TINY, mask_min=1.0), SPEC).num_hidden(rng) == 12


def test_a_batch_may_hide_everything(model):
    report = model.train().loss_in_order(random_tokens(), ClassCondition(torch.arange(3)), random_order(), 12)
    report.total.backward()
    assert report.total.isfinite() and all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------- sampling


def predicted(positions, steps):
    hidden = [positions, *hidden_after(positions, steps)]
    return [before - after for before, after in pairwise(hidden)]


def test_the_cosine_schedule():
    assert predicted(256, 256) == [1] * 256
    assert predicted(256, 16) == [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]
    assert predicted(256, 8)[:6] == [5, 15, 24, 31, 39, 45]
    assert predicted(256, 1) == [256]
    assert sum(predicted(256, 64)) == 256 and max(predicted(256, 64)) <= 7
    assert predicted(4, 7) == [1, 1, 1, 0, 0, 0, 1]


def test_every_position_is_predicted_once_and_by_its_own_draw(model):
    seen = []
    model.adapter.sample = lambda features, uniform, pick: seen.append(uniform) or uniform.long()
    draws = torch.arange(3 * 12 * 4).reshape(3, 12, 4)
    tokens = model.fill(ClassCondition(torch.arange(3)), SampleOptions(), random_order(), (draws % 8).float())
    assert torch.equal(tokens.ids, draws % 8)
    assert [len(part) // 3 for part in seen] == predicted(12, 5)


@pytest.mark.parametrize(
    ("schedule", "scale", "expected"),
    [("constant", 3.0, [3.0] * 3), ("linear", 3.0, [1.5, 2.0, 2.5]), ("linear", 0.0, [0.0] * 3)],
)
def test_guidance_rises_with_what_is_known(schedule, scale, expected):
    spec = TokenSpec(Grid2D(2, 2), (8,) * 4, 4, 16)
    wanted = {"steps": 3, "guidance_schedule": schedule}
    for config, extra in ((replace(TINY, **wanted), {}), (TINY, wanted)):
        model, scales = build(config, spec), []
        model.adapter.sample = lambda features, uniform, pick, seen=scales: seen.append(pick.scale) or uniform.long()
        options = SampleOptions(cfg_scale=scale, extra=extra)
        model.generate(ClassCondition(torch.arange(3)), options, SampleRng.from_seed(0, 3))
        # 3, 2 and, as the released sampler counts the last pass, 1 positions of 4 are left.
        assert scales == pytest.approx(expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"step": 3}, "no sampling option 'step'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"guidance_schedule": "cosine"}, "one of constant, linear, .*, got 'cosine'"),
    ],
)
def test_sampling_options_are_checked(model, extra, message):
    with pytest.raises(UserError, match=message):
        model.generate(ClassCondition(torch.arange(3)), SampleOptions(extra=extra), SampleRng.from_seed(0, 3))


def test_one_code_at_a_position_needs_no_head():
    spec = TokenSpec(Grid2D(2, 2), (11,), 4, 16)
    model = randomized(build(TINY, spec))
    assert not any("blocks" in name for name, _ in model.adapter.named_parameters())
    tokens = model.generate(ClassCondition(torch.arange(3)), SampleOptions(cfg_scale=2.0), SampleRng.from_seed(0, 3))
    assert tokens.ids.shape == (3, 4, 1)


def test_codes_are_learned_by_heart():
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(2, 2), (8,) * 4, 4, 16)
    head = HeadConfig(width=32, depth=1, heads=2, dropout=0.0)
    # Here every number of hidden positions is met in training, one to four.
    shares = {"mask_mean": 0.7, "mask_min": 0.2, "condition_dropout": 0.0}
    model = build(replace(TINY, width=32, depth=1, num_classes=4, head=head, **shares), spec)
    tokens, condition = random_tokens(spec, 4), ClassCondition(torch.arange(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        loss = model(tokens, condition, rng).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 0.05
    sampled = model.eval().generate(condition, SampleOptions(temperature=0), SampleRng.from_seed(0, 4))
    assert torch.equal(sampled.ids, tokens.ids)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 3}, {"buffer": 0}, {"steps": 0}, {"mask_min": 0.0}, {"mask_std": 0.0}, {"condition_dropout": 1.5}],
)
def test_numbers_that_no_model_can_have(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(replace(TINY, **wrong), SPEC)


# ---------------------------------------------------------------------- released weights

KL16 = TokenSpec(Grid2D(16, 16), (64,) * 16, 16, 256)
PARAMETERS = {  # width, depth, heads, head width, head depth -> all, of which head
    "base": ((768, 12, 12, 768, 4), 218_024_704, 45_849_856),
    "large": ((1024, 16, 16, 1024, 4), 486_889_472, 80_793_600),
    "huge": ((1280, 20, 16, 1024, 6), 910_040_576, 118_844_416),
}


def published_keys(depth, head_depth):
    """Names of the parameters as the fact sheet lists them."""
    norms = ("norm1", "norm2")
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    alone = ("z_proj", "z_proj_ln", "encoder_norm", "decoder_norm", "decoder_embed", "condition_proj", "channel_norm")
    modules = [*alone, "channel_final.adaLN_modulation.1", *(f"channel_heads.{slot}" for slot in range(16))]
    for part, count in (("encoder", depth), ("decoder", depth), ("channel", head_depth)):
        extra = ("attn.q_norm", "attn.k_norm", "adaLN_modulation.1") if part == "channel" else ()
        modules += [f"{part}_blocks.{i}.{name}" for i in range(count) for name in (*norms, *linears, *extra)]
    tables = ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "output_pos_embed", "channel_embed")
    return {
        *(f"{module}.{part}" for module in modules for part in ("weight", "bias")),
        *tables,
        *("fake_latent", "mask_token", "timesteps_embeddings", "class_emb.weight"),
        *(f"token_embeddings.{slot}.weight" for slot in range(15)),
    }


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_and_keys_of_the_released_models(size):
    (width, depth, heads, head_width, head_depth), count, in_head = PARAMETERS[size]
    config = Config(width=width, depth=depth, heads=heads, head=HeadConfig(head_width, head_depth))
    with torch.device("meta"):
        model = build(config, KL16)
    assert sum(p.numel() for p in model.parameters()) == count
    reads = sum(p.numel() for p in model.adapter.embedding.parameters())
    assert sum(p.numel() for p in model.adapter.parameters()) - reads == in_head
    published = PUBLISHED_KEYS.to_published(model.state_dict())
    assert published.keys() == published_keys(depth, head_depth)
    assert published["class_emb.weight"].shape == (1000, width) and published["fake_latent"].shape == (1, width)
    assert published["encoder_pos_embed_learned"].shape == (1, 320, width)
    assert published["mask_token"].shape == (1, 1, width)
    again = PUBLISHED_KEYS.to_ours(published)
    assert {key: value.shape for key, value in again.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A tiny model, and a function that saves it as its authors would: the average holds parameters alone."""
    monkeypatch.setattr(masked_published, "HEADS", {16: 2})
    spec = TokenSpec(Grid2D(3, 3), (8,) * 16, 16, 48)
    model = randomized(build(replace(TINY, head=replace(HEAD, step_in_first_input=True)), spec))

    def save(change=lambda saved: None):
        average = PUBLISHED_KEYS.to_published(model.state_dict())
        edges, levels = gaussian_cells(8)
        constants = {"reconstruction_values": levels.float(), "boundaries": edges.float()}
        constants["channel_mask"] = torch.full((16, 16), -torch.inf).triu(1)
        last = {key: value + 1 for key, value in average.items()}
        saved = {"model": last | constants, "model_ema": average, "epoch": 3}
        change(saved)
        torch.save(saved, tmp_path / FILE)
        return str(tmp_path)

    return model, save


def test_released_weights_load_and_sample_as_published(released):
    model, save = released
    loaded = Masked.from_published(save())
    assert loaded.spec == model.spec and not loaded.training
    sizes = ("width", "depth", "heads", "buffer", "num_classes")
    assert all(getattr(loaded.config, name) == getattr(TINY, name) for name in sizes)
    assert loaded.config.head == replace(HEAD, step_in_first_input=True)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    samples = loaded.generate(ClassCondition(torch.arange(2)), SampleOptions(cfg_scale=3.1), SampleRng.from_seed(0, 2))
    assert samples.ids.shape == (2, 9, 16)


def test_a_release_may_lie_in_a_folder_of_a_repository(released, tmp_path, monkeypatch):
    model, save = released
    save()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *asked: hub.append(asked) or tmp_path / FILE)
    hub = []
    loaded = Masked.from_published(f"owner/repository/large/{FILE}")
    assert hub == [("owner/repository", f"large/{FILE}")]
    assert torch.equal(loaded.mask_token, model.mask_token)


def test_a_release_becomes_an_export_that_knows_its_tokenizer(released, tmp_path, monkeypatch):
    model, save = released
    tokenizer, other, out = (tmp_path / name for name in ("tokenizer", "other", "export"))
    for folder, spec in ((tokenizer, model.spec), (other, SPEC)):
        export(folder, "tokenizer", Component("tokenbridge"), spec, {"order": torch.arange(spec.num_slots)})
    monkeypatch.setattr("vistok.published.load_tokenizer", lambda folder: None)  # of which it adopts nothing

    def convert(*words):
        monkeypatch.setattr("sys.argv", ["published", "masked", save(), "--out", str(out), *map(str, words)])
        published_command()

    for words, message in (((), "which need it"), (("--tokenizer", other), "makes tokens of")):
        with pytest.raises(UserError, match=message):
            convert(*words)
    convert("--tokenizer", tokenizer)
    assert tokenizer_folder(out).resolve() == tokenizer
    loaded, state = load_generator(out), model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert loaded.config.head.step_in_first_input


def to_mar(saved):
    saved["model"] = {key: value for key, value in saved["model"].items() if not key.startswith("channel")}
    saved["model"]["diffloss.net.input_proj.weight"] = torch.zeros(2, 2)
    saved["args"] = argparse.Namespace(model="mar_large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_mar, "MAR model"),
        (lambda saved: saved.pop("model_ema"), "needs the entries model and model_ema"),
        (lambda saved: saved["model"].pop("reconstruction_values"), "reconstruction_values is missing"),
        (lambda saved: saved["model"]["reconstruction_values"].add_(0.01), "not the published table"),
        (lambda saved: saved["model"].update({"strange.weight": torch.zeros(1)}), "strange.weight"),
        (lambda saved: [saved[part].pop("mask_token") for part in ("model", "model_ema")], "mask_token"),
        (lambda saved: [saved[part].pop("channel_embed") for part in ("model", "model_ema")], "adapter.slots"),
    ],
)
def test_other_files_are_refused_by_name(released, change, message):
    _, save = released
    folder = save(change)
    with pytest.raises(UserError, match=message):
        Masked.from_published(folder)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="not found"):
        Masked.from_published(str(tmp_path))
    (tmp_path / FILE).write_bytes(b"no weights")
    with pytest.raises(UserError, match="no complete torch file"):
        Masked.from_published(str(tmp_path))
