"""What codebooks learn on two processes is what one process learns from the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vistok.quantizers.residual_multiscale import ResidualMultiscale
from vistok.quantizers.shared_dual_vq import SharedDualCodebook
from vistok.quantizers.vq import Codebook, CodebookOptions

SIZES = ((1, 1), (2, 2), (4, 4))
AVERAGES = {"ema_decay": 0.8, "kmeans": True, "revive_after": 2}
GRADIENTS = {"kmeans": True, "revive_after": 2}


class Net(nn.Module):
    """A layer and a quantizer of maps."""

    def __init__(self, quantizer):
        super().__init__()
        self.layer, self.quantizer = nn.Conv2d(6, 6, 1), quantizer

    def forward(self, x, rng):
        h = self.layer(x)
        return self.quantizer(h if isinstance(self.quantizer, ResidualMultiscale) else h.flatten(2).mT, rng)


def vq(options, normalized=True):
    return Codebook(24, 6, CodebookOptions(normalized=normalized, **options))


MAKERS = {
    "averages": lambda: vq(AVERAGES),
    "averages, not normalised": lambda: vq(AVERAGES, False),
    "gradients": lambda: vq(GRADIENTS),
    "two tables": lambda: SharedDualCodebook(24, 4, 2, options=CodebookOptions(**AVERAGES)),
    "cascade": lambda: ResidualMultiscale(SharedDualCodebook(64, 4, 2, options=CodebookOptions(**AVERAGES)), SIZES),
    "residual": lambda: ResidualMultiscale(vq(GRADIENTS, False), SIZES, 2, "residual"),
}


def train(name, rank=None, drop=0.0):
    """State and last ids after a few updates on the whole batch, or the share of ``rank``; with drop, its own draws."""
    torch.manual_seed(0)
    net = Net(MAKERS[name]())
    if drop:
        net.quantizer.drop = drop
    model = net if rank is None else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(5):
        x = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(step))
        share = x if rank is None else x[2 * rank : 2 * rank + 2]
        rng = torch.Generator().manual_seed(step + 100 * (rank or 0) * bool(drop))
        quantized = model(share, rng)
        optimizer.zero_grad()
        (sum(quantized.terms.values()) + 0.1 * quantized.codes.square().mean()).backward()
        optimizer.step()
    return net.state_dict(), quantized.ids


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {name: train(name, rank) for name in MAKERS}
    results["dropped"] = train("residual", rank, drop=0.5)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizers")
    mp.start_processes(work, (str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", MAKERS)
def test_two_processes_learn_what_one_does(ranks, name):
    state, ids = train(name)
    (first, ids_first), (second, ids_second) = (results[name] for results in ranks)
    assert torch.equal(torch.cat([ids_first, ids_second]), ids)
    for key, value in state.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert len(ids.unique()) > 12


def test_ranks_that_drop_other_scales_keep_one_table(ranks):
    first, second = (results["dropped"][0] for results in ranks)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
