"""Alignment with a frozen teacher (REPA): the teacher from a file, the loss, and FlexTok trained with it."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tiny_models.args import TINY_ARGS
from tiny_models.models import randomized
from tiny_models.runs import read_state
from vistok.checkpoint import export_info, load_tokenizer
from vistok.config import Component, build, to_yaml
from vistok.errors import UserError
from vistok.losses.alignment import alignment_loss
from vistok.nn.vision_teacher import load_teacher
from vistok.training.ema import trainable
from vistok.training.run import train
from vistok.training.run_config import load_config

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A classifier as timm saves it."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(randomized(timm.create_model(NAME, num_classes=10, **SIZES)).state_dict(), path)
    return path


def component(weights: Path | None, **alignment) -> Component:
    group = {"teacher": NAME, "teacher_args": SIZES, "teacher_weights": weights and str(weights), "projector_width": 24}
    return Component("flextok", {**TINY_ARGS["tokenizers"]["flextok"], "alignment": {**group, **alignment}})


def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loss(model, **changes):
    return model(images(), torch.Generator().manual_seed(0), **changes)


# ---------------------------------------------------------------------- the loss


def test_identical_maps_have_the_least_loss_and_opposite_ones_the_greatest():
    features = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert alignment_loss(features, 3 * features).item() == pytest.approx(-1)
    assert alignment_loss(-features, features).item() == pytest.approx(1)
    elsewhere = features.flip(2)  # what counts is the vector at each location
    assert alignment_loss(elsewhere, features).item() > -0.8


def test_our_map_is_resized_to_the_teachers_grid():
    ramp = torch.stack([torch.linspace(0, 1, 4).expand(4, 4), torch.ones(4, 4)], dim=-1)[None]
    fine = torch.nn.functional.interpolate(ramp.permute(0, 3, 1, 2), (7, 9), mode="bilinear").permute(0, 2, 3, 1)
    assert alignment_loss(ramp, fine).item() == pytest.approx(-1)
    assert alignment_loss(ramp.transpose(1, 2), fine).item() > -0.99


# ---------------------------------------------------------------------- the teacher


def test_a_teacher_gives_timms_patch_features(teacher_file):
    teacher = load_teacher(NAME, teacher_file, **SIZES)
    model = timm.create_model(NAME, num_classes=10, **SIZES).eval()
    assert not torch.equal(model.pos_embed, teacher.model.pos_embed)
    model = randomized(model)
    pixels = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((pixels - mean) / std)[:, 1:]
        got = teacher.eval()(pixels * 2 - 1)
        assert teacher(torch.zeros(1, 3, 16, 40)).shape == (1, 6, 6, 16), "any size is resized to the teacher's"
    assert got.shape == (2, 6, 6, 16) and (teacher.grid, teacher.width) == ((6, 6), 16)
    torch.testing.assert_close(got.flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_loading_a_teacher_draws_nothing_from_the_callers_stream(teacher_file):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_teacher(NAME, teacher_file, **SIZES)
    assert torch.equal(torch.rand(3), expected)


def test_the_authors_layout_of_dinov2_is_converted(tmp_path):
    sizes = {"img_size": 28, "embed_dim": 16, "depth": 1, "num_heads": 2}
    name = "vit_small_patch14_dinov2.lvd142m"
    model = randomized(timm.create_model(name, num_classes=0, **{**sizes, "img_size": 56}))
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 16)}, tmp_path / "dinov2.pth")
    teacher = load_teacher(name, tmp_path / "dinov2.pth", **sizes)
    assert teacher.grid == (2, 2) and teacher.model.pos_embed.shape == (1, 5, 16), "positions are resampled"
    assert torch.equal(teacher.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    original = load_teacher(name, tmp_path / "dinov2.pth", **{**sizes, "img_size": 56})
    assert torch.equal(original.model.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("vit_tiny_patch16_225", {}, "no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224"),
        ("resnet18", {}, "resnet18 is no vision transformer"),
        (NAME, {**SIZES, "no_such": 1}, "no_such"),
        (NAME, {**SIZES, "depth": 3}, r"teacher.safetensors does not fit .* missing \(blocks\.2\."),
        (NAME, {**SIZES, "depth": 1}, r"foreign \(blocks\.1\."),
        (NAME, {**SIZES, "embed_dim": 32}, r"cls_token is \(1, 1, 16\), expected \(1, 1, 32\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher_file, name, sizes, words):
    with pytest.raises(UserError, match=words):
        load_teacher(name, teacher_file, **sizes)


def test_a_file_that_is_no_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"not found: .*gone\.pth \(supply those of timm's {NAME}"):
        load_teacher(NAME, tmp_path / "gone.pth")
    with pytest.raises(UserError, match=rf"not found: .*gone\.pth \(of a {NAME} with sizes of its own: the header of"):
        load_teacher(NAME, tmp_path / "gone.pth", **SIZES)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"hello")
        with pytest.raises(UserError, match=rf"broken{suffix} is no complete"):
            load_teacher(NAME, path, **SIZES)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"module\.pth is no complete torch file of plain weights"):
        load_teacher(NAME, tmp_path / "module.pth", **SIZES)


# ---------------------------------------------------------------------- FlexTok with it


def test_gradients_reach_encoder_and_projector_and_no_teacher(teacher_file):
    model = randomized(build("tokenizers", component(teacher_file, weight=0.5)))
    report = loss(model)
    assert list(report.terms) == ["velocity", "alignment"]
    torch.testing.assert_close(report.total, sum(report.terms.values()))
    torch.testing.assert_close(report.terms["alignment"], -0.5 * report.stats["alignment_cosine"])
    report.terms["alignment"].backward()
    assert all(p.grad.any() for p in model.alignment.parameters())
    assert model.encoder.blocks[0].attention.qkv.weight.grad.any()
    assert all(p.grad is None for p in model.decoder.head.parameters()), "what follows the aligned block is free"
    assert all(p.grad is None for p in model.alignment.teacher.module.parameters())


def test_the_teacher_is_in_neither_parameters_nor_state(teacher_file):
    model = build("tokenizers", component(teacher_file))
    projector = {name for name in model.state_dict() if name.startswith("alignment.")}
    assert projector == {f"alignment.projector.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert projector <= trainable(model).keys()
    teacher = model.alignment.teacher.module
    assert not teacher.training
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in teacher.parameters())


def test_the_aligned_features_are_the_patches_behind_that_block(teacher_file):
    model = randomized(build("tokenizers", component(teacher_file)))
    outputs = []
    model.decoder.blocks[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    condition = torch.randn(4, 8, model.config.decoder_width, generator=torch.Generator().manual_seed(0))
    velocity, features = model.decoder.with_features(images(), torch.rand(4), condition, 0)
    assert torch.equal(features, outputs[0][:, :16].unflatten(1, (4, 4)))
    assert velocity.shape == (4, 3, 16, 16)


def test_alignment_changes_neither_the_first_weights_nor_the_velocity_loss(teacher_file):
    models = []
    for description in (component(teacher_file), Component("flextok", TINY_ARGS["tokenizers"]["flextok"])):
        torch.manual_seed(0)
        models.append(build("tokenizers", description))
    aligned, plain = models
    assert all(torch.equal(aligned.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(loss(aligned).terms["velocity"], loss(plain).total)


def test_alignment_is_float32_under_bf16_autocast(teacher_file):
    model = randomized(build("tokenizers", component(teacher_file)))
    exact = loss(model).terms["alignment"]
    with torch.autocast("cpu", torch.bfloat16):
        low = loss(model).terms["alignment"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0, atol=0.02)


def test_alignment_alone_can_be_learned(teacher_file):
    torch.manual_seed(0)
    model = build("tokenizers", component(teacher_file))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        report = loss(model)
        report.total.backward()
        optimizer.step()
    assert report.stats["alignment_cosine"] > 0.5


def test_without_a_weights_file_alignment_is_off_and_says_so():
    with pytest.warns(UserWarning, match=f"alignment is off: .*teacher_weights .*{NAME}"):
        model = build("tokenizers", component(None))
    assert model.alignment is None and list(loss(model).terms) == ["velocity"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": 2}, r"alignment\.layer must lie in 0\.\.1, got 2"),
        ({"weight": 0.0}, r"alignment\.weight .* must be positive"),
        ({"projector_width": 0}, r"alignment\.projector_width must be positive"),
        ({"teacher_weight": "x"}, r"unknown key 'alignment\.teacher_weight'; did you mean 'teacher_weights'"),
        ({"teacher_weights": "gone.pth"}, r"teacher weights not found: gone\.pth"),
    ],
)
def test_bad_arguments_are_named(teacher_file, change, words):
    with pytest.raises(UserError, match=words):
        build("tokenizers", component(teacher_file, **change))


def test_a_run_exports_no_part_of_it_and_resumes_with_it(teacher_file, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(teacher_file.read_bytes())
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    tokenizer, data = vars(component(weights)), {"name": "digits", "batch_size": 4}
    path.write_text(to_yaml({"output": str(output), "tokenizer": tokenizer, "data": data, "resume": "auto"}))

    def run(updates):
        train(load_config(path, [f"trainer.max_updates={updates}"]))

    run(2)
    state = read_state(output)
    assert any("alignment.projector" in name for name in state["state_dict"])
    assert any("alignment.projector" in name for name in state["callbacks"]["ema"])
    assert not any("teacher" in name for name in state["state_dict"])
    assert "alignment" not in export_info(output)["args"]
    header = (output / "metrics.csv").read_text().splitlines()[0]
    assert all(f"train/{name}" in header for name in ("loss_velocity", "loss_alignment", "alignment_cosine"))
    run(3)
    weights.unlink()
    model = load_tokenizer(output)
    assert model.alignment is None and model.tokenize(images()).ids.shape == (4, 8, 1)
    with pytest.raises(UserError, match="teacher weights not found"):
        run(4)


def test_weights_may_be_named_by_a_repository_of_the_hub(tmp_path, monkeypatch):
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **tiny)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    teacher = load_teacher("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k", **tiny)
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")]
    assert torch.equal(teacher.model.pos_embed, model.pos_embed)
    with pytest.raises(UserError, match=r"teacher weights not found: weights/absent\.safetensors"):
        load_teacher("vit_tiny_patch16_224", "weights/absent.safetensors", **tiny)
    assert len(asked) == 1
