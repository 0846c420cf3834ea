import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import metrics

from vistok.errors import UserError
from vistok.eval.codebook import CodebookUsage, describe
from vistok.eval.fid import FrechetDistance
from vistok.eval.neighbours import copies_share, nearest_distance, precision_recall
from vistok.eval.reconstruction import ReconstructionQuality
from vistok.pictures import to_uint8
from vistok.tokens import MultiScale


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, size=16, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def test_to_uint8_rounds_and_clips():
    levels = torch.arange(256)
    exact = (levels.double() / 127.5 - 1).float()
    assert torch.equal(to_uint8(exact), levels.to(torch.uint8))
    assert torch.equal(to_uint8(exact + 0.49 / 127.5), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_psnr_is_the_mean_over_images_of_each_ones_own():
    originals = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    decoded = originals + torch.tensor([1, 10, 50], dtype=torch.uint8).view(3, 1, 1, 1)
    quality = ReconstructionQuality(None)
    quality.update(originals[:2], decoded[:2], torch.full((2,), -1))
    quality.update(originals[2:], decoded[2:], torch.full((1,), -1))
    expected = sum(20 * math.log10(255 / error) for error in (1, 10, 50)) / 3
    assert quality.compute()["psnr_db"] == pytest.approx(expected, abs=1e-4)


def hand_ssim(x, y):
    """SSIM of two images (3, H, W) in 0..255 by Wang et al. 2004, eq. 13, mirrored at the border."""
    line = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / torch.outer(line, line).sum()

    def mean(image):
        patches = F.pad(image.double(), (5, 5, 5, 5), mode="reflect").unfold(1, 11, 1).unfold(2, 11, 1)
        return (patches * window).sum((-1, -2))

    mean_x, mean_y = mean(x), mean(y)
    x, y = x.double(), y.double()
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


@pytest.mark.parametrize("size", [16, 33])
def test_psnr_and_ssim_are_those_of_scikit_image(size):
    originals = random_images(3, size, seed=1)
    decoded = (originals.float() * 0.7 + random_images(3, size, seed=2).float() * 0.3).to(torch.uint8)
    quality = ReconstructionQuality(None)
    quality.update(originals[:2], decoded[:2], torch.full((2,), -1))
    quality.update(originals[2:], decoded[2:], torch.full((1,), -1))
    pairs = [(x.numpy(), y.numpy()) for x, y in zip(originals, decoded)]
    found = quality.compute()
    expected = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    assert found["psnr_db"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    # scikit-image leaves out the border of half a window; ours is mirrored there.
    wide = [[np.pad(image, ((0, 0), (5, 5), (5, 5)), mode="reflect") for image in pair] for pair in pairs]
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [metrics.structural_similarity(x, y, channel_axis=0, data_range=255, **window) for x, y in wide]
    assert found["ssim"] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert quality.images == 3


def test_ssim_equals_the_formula():
    originals = random_images(2, seed=1)
    decoded = (originals.float() * 0.7 + random_images(2, seed=2).float() * 0.3).to(torch.uint8)
    quality = ReconstructionQuality(None)
    quality.update(originals, decoded, torch.full((2,), -1))
    expected = sum(hand_ssim(x, y) for x, y in zip(originals, decoded)) / 2
    assert quality.compute()["ssim"] == pytest.approx(expected, abs=1e-4)


def frechet(real, fake):
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def test_frechet_distance_is_zero_for_equal_sets_and_grows_with_noise():
    real = torch.randn(300, 8, generator=generator())
    noise = torch.randn(300, 8, generator=generator(1))
    distances = [frechet(real, real + scale * noise) for scale in (0.0, 0.3, 1.0, 3.0)]
    assert abs(distances[0]) < 1e-6
    assert distances == sorted(distances)
    assert distances[1] > 0.01


def test_frechet_distance_has_its_closed_form():
    # Equal covariances: the squared distance of the means. Scaled by a: plus (a - 1)^2 tr(Sigma).
    real = torch.randn(500, 4, generator=generator(), dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert frechet(real, real + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    centred = real - real.mean(0)
    assert frechet(centred, centred * 2) == pytest.approx(real.var(0).sum().item(), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features():
    """The directions that no image shows bring in no rounding: a set has distance 0 from itself."""
    real = 100 * torch.randn(60, 200, generator=generator())
    fake = 100 * torch.randn(90, 200, generator=generator(1))
    scale = real.var(0).sum().item()
    assert frechet(real, real) == pytest.approx(0, abs=1e-10 * scale)
    assert frechet(real, fake) == pytest.approx(frechet(fake, real), rel=1e-9)
    product = real.double().T.cov() @ fake.double().T.cov()
    overlap = torch.linalg.eigvals(product).sqrt().real.sum().item()
    variances = scale + fake.var(0).sum().item()
    expected = (real.double().mean(0) - fake.double().mean(0)).square().sum().item() + variances - 2 * overlap
    assert frechet(real, fake) == pytest.approx(expected, rel=1e-5)


def test_precision_and_recall_on_constructed_clouds():
    cloud = torch.randn(400, 2, generator=generator())
    assert precision_recall(cloud, cloud) == {"precision": 1.0, "recall": 1.0}
    assert precision_recall(cloud, cloud + 100) == {"precision": 0.0, "recall": 0.0}
    # Real images in two far modes: one of them missing costs recall and not precision, an invented one the opposite.
    other = torch.randn(400, 2, generator=generator(1)) + 50
    dropped = precision_recall(torch.cat([cloud, other]), cloud)
    assert dropped == {"precision": 1.0, "recall": 0.5}
    invented = precision_recall(cloud, torch.cat([cloud, other]))
    assert invented == {"precision": 0.5, "recall": 1.0}
    # Collapse onto one real image: every sample is right, almost nothing is reached.
    collapsed = precision_recall(cloud, cloud[:1].expand(400, 2))
    assert collapsed["precision"] == 1.0
    assert collapsed["recall"] <= 1 / 400


def test_precision_recall_uses_the_kth_neighbour_and_chunks(monkeypatch):
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    # Radii with k=2: 3, 2, 3, 6. The point -2.5 is inside the first ball only, 13.5 inside none.
    fake = torch.tensor([[-2.5], [13.5], [13.6], [13.7]])
    assert precision_recall(real, fake, k=2)["precision"] == 0.25
    assert precision_recall(real, fake, k=1)["precision"] == 0.0
    cloud = torch.randn(100, 3, generator=generator())
    whole = precision_recall(cloud[:50], cloud[50:])
    monkeypatch.setattr("vistok.eval.neighbours.CHUNK", 7)
    assert precision_recall(cloud[:50], cloud[50:]) == whole
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(cloud[:3], cloud)


def test_copies_are_counted_against_real_distances():
    train = random_images(60, size=8)
    held_out = random_images(200, size=8, seed=1)
    fresh = random_images(40, size=8, seed=2)
    near_copies = train[:10].float().add(1).clamp(max=255).to(torch.uint8)
    samples = torch.cat([train[:10], near_copies, fresh])
    distances = nearest_distance(samples, train)
    assert distances[:10].max() == 0
    brute = (fresh[:, None].double() - train[None].double()).square().sum((2, 3, 4)).sqrt().amin(1)
    torch.testing.assert_close(distances[20:], brute)
    share, threshold = copies_share(distances, nearest_distance(held_out, train))
    assert share == pytest.approx(20 / 60, abs=0.04)
    assert 0 < threshold < brute.max()


def test_codebook_usage_of_known_distributions():
    uniform = CodebookUsage((16,))
    uniform.update(torch.arange(16).view(4, 4, 1))
    assert uniform.compute() == pytest.approx({"usage": 1.0, "entropy_bits": 4.0, "perplexity": 16.0, "codes": 16})
    single = CodebookUsage((16,))
    single.update(torch.full((4, 4, 1), 3))
    assert single.compute() == pytest.approx({"usage": 1 / 16, "entropy_bits": 0.0, "perplexity": 1.0, "codes": 16})


def test_codebook_usage_keeps_slots_apart():
    metric = CodebookUsage((4, 2))
    # Slot 0 uses two codes equally, slot 1 one; the same ids in one pot would look different.
    metric.update(torch.tensor([[[0, 1], [3, 1]]]))
    result = metric.compute()
    assert result["slot_0/usage"] == 0.5
    assert result["slot_1/usage"] == 0.5
    assert result["slot_0/perplexity"] == pytest.approx(2)
    assert result["slot_1/perplexity"] == pytest.approx(1)
    assert result["perplexity"] == pytest.approx(1.5)
    assert result["codes"] == 2
    metric.reset()
    assert metric.counts.sum() == 0


def test_codebook_usage_keeps_scales_apart():
    metric = CodebookUsage((4,), MultiScale(((1, 1), (1, 3))))
    metric.update(torch.tensor([[[0], [1], [2], [3]], [[0], [1], [1], [2]]]))
    result = metric.compute()
    assert result["usage"] == 1
    assert result["scale_1x1/usage"] == 0.25 and result["scale_1x3/usage"] == 0.75
    assert result["scale_1x1/perplexity"] == pytest.approx(1)
    assert result["scale_1x3/entropy_bits"] == pytest.approx(1.459, abs=1e-3)  # shares 1/2, 1/3, 1/6
    metric.update(torch.tensor([[[3]]]))  # the first scale alone
    assert metric.compute()["scale_1x1/usage"] == 0.5 and metric.compute()["scale_1x3/usage"] == 0.75
    lines = describe(metric.compute())
    assert lines[0].startswith("codebook over 9 codes: usage 1")
    assert len(lines) == 3 and lines[2].startswith("codebook, scale 1x3: usage 0.75, entropy_bits 1.459")
