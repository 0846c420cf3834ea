"""Generation metrics against torch-fidelity and torchmetrics, on features of an Inception with random weights."""

import pytest
import torch
from random_inception import write_random_inception
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsScore
from torchmetrics.image.kid import KernelInceptionDistance

from vistok.data.datamodule import load_data
from vistok.eval import features
from vistok.eval.features import load_features
from vistok.eval.fid import FrechetDistance, Moments, fid_notes, frechet_distance, metric_name, rank_notes
from vistok.eval.generation import in_class_order, measure_generation
from vistok.eval.image_statistics import ImageStatistics
from vistok.eval.images import uint8_batches
from vistok.eval.inception_score import InceptionScore, ordered_parts, shuffled_parts
from vistok.eval.kid import kernel_distance
from vistok.eval.neighbours import precision_recall
from vistok.eval.reference import measure_reference

REAL, FAKE = 18, 14


class Given(torch.nn.Module):
    """For torchmetrics: features that are passed on as if they were images."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Layers of real digits and of noisy ones: half of them are nearly those of the real set, half are not."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    real, *_ = next(uint8_batches(load_data("digits", "train", 16), REAL, count=REAL))
    noise = torch.randint(-60, 60, (FAKE, *real.shape[1:]), generator=torch.Generator().manual_seed(0))
    noise[: FAKE // 2] //= 30
    fake = (real[:FAKE].int() + noise).clamp(0, 255).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        write_random_inception(path, real[:4])
        patch.setattr(features, "INCEPTION_SHA256_PREFIX", "")
        network = load_features(f"inception:{path}")
    with torch.no_grad():
        return network, network.layers(real), network.layers(fake)


def frechet(real, fake):
    metric = FrechetDistance(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def theirs(real, fake):
    statistics = [fid_features_to_statistics(one.double()) for one in (fake, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_fid_and_sfid(found):
    """On the first 300 features, to save time; neither library has sFID, so its formula is compared on its features."""
    _, real, fake = found
    for layer in ("pool", "spatial"):
        some_real, some_fake = real[layer][:, :300], fake[layer][:, :300]
        ours = frechet(some_real, some_fake)
        assert ours == pytest.approx(theirs(some_real, some_fake), rel=1e-4)
        metric = FrechetInceptionDistance(Given(300))
        metric.update(some_real.double(), real=True)
        metric.update(some_fake.double(), real=False)
        assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
        assert frechet(some_real, some_real) == pytest.approx(0, abs=1e-3)


def test_kid(found):
    _, real, fake = found
    for size in (10, FAKE):
        mean, deviation = kernel_distance(fake["pool"], real["pool"], subsets=5, size=size)
        expected = kid_features_to_metric(
            fake["pool"].double(), real["pool"].double(), kid_subsets=5, kid_subset_size=size, rng_seed=2020
        )
        assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
        assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)
    # torchmetrics draws by itself: only subsets of everything are the same.
    metric = KernelInceptionDistance(Given(2048), subsets=2, subset_size=FAKE)
    metric.update(real["pool"][:FAKE].double(), real=True)
    metric.update(fake["pool"].double(), real=False)
    mean, _ = kernel_distance(fake["pool"], real["pool"][:FAKE], subsets=2)
    assert mean == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def score(logits, parts, batch=9):
    metric = InceptionScore(logits.shape[1], int(parts.max()) + 1)
    for rows in torch.arange(len(logits)).split(batch):
        metric.update(logits[rows], parts[rows])
    return metric.compute().tolist()


def test_inception_score(found):
    _, real, _ = found
    logits = 10 * real["logits"]  # the random network is not sure of anything
    mean, deviation = score(logits, shuffled_parts(REAL))
    expected = isc_features_to_metric(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-4)
    assert mean > 1.01, "the random network tells images apart"
    metric = TorchmetricsScore(Given(1008), splits=1)
    metric.update(logits.double())
    assert score(logits, ordered_parts(REAL))[0] == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_inception_score_of_sure_answers_and_of_sorted_ones():
    classes = torch.arange(50).repeat_interleave(200)
    logits = 30 * torch.nn.functional.one_hot(classes, 50).double()
    shuffled, ordered = score(logits, shuffled_parts(10_000))[0], score(logits, ordered_parts(10_000))[0]
    assert shuffled == pytest.approx(50, rel=0.03), "50 classes, about 20 images of each in a part"
    assert ordered == pytest.approx(25, rel=0.01), "25 classes in each of two parts of 5,000"
    assert in_class_order({"IS-10k (x)": shuffled, "ADM-IS-10k (x)": ordered})
    assert not in_class_order({"IS-10k (x)": shuffled, "ADM-IS-10k (x)": shuffled})
    assert not in_class_order({"gFID-10k (x)": 1.0})
    assert ordered_parts(10_001).bincount().tolist() == [5000, 5000, 1]
    assert shuffled_parts(10_001).bincount().tolist() == [1000] * 9 + [1001]


def test_precision_and_recall(found):
    _, real, fake = found
    for one, other in ((real, fake), (fake, real)):
        expected = prc_features_to_metric(other["pool"].double(), one["pool"].double(), prc_batch_size=100)
        ours = precision_recall(one["pool"], other["pool"])
        assert ours == pytest.approx({name: expected[name] for name in ours}, rel=1e-6)
    assert 0 < sum(ours.values()) < 2


@torch.no_grad()
def test_all_figures_of_a_set():
    """The whole way from pixels, in batches of any size, against torch-fidelity on the same features."""
    network = load_features("digits")
    train, val = load_data("digits", "train", 16), load_data("digits", "val", 16)
    reference = measure_reference(train, network, batch_size=700)
    samples = [({"all": images}, *more) for images, *more in uint8_batches(val, 100)]
    metrics = measure_generation(samples, len(val), reference, network)
    real, fake = (
        torch.cat([network.layers(images)["pool"] for images, *_ in uint8_batches(one, 500)]).double()
        for one in (train, val)
    )
    kid = kid_features_to_metric(fake, real, kid_subsets=100, kid_subset_size=len(val), rng_seed=2020)
    neighbours = prc_features_to_metric(fake, real)
    statistics = [fid_features_to_statistics(one) for one in (fake, real)]
    expected = {
        "gFID": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "IS": isc_features_to_metric(network.logits(fake.float())["class"])["inception_score_mean"],
        "KID": kid["kernel_inception_distance_mean"],
        "precision": neighbours["precision"],
        "recall": neighbours["recall"],
    }
    row = metrics["tokens"]["all"]
    found = {name: row[f"{name}-297 (digits-cnn features)"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    deviations = metrics["standard_deviations"]["all"]
    assert deviations["KID-297 (digits-cnn features)"] == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-4)
    assert row["class_accuracy"] >= 0.97


def test_two_halves_of_digits_are_near():
    """The figure that the README states: gFID-750 of one half of the training digits against the other."""
    network = load_features("digits")
    images = torch.cat([images for images, *_ in uint8_batches(load_data("digits", "train", 16), 500)])
    halves = []
    for half in (images[0::2], images[1::2]):
        moments = Moments(network.num_features)
        with torch.no_grad():
            moments.update(network.features(half))
        halves.append(moments.compute())
    distance = frechet_distance(*halves).item()
    spread = halves[0].covariance.trace().item()
    assert 0 < distance < 0.02 * spread
    assert frechet_distance(halves[0], halves[0]).item() == pytest.approx(0, abs=1e-3)


def test_statistics_do_not_grow_with_the_images():
    network = load_features("digits")
    sizes = {}
    for count in (100, 400):
        statistics = ImageStatistics(network, count, most_kept=50)
        for batch in uint8_batches(load_data("digits", "train", 16), 50, count=count):
            statistics.update(*batch)
        states = [
            value
            for metric in (*statistics.moments.values(), *statistics.scores.values())
            for value in metric.metric_state.values()
        ]
        sizes[count] = sum(value.numel() for value in states) + statistics.kept.numel()
        assert statistics.count == count
    assert sizes[100] == sizes[400]


def test_names_carry_the_number_of_images():
    network = load_features("digits")
    assert metric_name("gFID", network, 500) == "gFID-500 (digits-cnn features)"
    assert metric_name("gFID", network, 50_000) == "gFID-50k (digits-cnn features)"
    assert metric_name("gFID", network, 49_999) == "gFID-49999 (digits-cnn features)"
    few = " ".join(fid_notes(network, 40, None))
    assert "at least 65 are needed" in few and "N=40" in few
    assert fid_notes(network, 50_000, None) == []
    assert rank_notes(network, 65) == [] and "64 images cannot fill a covariance of 64" in rank_notes(network, 64)[0]
