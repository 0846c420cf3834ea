"""The order of training samples: once per epoch, disjoint over processes, exact on resume, free of workers."""

from itertools import islice

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vistok.data.datamodule import DataModule, PositionBatchSampler
from vistok.rng import seeded_generator


class Numbers:
    """Sample i is the number i, and a draw."""

    num_classes, class_names, description = 0, [], {}

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get(self, index, rng=None):
        noise = torch.rand(1, generator=rng) if rng is not None else torch.zeros(1)
        return {"image": noise.expand(3, 1, 1), "label": index, "text": "", "key": str(index)}


def stream(count, batches, **options):
    """The first pairs (position, index) of a sampler, batch by batch."""
    return list(islice(PositionBatchSampler(count, options.pop("batch_size", 4), 7, **options), batches))


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_every_sample_once_per_epoch_in_a_new_order():
    pairs = flat(stream(10, 10))
    assert [position for position, _ in pairs] == list(range(40))
    epochs = [[index for _, index in pairs[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_another_seed_is_another_order():
    orders = [flat(islice(PositionBatchSampler(50, 4, seed), 10)) for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_the_single_stream(world_size):
    whole = stream(10, 8, batch_size=4 * world_size)
    ranks = [stream(10, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert whole == [flat(blocks) for blocks in zip(*ranks)]


def test_resume_goes_on_where_it_stopped_even_with_another_world_size():
    whole = flat(stream(10, 12))
    assert flat(stream(10, 7, consumed=lambda: 20)) == whole[20:48]
    ranks = [stream(10, 2, batch_size=2, rank=rank, world_size=2, consumed=lambda: 20) for rank in range(2)]
    assert [pair for blocks in zip(*ranks) for pair in flat(blocks)] == whole[20:28]


def test_consumed_is_asked_when_iteration_starts():
    count = 0
    loader = DataModule(Numbers(10), None, 4, seed=7, consumed=lambda: count).train_dataloader()
    assert next(iter(loader))["position"].tolist() == [0, 1, 2, 3]
    count = 4
    assert next(iter(loader))["position"].tolist() == [4, 5, 6, 7]


def test_workers_change_nothing():
    def batches(workers):
        return list(islice(DataModule(Numbers(10), None, 4, workers, seed=7).train_dataloader(), 6))

    for alone, parallel in zip(batches(0), batches(2), strict=True):
        assert alone["key"] == parallel["key"]
        assert torch.equal(alone["image"], parallel["image"])


def test_augmentation_depends_on_seed_and_position():
    batches = list(islice(DataModule(Numbers(2), None, 2, seed=7).train_dataloader(), 2))
    draws = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches])
    want = [torch.rand(1, generator=seeded_generator("augment", 7, position)) for position in range(4)]
    assert torch.equal(draws, torch.cat(want))


class Place:
    """What a DataModule asks of its trainer."""

    def __init__(self):
        self.global_rank, self.world_size = dist.get_rank(), dist.get_world_size()


def _see(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = DataModule(Numbers(10), Numbers(7), 2, workers=1, seed=7)
    module.trainer = Place()
    seen = torch.cat([batch["label"] for batch in islice(module.train_dataloader(), 5)])
    gathered = [torch.empty_like(seen) for _ in range(2)]
    dist.all_gather(gathered, seen)
    validated = [None, None]
    dist.all_gather_object(validated, [key for batch in module.val_dataloader() for key in batch["key"]])
    if rank == 0:
        torch.save({"train": torch.stack(gathered).tolist(), "val": validated}, f"{folder}/seen.pt")
    dist.destroy_process_group()


def test_two_processes_share_an_epoch(tmp_path):
    mp.start_processes(_see, (str(tmp_path),), nprocs=2, start_method="fork")
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    first, second = seen["train"]
    # 5 updates of 2 x 2 samples are two epochs of 10.
    order = [label for start in range(0, 10, 2) for part in (first, second) for label in part[start : start + 2]]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order == [index for _, index in flat(stream(10, 5))]
    assert sorted(key for part in seen["val"] for key in part) == [str(i) for i in range(7)]
