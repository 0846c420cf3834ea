"""UniFlow: what its parts may see, what its losses reach, and the released files."""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tiny_models.args import TINY_ARGS
from tiny_models.models import make_tokenizer, randomized
from vistok.checkpoint import load_autoencoder
from vistok.config import Component, build
from vistok.errors import UserError
from vistok.flow.time import fat_logit_normal_time
from vistok.losses.distillation import distillation_loss, layer_distances, layer_weights
from vistok.nn.patch import patchify
from vistok.published import main as published_command
from vistok.rng import SampleRng, seeded_generator
from vistok.tokenizers.uniflow import Config, DistillationConfig, UniFlow, make_encoder
from vistok.tokenizers.uniflow_published import PUBLISHED_KEYS, from_state

ARGS = TINY_ARGS["tokenizers"]["uniflow"]


@pytest.fixture
def model():
    return make_tokenizer("uniflow")


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def taught(tmp_path):
    """A model that starts from a weights file, with a teacher."""
    torch.manual_seed(3)
    encoder = make_encoder(Config(**ARGS))
    save_file(randomized(encoder).model.state_dict(), tmp_path / "vit.safetensors")
    distillation = {"weights": str(tmp_path / "vit.safetensors")}
    return build("tokenizers", Component("uniflow", {**ARGS, "distillation": distillation}))


# ---------------------------------------------------------------------- decoder


def changed_patches(a, b):
    return ((patchify(a, 4) - patchify(b, 4)).abs().amax(-1) > 1e-6)[0].nonzero().flatten().tolist()


def test_the_flow_of_a_patch_sees_its_own_noise_and_condition_alone(model):
    noise, condition = torch.randn(1, 3, 16, 16), torch.randn(1, 16, 32)
    before = model.sample_pixels(noise, condition, steps=2)
    condition[0, 5] += 1
    assert changed_patches(before, model.sample_pixels(noise, condition, steps=2)) == [5]
    noise[:, :, 8:12, 4:8] += 1  # patch in row 2, column 1
    assert changed_patches(before, model.sample_pixels(noise, condition, steps=2)) == [5, 9]


def test_one_latent_reaches_many_patches_through_the_global_blocks(model, images):
    latents = model.encode(images[:1])
    other = latents.clone()
    other[0, 5] += 1
    decoded = [model.decode(x, SampleRng.from_seed(0, 1)) for x in (latents, other)]
    assert len(changed_patches(*decoded)) > 8


def test_without_global_blocks_patches_are_decoded_alone():
    model = randomized(build("tokenizers", Component("uniflow", {**ARGS, "global_blocks": 0})))
    latents = torch.randn(1, 16, 3)
    other = latents.clone()
    other[0, 5] += 1
    assert changed_patches(*(model.decode(x, SampleRng.from_seed(0, 1)) for x in (latents, other))) == [5]


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("power", [1.0, 0.25, 2.0])
def test_a_perfect_velocity_arrives_at_the_image_whatever_the_schedule(model, images, steps, power, monkeypatch):
    pixels, noise = model.encoder.pixels(images), torch.randn(3, 3, 16, 16)
    straight = patchify(pixels, 4) - patchify(noise, 4)
    monkeypatch.setattr(model.flow, "forward", lambda x, time, condition: straight)
    torch.testing.assert_close(model.sample_pixels(noise, torch.zeros(3, 16, 32), steps, power), pixels)


def test_one_step_is_the_noise_plus_its_velocity(model, images):
    latents, noise = model.encode(images), SampleRng.from_seed(0, 3).normal(3, 16, 16)
    velocity = model.flow(patchify(noise, 4), torch.zeros(3, 1), model.tower(latents))
    expected = patchify(noise, 4) + velocity
    decoded = model.decode(latents, SampleRng.from_seed(0, 3), steps=1)
    torch.testing.assert_close(patchify(model.encoder.pixels(decoded), 4), expected, atol=1e-5, rtol=1e-5)


def test_guidance_one_is_none_and_two_goes_twice_as_far_from_the_null(model):
    noise, condition = torch.randn(1, 3, 16, 16), torch.randn(1, 16, 32)
    one, two, null = (model.sample_pixels(noise, condition, 1, guidance=scale) for scale in (1.0, 2.0, 0.0))
    torch.testing.assert_close(two - null, 2 * (one - null), atol=1e-4, rtol=1e-4)


def test_a_flow_narrower_than_a_patch_warns_with_the_bound():
    with pytest.warns(UserWarning, match="48 values, more than flow_width 12.*stays above 0.75"):
        build("tokenizers", Component("uniflow", {**ARGS, "flow_width": 12}))


# ---------------------------------------------------------------------- training


def test_the_velocity_loss_reaches_every_part(model, images):
    model.train().training_loss(images, seeded_generator(0)).total.backward()
    # A class token behind the last block is read by nobody, nor is the row of positions of a table that is.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_at_the_start_the_loss_is_that_of_knowing_nothing(images):
    model = build("tokenizers", Component("uniflow", ARGS))
    loss = model.training_loss(images, seeded_generator(0)).total
    expected = model.encoder.pixels(images).square().mean() + 1
    assert loss.item() == pytest.approx(expected.item(), rel=0.15)


def test_times_are_logit_normal_with_a_uniform_tenth():
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=rng)
    uniform, choice = torch.rand(2, 200_000, generator=rng)
    time = fat_logit_normal_time(normal, uniform, choice)
    assert time.mean().item() == pytest.approx(0.5, abs=2e-3)
    # P(t < 0.05) is P(normal < logit 0.05) = 0.00162 for nine tenths, 0.05 for the rest.
    assert (time < 0.05).float().mean().item() == pytest.approx(0.9 * 0.00162 + 0.1 * 0.05, abs=5e-4)


def test_the_teacher_is_where_the_student_starts_and_stays_there(taught, images):
    report = taught.eval().training_loss(images, seeded_generator(0))
    assert report.terms["distillation"].abs() < 1e-6
    assert not [key for key in taught.state_dict() if "teacher" in key or "distillation" in key]
    assert not [name for name, _ in taught.named_parameters() if "distillation" in name]
    with torch.no_grad():
        taught.encoder.model.blocks[0].mlp.fc2.weight.add_(0.2 * torch.randn(32, 128))
    teacher = taught.distillation.teacher.module
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    report = taught.training_loss(images, seeded_generator(0))
    assert report.terms["distillation"] > 1e-4
    report.terms["distillation"].backward()
    assert taught.encoder.model.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0
    assert taught.flow.head.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_distillation_of_equals_is_nothing_and_weighs_layers_by_depth():
    layers = [torch.randn(2, 5, 8) for _ in range(4)]
    distances = layer_distances(layers, [3 * layer for layer in layers])  # blind to scale
    torch.testing.assert_close(distances, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer_weights(torch.zeros(4), beta=2.0), torch.tensor([1.0, 2, 3, 4]) / 10)


def test_a_larger_beta_moves_weight_to_the_layer_that_has_strayed_most():
    distances = torch.tensor([0.1, 0.9, 0.2], requires_grad=True)
    shares = torch.stack([layer_weights(distances, beta) for beta in (0.0, 1.0, 2.0, 4.0)])
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    assert (shares[1:, 1] > shares[:-1, 1]).all() and not shares.requires_grad
    expected = torch.tensor([1, 2, 3]) * torch.exp(2 * distances.detach())
    torch.testing.assert_close(shares[2], expected / expected.sum())


def test_student_and_teacher_of_different_depth_are_refused():
    layers = [torch.randn(1, 2, 4) for _ in range(3)]
    with pytest.raises(UserError, match="the student has 3 layers, the teacher 2"):
        layer_distances(layers, layers[:2])


def test_opposite_features_are_two_apart():
    x = torch.randn(2, 3, 4)
    assert distillation_loss(x, -x).item() == pytest.approx(2.0)


def test_training_lowers_the_loss_of_a_few_images(images):
    torch.manual_seed(0)
    model = build("tokenizers", Component("uniflow", {**ARGS, "flow_width": 96}))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(150):
        loss = model.training_loss(images, seeded_generator(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.6 * losses[0]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"image_size": 18}, "multiple of the encoder's patch of 4 px|timm cannot make"),
        ({"encoder": "vit_tinny_patch16_224"}, "did you mean vit_tiny"),
        ({"global_heads": 5}, "multiple of 4 and of global_heads 5"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"power": 0.0}, "power must be positive"),
        ({"distillation": {"weights": "absent.safetensors"}}, "absent.safetensors.*vit_tiny_patch16_224"),
        ({"distillation": {}}, "distillation.weights"),
    ],
)
def test_configs_that_no_model_can_have_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        build("tokenizers", Component("uniflow", {**ARGS, **args}))


def test_features_are_those_of_the_encoder_or_the_latents(model, images):
    assert model.features(images).shape == (3, 16, 32)
    assert torch.equal(model.features(images, part="latents"), model.encode(images))
    with pytest.raises(UserError, match="part=encoder or part=latents"):
        model.features(images, part="pixels")


def test_decode_options_out_of_range_are_refused(model, images):
    with pytest.raises(UserError, match="steps must be at least 1"):
        model.decode(model.encode(images), steps=0)


# ---------------------------------------------------------------------- released files


def published_keys():
    """Names and shapes of the release (fact sheet, section 5)."""
    width, values = 1024, 588
    yield from {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding": (1, 1025, width),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.patch_embedding.bias": (width,),
        "global_block_pos_embed": (1, 1024, width),
        "decoder_pos_embed": (1, 1024, width),
    }.items()
    layers = {"chal_proj.c_fc": (width, width), "chal_proj.c_proj": (64, width)}
    layers |= {"chal_unproj.c_fc": (width, 64), "chal_unproj.c_proj": (width, width)}
    norms = []
    for index in range(24):
        yield from ((f"encoder.layers.{index}.{name}", (width,)) for name in ("ls1", "ls2"))
    for block in [f"encoder.layers.{i}" for i in range(24)] + [f"global_blocks.{i}" for i in range(6)]:
        norms += [f"{block}.norm1", f"{block}.norm2"]
        layers |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        layers |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    net = "flow_head.net"
    layers |= {f"{net}.time_embed.mlp.0": (width, 256), f"{net}.time_embed.mlp.2": (width, width)}
    layers |= {f"{net}.cond_embed": (width, width), f"{net}.input_proj": (width, values)}
    for index in range(12):
        block = f"{net}.res_blocks.{index}"
        norms.append(f"{block}.in_ln")
        layers |= {f"{block}.mlp.0": (width, width), f"{block}.mlp.2": (width, width)}
        layers[f"{block}.adaLN_modulation.1"] = (3 * width, width)
    layers |= {f"{net}.final_layer.linear": (values, width)}
    layers |= {f"{net}.final_layer.adaLN_modulation.1": (2 * width, width)}
    for name, shape in layers.items():
        yield from ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))
    yield from ((f"{name}.{part}", (width,)) for name in norms for part in ("weight", "bias"))


def test_the_whole_key_list_of_the_release_loads_and_comes_back():
    keys = dict(published_keys())
    with torch.device("meta"):
        model = from_state({key: torch.empty(shape) for key, shape in keys.items()}, "release")
    count = sum(p.numel() for p in model.parameters())
    assert count == 452_586_124
    assert sum(p.numel() for p in model.encoder.parameters()) == 304_012_288
    assert model.config == replace(Config(), encoder_args=model.config.encoder_args)
    back = PUBLISHED_KEYS.to_published(model.state_dict())
    assert {key: tuple(value.shape) for key, value in back.items()} == keys


@pytest.fixture
def release(tmp_path):
    """A tiny file in the published layout, and its model."""
    sizes = {"patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 16}
    args = {**ARGS, "encoder": Config.encoder, "encoder_args": sizes, "global_heads": 16}
    config = Config(**args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomized(UniFlow(config, make_encoder(config)))
    state = {key: value.contiguous() for key, value in PUBLISHED_KEYS.to_published(model.state_dict()).items()}
    save_file(state | {"Distill_Adapter.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path, model, state


def test_a_released_file_becomes_an_export(release, monkeypatch, images):
    folder, model, _ = release
    out = folder / "export"
    monkeypatch.setattr("sys.argv", ["published", "uniflow", str(folder), "--out", str(out)])
    with pytest.warns(UserWarning, match="Distill_Adapter"):
        published_command()
    loaded = load_autoencoder(out)
    torch.testing.assert_close(loaded.encode(images), model.encode(images))


def test_other_image_sizes_resample_the_tables(release):
    _, model, state = release
    larger = from_state(state, "file", image_size=24)
    assert larger.spec.num_positions == 36
    images = torch.rand(1, 3, 24, 24)
    assert larger.decode(larger.encode(images)).shape == images.shape
    same = from_state(state, "file", image_size=16)
    assert torch.equal(same.tower.positions_behind, model.tower.positions_behind)


def test_missing_and_foreign_keys_are_named(release):
    _, _, state = release
    with pytest.raises(UserError, match=r"global_blocks\.0\.attn\.qkv\.bias|tower\.blocks\.0\.attention\.qkv\.bias"):
        from_state({key: value for key, value in state.items() if key != "global_blocks.0.attn.qkv.bias"}, "file")
    with pytest.raises(UserError, match=r"extra\.weight"):
        from_state(state | {"extra.weight": torch.zeros(1)}, "file")


def test_absent_releases_are_named(tmp_path):
    with pytest.raises(UserError, match="published UniFlow not found"):
        UniFlow.from_published(str(tmp_path / "absent.safetensors"))


def test_beta_must_not_be_negative():
    config = Config(**{**ARGS, "distillation": DistillationConfig("x", beta=-1.0)})
    with pytest.raises(UserError, match="beta"):
        UniFlow(config, make_encoder(config))
