"""Metrics are the same on two processes as on one, with unequal batches and with an idle process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vistok.eval.codebook import CodebookUsage
from vistok.eval.fid import FrechetDistance
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
    ids, real, fake = inputs()
    for part in rows.split(4) if len(rows) else ():
        usage.update(ids[part])
        frechet.update(real[part], real=True)
        frechet.update(fake[part], real=False)
    return {"frechet": frechet.compute().item(), **usage.compute()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    rows = torch.arange(COUNT)
    results = [measure(rows[:share] if rank == 0 else rows[share:]) for share in FIRST_SHARES]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path):
    mp.spawn(work, (tmp_path,), nprocs=2)
    expected = measure(torch.arange(COUNT))
    assert expected["frechet"] > 1
    assert expected["slot_0/usage"] == 1
    for rank in (0, 1):
        for result in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert result == pytest.approx(expected, rel=1e-9)
