"""TokenFlow outside its parity cases: the two branches, the teacher, and what training reaches."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from tiny_models.args import TINY_ARGS
from tiny_models.models import make_tokenizer, randomized
from tiny_models.runs import read_state
from vistok.checkpoint import export_info, load_tokenizer
from vistok.config import Component, build, to_yaml
from vistok.errors import UserError
from vistok.losses.distillation import distillation_loss
from vistok.nn.vision_teacher import load_teacher, make_tower
from vistok.training.run import train
from vistok.training.run_config import load_config

TINY = TINY_ARGS["tokenizers"]["tokenflow"]
NAME, SIZES = TINY["encoder"], {**TINY["encoder_args"], "img_size": 16}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A classifier of ten classes as timm saves it."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(randomized(timm.create_model(NAME, num_classes=10, **SIZES)).state_dict(), path)
    return path


def component(weights=None, **changes):
    teacher = {"weights": str(weights)} if weights else None
    return Component("tokenflow", {**TINY, "scale_drop": 0.0, "teacher": teacher, **changes})


def images(count=4, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rng():
    return torch.Generator().manual_seed(0)


# ---------------------------------------------------------------------- two branches


def test_each_half_of_a_code_is_decoded_by_its_own_branch():
    model = make_tokenizer("tokenflow")
    latents = model.embed(model.tokenize(images()))
    pixel, semantic = latents.clone(), latents.clone()
    pixel[..., 4:] += 1
    semantic[..., :4] += 1
    assert torch.equal(model.decode(semantic), model.decode(latents))
    assert torch.equal(model.semantic(pixel), model.semantic(latents))
    assert not torch.allclose(model.decode(pixel), model.decode(latents))
    assert not torch.allclose(model.semantic(semantic), model.semantic(latents))


def test_features_are_what_all_scales_add_up_to_by_branch():
    model = make_tokenizer("tokenflow")
    both, semantic, pixel = (model.features(images(), branch=branch) for branch in ("both", "semantic", "pixel"))
    assert torch.equal(both, torch.cat([semantic, pixel], dim=-1)) and semantic.shape == (4, 16, 4)
    tokens = model.tokenize(images())
    assert torch.equal(both, model.add_up(tokens)) and torch.equal(model.features(images()), both)
    # The first scale alone is one code everywhere, of unit norm in each branch.
    coarse = model.add_up(tokens.prefix(1))
    torch.testing.assert_close(coarse, coarse[:, :1].expand_as(coarse))
    torch.testing.assert_close(coarse[..., :4].norm(dim=-1), torch.ones(4, 16))
    torch.testing.assert_close(coarse[..., 4:].norm(dim=-1), torch.ones(4, 16))


def test_semantic_features_have_the_width_of_the_teacher():
    model = build("tokenizers", component(target_width=10))
    tokens = model.tokenize(images())
    assert model.semantic(tokens).shape == (4, 16, 10)
    assert model.semantic(tokens.prefix(5)).shape == (4, 16, 10)


def test_the_semantic_encoder_sees_images_as_they_are_unless_told_otherwise():
    plain, normal = (build("tokenizers", component(normalize=value)) for value in (False, True))
    normal.load_state_dict(plain.state_dict())
    mean, std = normal.semantic_encoder.tower.mean, normal.semantic_encoder.tower.std
    shifted = ((images() + 1) / 2 - mean) / std
    torch.testing.assert_close(normal.semantic_encoder(images()), plain.semantic_encoder(shifted))
    assert not torch.allclose(normal.semantic_encoder(images()), plain.semantic_encoder(images() * 0.5))


def test_the_pixel_branch_may_work_at_another_size():
    model = build("tokenizers", component(image_size=18, pixel_size=16))
    seen = []
    model.pixel_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    tokens = model.tokenize(images(size=18))
    assert seen == [(4, 3, 16, 16)] and model.decode(tokens).shape == (4, 3, 18, 18)
    assert model(images(size=18), rng()).reconstruction.shape == (4, 3, 18, 18)


# ---------------------------------------------------------------------- the teacher


def test_distillation_is_one_minus_the_cosine_of_each_position():
    features = torch.randn(2, 5, 8, generator=rng())
    assert distillation_loss(3 * features, features).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(-features, features).item() == pytest.approx(2)
    half = torch.where(torch.arange(5)[:, None] < 2, features, -features)
    assert distillation_loss(half, features).item() == pytest.approx(2 * 3 / 5)


def test_the_semantic_encoder_begins_as_the_teacher_and_learns_to_say_what_it_sees(teacher_file):
    model = build("tokenizers", component(teacher_file, teacher={"weights": str(teacher_file), "weight": 0.5}))
    teacher = model.teacher.module
    assert torch.equal(model.semantic_encoder.tower(images()), teacher(images()))
    report = model(images(), rng())
    torch.testing.assert_close(report.total, sum(report.terms.values()))
    codes = model.quantizer(model.encode(images())).codes
    target = teacher(images()).flatten(1, 2)
    expected = 1 - torch.nn.functional.cosine_similarity(model.decode_semantic(codes), target, dim=-1).mean()
    torch.testing.assert_close(report.terms["distillation"], 0.5 * expected)
    torch.testing.assert_close(report.stats["distillation_cosine"], 1 - expected)
    torch.testing.assert_close(report.terms["pixel"], (report.reconstruction - images()).square().mean())


def test_a_teacher_may_project_its_patches_or_stop_before_its_last_block(teacher_file):
    model = timm.create_model(NAME, num_classes=10, **SIZES).eval()
    model.load_state_dict(randomized(timm.create_model(NAME, num_classes=10, **SIZES)).state_dict())
    pixels = images()  # this model wants mean and standard deviation 0.5
    patches = model.forward_features(pixels)[:, 1:]
    projected = build("tokenizers", component(teacher_file, target_width=10)).teacher.module
    torch.testing.assert_close(projected(images()).flatten(1, 2), model.head(patches))

    deep = timm.create_model(NAME, num_classes=0, **{**SIZES, "depth": 2})
    tower = make_tower(NAME, penultimate=True, **{**SIZES, "depth": 2})
    tower.model.load_state_dict({key: deep.state_dict()[key] for key in tower.model.state_dict()})
    before = deep.forward_intermediates(pixels, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(tower(images()).flatten(1, 2), before)


def test_the_teacher_is_in_neither_parameters_nor_state(teacher_file):
    model, plain = build("tokenizers", component(teacher_file)), build("tokenizers", component())
    assert model.state_dict().keys() == plain.state_dict().keys()
    teacher = {id(p) for p in model.teacher.module.parameters()}
    assert teacher.isdisjoint(id(p) for p in model.parameters())
    assert not any(p.requires_grad for p in model.teacher.module.parameters())
    model.train()
    assert not model.teacher.module.training


# ---------------------------------------------------------------------- training


def test_gradients_reach_both_encoders_both_tables_and_both_decoders(teacher_file):
    model = randomized(build("tokenizers", component(teacher_file)))
    model(images(16), rng()).total.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad is None for p in model.teacher.module.parameters())


def test_each_loss_teaches_its_own_branch(teacher_file):
    model = randomized(build("tokenizers", component(teacher_file)))

    def reached(term):
        model.zero_grad()
        model(images(), rng()).terms[term].backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached("pixel") == {"pixel_encoder", "pixel_in", "pixel_out", "pixel_decoder"}
    assert reached("distillation") == {"semantic_encoder", "semantic_decoder"}
    assert reached("codebook") == {"quantizer"}
    assert reached("commitment") == {"semantic_encoder", "pixel_encoder", "pixel_in"}


def test_without_a_teacher_the_semantic_decoder_is_left_alone():
    model = build("tokenizers", component())
    assert not any(p.requires_grad for p in model.semantic_decoder.parameters())
    assert "distillation" not in model(images(), rng()).terms


def test_scales_are_dropped_in_training_alone():
    model = build("tokenizers", component(scale_drop=1.0))
    whole = model.eval()(images(), rng())
    assert torch.equal(model(images(), rng()).reconstruction, whole.reconstruction)
    dropped = model.train()(images(), rng())
    assert not torch.allclose(dropped.reconstruction, whole.reconstruction)
    assert dropped.tokens.ids.shape == (4, 21, 1)


def test_a_few_images_can_be_learned_by_heart(teacher_file):
    torch.manual_seed(0)
    model = build("tokenizers", component(teacher_file, vocab_size=64))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    smooth = torch.nn.functional.interpolate(images(8)[..., :2, :2], (16, 16), mode="bicubic").clamp(-1, 1)
    first = model(smooth, rng())
    for _ in range(80):
        optimizer.zero_grad()
        report = model(smooth, rng())
        report.total.backward()
        optimizer.step()
    assert report.terms["pixel"] < 0.3 * first.terms["pixel"]
    assert report.stats["distillation_cosine"] > first.stats["distillation_cosine"] + 0.3


def test_a_run_exports_no_teacher_and_resumes_with_it(teacher_file, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(teacher_file.read_bytes())
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    tokenizer, data = vars(component(weights)), {"name": "digits", "batch_size": 4}
    path.write_text(to_yaml({"output": str(output), "tokenizer": tokenizer, "data": data, "resume": "auto"}))

    def run(updates):
        train(load_config(path, [f"trainer.max_updates={updates}"]))

    run(2)
    assert not any("teacher" in name for name in read_state(output)["state_dict"])
    assert "teacher" not in export_info(output)["args"]
    header = (output / "metrics.csv").read_text().splitlines()[0]
    assert all(f"train/{name}" in header for name in ("loss_distillation", "distillation_cosine", "loss_commitment"))
    run(3)
    weights.unlink()
    model = load_tokenizer(output)
    assert model.teacher is None and model.tokenize(images()).ids.shape == (4, 21, 1)
    with pytest.raises(UserError, match="teacher weights not found"):
        run(4)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": {}}, rf"teacher\.weights names no file: give the weights of timm's {NAME}"),
        ({"teacher": {"weights": "gone.pth"}}, r"teacher weights not found: gone\.pth"),
        ({"teacher": {"weights": "gone.pth", "weight": -1.0}}, r"teacher\.weight must be positive"),
        ({"scales": [1, 2, 3]}, r"scales must .* end at the grid of 4 x 4 positions, got \[1, 2, 3\]"),
        ({"image_size": 18}, r"image_size 18 makes 4 x 4 positions .* pixel_size=16"),
        ({"multipliers": [1, 2]}, r"the pixel branch has at 8 px, not at 16"),
        ({"encoder": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"encoder": "resnet18", "encoder_args": {}}, "timm cannot make resnet18"),
        ({"semantic_decoder_heads": 3}, "semantic_decoder_width 16 is no multiple of semantic_decoder_heads 3"),
        ({"scale_drop": 2.0}, r"scale_drop must lie in \[0, 1\], got 2"),
        ({"z_channels": 0}, "z_channels must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        build("tokenizers", component(**changes))


def test_a_teacher_of_another_width_is_refused(teacher_file):
    with pytest.raises(UserError, match=r"teacher.safetensors does not fit .*head\.bias is \(10,\), expected \(12,\)"):
        build("tokenizers", component(teacher_file, target_width=12))
    model = build("tokenizers", component(target_width=12))
    with pytest.raises(UserError, match="features have 16 channels, but the semantic decoder makes 12"):
        type(model)(model.config, load_teacher(NAME, teacher_file, **SIZES))


def test_a_code_that_ends_inside_a_scale_and_unknown_branches_are_refused():
    model = make_tokenizer("tokenflow")
    latents = model.embed(model.tokenize(images()))
    with pytest.raises(UserError, match=r"2 is no prefix of whole scales \(1, 5, 21\)"):
        model.decode(latents[:, :2])
    with pytest.raises(UserError, match="branch must be one of both, semantic, pixel, got 'pixels'"):
        model.features(images(), branch="pixels")
    with pytest.raises(UserError, match="unknown option 'layer' of features"):
        model.features(images(), layer=1)
