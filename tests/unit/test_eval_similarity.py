"""LPIPS and cosines of pretrained features, on random weights of the real architectures."""

import shutil

import pytest
import timm
import torch
import transformers

from tiny_models.detectors import save_clip
from tiny_models.vgg import alexnet_file, vgg16_file
from vistok.errors import UserError
from vistok.eval.reconstruction import ReconstructionQuality
from vistok.eval.similarity import cosine, lpips
from vistok.losses.perceptual import load_lpips

TIMM = "vit_tiny_patch16_224"


def images(seed, size=40):
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_clip(folder / "clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    side = {"height": 28, "width": 28}
    transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "dinov2")
    torch.save(timm.create_model(TIMM, num_classes=0).state_dict(), folder / "vit.pth")
    return folder


def test_lpips_is_the_distance_of_pixels_in_its_own_range():
    one = lpips(f"alex:{alexnet_file()}", 40)
    a, b = images(0), images(1)
    with torch.no_grad():
        expected = load_lpips(alexnet_file(), "alex")(a / 127.5 - 1, b / 127.5 - 1)
    torch.testing.assert_close(one.function(a, b), expected)
    assert one.name == "LPIPS (alex)" and one.function(a, a).abs().max() == 0
    other = lpips(f"vgg:{vgg16_file()}", 40)
    assert other.name == "LPIPS (vgg)" and other.definition != one.definition


def test_a_cosine_is_that_of_the_folder_s_own_features(weights):
    a, b = images(0), images(1)
    one = cosine(str(weights / "clip"))
    assert one.name == "cosine (clip features)"
    model = transformers.CLIPModel.from_pretrained(weights / "clip").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(weights / "clip")
    with torch.no_grad():
        x, y = (
            model.visual_projection(model.vision_model(**processor(list(part), return_tensors="pt")).pooler_output)
            for part in (a, b)
        )
    torch.testing.assert_close(one.function(a, b), torch.cosine_similarity(x, y))
    for comparison in (one, cosine(str(weights / "dinov2")), cosine(f"{TIMM}={weights / 'vit.pth'}")):
        assert comparison.function(a, b).shape == (3,)
        torch.testing.assert_close(comparison.function(a, a), torch.ones(3))
        assert (comparison.function(a, 255 - a) < 0.9999).all()
    assert cosine(f"{TIMM}={weights / 'vit.pth'}").name == f"cosine ({TIMM} features)"


def test_what_prepares_the_images_is_part_of_the_definition(weights, tmp_path):
    one = cosine(str(weights / "dinov2"))
    changed = shutil.copytree(weights / "dinov2", tmp_path / "dinov2")
    assert cosine(str(changed)).definition == one.definition
    text = (changed / "preprocessor_config.json").read_text()
    (changed / "preprocessor_config.json").write_text(text.replace('"resample": 3', '"resample": 0'))
    other = cosine(str(changed))
    assert (one.function(images(0), images(1)) != other.function(images(0), images(1))).all()
    assert other.definition != one.definition


def test_comparisons_are_means_over_images(weights):
    one = lpips(f"alex:{alexnet_file()}", 40)
    quality = ReconstructionQuality(None, comparisons=[one])
    a, b = images(0), images(1)
    for rows in (slice(0, 2), slice(2, 3)):
        quality.update(a[rows], b[rows], torch.full((3,), -1)[rows])
    assert quality.compute()["LPIPS (alex)"] == pytest.approx(one.function(a, b).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("load", "text", "words"),
    [
        (lambda text: lpips(text, 32), "squeeze:x.pth", "alexnet-owt-7be5be79.pth"),
        (lambda text: lpips(text, 32), "alex", "vgg16-397923af.pth"),
        (lambda text: lpips(text, 32), "vgg:none.pth", "--lpips: weights not found: none.pth; supply"),
        (lambda text: lpips(text, 16), "alex:any.pth", "--lpips: LPIPS by alex needs images of at least 31 px, got 16"),
        (cosine, "/none", "--similarity: no such folder: /none"),
        (cosine, "vit_tinny=x.pth", "--similarity: timm has no model 'vit_tinny'"),
        (cosine, f"{TIMM}=none.pth", "weights not found: none.pth"),
    ],
)
def test_what_is_missing_is_named(load, text, words):
    with pytest.raises(UserError) as error:
        load(text)
    assert words in str(error.value) and "\n" not in str(error.value)
