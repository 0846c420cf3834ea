"""Metrics are the same on two processes as on one, with unequal batches and with an idle process."""

from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tiny_models.models import make_tokenizer
from vistok.eval.codebook import CodebookUsage
from vistok.eval.features import load_features
from vistok.eval.fid import FrechetDistance
from vistok.eval.image_statistics import ImageStatistics
from vistok.eval.inception_score import InceptionScore
from vistok.eval.kid import kernel_distance
from vistok.eval.neighbours import precision_recall
from vistok.eval.probe import linear_probe, pooled_features
from vistok.eval.protocol import flatten
from vistok.eval.reconstruction import measure_reconstruction
from vistok.eval.similarity import Comparison
from vistok.pictures import to_uint8
from vistok.tokens import MultiScale

COUNT = 21
FIRST_SHARES = (11, COUNT)  # images of the first process


def inputs():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (COUNT, 4, 2), generator=rng)
    real, fake = torch.randn(2, COUNT, 6, generator=rng)
    return ids, real, 2 * fake + 0.5


def measure(rows):
    """Update with the images in ``rows``, in batches of 4 with a smaller last one."""
    usage, frechet = CodebookUsage((12, 12), MultiScale(((1, 1), (1, 3)))), FrechetDistance(6)
    inception = InceptionScore(6, 3)
    ids, real, fake = inputs()
    for part in rows.split(4) if len(rows) else ():
        usage.update(ids[part])
        frechet.update(real[part], real=True)
        frechet.update(fake[part], real=False)
        inception.update(fake[part], part % 3)
    score, deviation = inception.compute().tolist()
    return {"frechet": frechet.compute().item(), "is": score, "is_deviation": deviation, **usage.compute()}


def statistics(rows):
    """What is measured on samples, of whose features some are kept: those of the same images, in the same order."""
    seen = ImageStatistics(load_features("digits"), COUNT, most_kept=15)
    for batch in batches(rows):
        seen.update(to_uint8(batch["image"]), batch["label"].clamp(min=0), batch["position"])
    assert seen.kept.shape == (15, 64)
    real = seen.kept.flip(1) + 0.1
    figures = {"kid": kernel_distance(seen.kept, real, size=7)[0], **precision_recall(real, seen.kept)}
    for cut, (score, _) in seen.inception_scores().items():
        figures[cut] = score
    first, last = seen.kept[0].norm().item(), seen.kept[-1].norm().item()
    return {**figures, "first": first, "last": last, "count": seen.count, "accuracy": seen.class_accuracy()}


class Gray:
    """A data set that says how gray its reconstructions are."""

    agreement_definitions: ClassVar = {"gray": "mean level", "even": "share of even images"}

    def agreement(self, index, image):
        return {"gray": image.mean().item(), "even": float(index % 2 == 0)}


def batches(rows):
    """Batches of 4 images with a smaller last one, whose classes are known for two thirds of them."""
    images = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for part in rows.split(4) if len(rows) else ():
        label = torch.where(part % 3 == 0, -1, part % 10)
        yield {"image": images[part], "label": label, "position": part}


def reconstruct(rows):
    """Everything that is measured on reconstructions by a decoder that draws noise."""
    brightness = Comparison("brightness", "", lambda a, b: (a.float() - b.float()).mean((1, 2, 3)))
    metrics = measure_reconstruction(
        make_tokenizer("flextok"),
        batches(rows),
        load_features("digits"),
        [1, 8],
        checked=Gray(),
        steps=[1, 3],
        comparisons=[brightness],
    )
    return flatten(metrics)


def probe(rows):
    """A classifier of what each process read of its share."""
    model = make_tokenizer("uniflow")
    labelled = ({**batch, "label": batch["position"] % 3} for batch in batches(rows))
    features, labels = pooled_features(model, labelled, "flatten", {})
    return linear_probe((features, labels), (features[labels < 2], labels[labels < 2]))


TAKEN_BY_ANY = (measure, statistics, reconstruct)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    rows = torch.arange(COUNT)
    shares = [rows[:share] if rank == 0 else rows[share:] for share in FIRST_SHARES]
    results = {function.__name__: [function(share) for share in shares] for function in TAKEN_BY_ANY}
    results["probe"] = [probe(shares[0])]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(work, (tmp_path,), nprocs=2)
    rows = torch.arange(COUNT)
    expected = {function.__name__: function(rows) for function in (*TAKEN_BY_ANY, probe)}
    assert expected["measure"]["frechet"] > 1
    assert expected["measure"]["slot_0/usage"] == 1
    assert expected["reconstruct"]["counts / images"] == COUNT
    assert {"gray", "even", "brightness", "class_accuracy"} < {
        name.rpartition(" / ")[2] for name in expected["reconstruct"]
    }
    # Other batches round features otherwise, in float32.
    tolerances = {"measure": 1e-9, "statistics": 1e-4, "reconstruct": 1e-4, "probe": 1e-9}
    for rank in (0, 1):
        for name, results in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            for result in results:
                assert result == pytest.approx(expected[name], rel=tolerances[name])
