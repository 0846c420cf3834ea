"""Weights shared out over two gloo processes on the CPU: what they compute and leave is what one process would."""

import os
import socket
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tiny_models.args import HEAD, TINY_ARGS, VARIANTS
from tiny_models.models import SPECS, make_generator
from tiny_models.runs import read_state, rows, tiny_run
from tiny_models.text import condition_for
from vistok.checkpoint import load_generator
from vistok.interfaces import SampleOptions
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, Tokens
from vistok.training.optim import OptimConfig, make_optimizer
from vistok.training.run import train
from vistok.training.sharding import full, shard

ROWS = 4


def made(name, variant):
    """A generator in training mode without any draws, and its tokens and conditions."""
    spec = SPECS["multi-scale" if "scale" in name or name == "tokenflow_t2i" else "slots"]
    if "shuffle" in variant:
        spec = replace(SPECS["grid"], layout=SPECS["slots"].layout)
    head = {"head": {**HEAD, "dropout": 0.0}} if not isinstance(spec.layout, MultiScale) else {}
    torch.manual_seed(0)  # of code vectors
    net = make_generator(name, spec, **{**head, **variant, "dropout": 0.0, "condition_dropout": 0.0}).train()
    slots = [
        torch.randint(0, n, (ROWS, spec.num_positions), generator=torch.Generator().manual_seed(1))
        for n in spec.vocab_sizes
    ]
    return net, torch.stack(slots, dim=-1), condition_for(net, ROWS)


CASES = [(name, {}) for name in TINY_ARGS["generators"]]
CASES += [
    (name, args) for name, variants in VARIANTS.items() if name in TINY_ARGS["generators"] for args in variants.values()
]
CASES += [("gpt", {"shuffle": {"window": 2}})]


def compare(rank, init):
    """One process: loss, gradients and samples of each generator, sharded and not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    for name, variant in CASES:
        alone, ids, condition = made(name, variant)
        net, _, _ = made(name, variant)
        shard(net, init_device_mesh("cpu", (2,)))
        assert all(isinstance(p, DTensor) for p in net.parameters())
        share = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)

        def loss(model, part):
            return model(Tokens(ids[part], model.spec), condition[part], torch.Generator().manual_seed(0)).total  # noqa: B023

        (sum(loss(alone, slice(at, at + ROWS // 2)) for at in (0, ROWS // 2)) / 2).backward()
        loss(net, share).backward()
        for (key, p), wanted in zip(net.named_parameters(), alone.parameters()):
            if wanted.requires_grad:
                assert torch.allclose(full(p.grad), wanted.grad, rtol=1e-4, atol=1e-6), (name, variant, key)
        options = SampleOptions(cfg_scale=2.0)
        samples = [
            model.eval().generate(condition, options, SampleRng.from_seed(0, ROWS)).ids for model in (net, alone)
        ]
        assert torch.equal(*samples), (name, variant)
    dist.destroy_process_group()


def test_every_generator_computes_the_same(tmp_path):
    mp.start_processes(compare, (f"file://{tmp_path / 'meeting'}",), nprocs=2, start_method="fork")


def move(rank, init):
    """One process: three updates by Muon, sharded and not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    (alone, ids, condition), (net, *_) = made("gpt", {}), made("gpt", {})
    shard(net, init_device_mesh("cpu", (2,)))
    for model in (alone, net):
        optimizer = make_optimizer(model, OptimConfig(name="muon", lr=0.01))
        for _ in range(3):
            model(Tokens(ids, model.spec), condition, torch.Generator().manual_seed(0)).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, p), wanted in zip(net.named_parameters(), alone.parameters()):
        # A last bit of a gradient can be one of bfloat16 in a step.
        assert torch.allclose(full(p), wanted, rtol=0, atol=1e-3), key
    dist.destroy_process_group()


def test_muon_moves_the_same(tmp_path):
    mp.start_processes(move, (f"file://{tmp_path / 'meeting'}",), nprocs=2, start_method="fork")


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process(rank, config, port):
    """One process of a run, as a launcher would start it."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ.update(place, LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three updates by one process, and by two that share the weights, are stopped, go on, and leave one alone."""
    folder = tmp_path_factory.mktemp("fsdp")
    train(tiny_run(folder, "trainer.max_updates=1", f"output={folder / 'tokenizer'}"))
    size = ["width=16", "depth=2", "heads=2", "num_classes=10", "mlp_multiple=8", "dropout=0", "condition_dropout=0"]
    options = ["generator.name=gpt", *(f"generator.args.{part}" for part in size), f"tokenizer={folder / 'tokenizer'}"]
    options += ["data.args.jitter=false", "optim.schedule=constant", "ema.decay=0.5", "optim.clip_norm=0.05"]
    options += ["data.batch_size=16", "trainer.val_every_updates=1", "log.pictures_every_updates=2"]
    one, two = folder / "one", folder / "two"
    train(tiny_run(folder, *options, f"output={one}", "trainer.accumulate=2", "trainer.max_updates=3"))
    for updates in (1, 2):
        sharded = ["trainer.devices=2", "trainer.strategy=fsdp", f"trainer.max_updates={updates}", "resume=auto"]
        sharded += ["trainer.activation_checkpointing=true", f"output={two}"]
        mp.start_processes(process, (tiny_run(folder, *options, *sharded), port()), nprocs=2, start_method="fork")
    state = read_state(two)
    train(tiny_run(folder, *options, f"output={two}", "trainer.accumulate=2", "trainer.max_updates=3", "resume=auto"))
    return one, two, state


def test_a_run_can_change_its_strategy(runs):
    one, two, _ = runs
    whole, shared = read_state(one), read_state(two)
    assert (shared["updates"], shared["images"]) == (3, 96)
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(shared[part], whole[part], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared["callbacks"]["ema"], whole["callbacks"]["ema"], rtol=1e-4, atol=1e-5)


def test_a_sharded_checkpoint_holds_whole_plain_tensors(runs):
    one, _, state = runs
    assert state["state_dict"].keys() == read_state(one)["state_dict"].keys()
    held = [*state["state_dict"].values(), *state["callbacks"]["ema"].values()]
    held += [value for slots in state["optimizer_states"][0]["state"].values() for value in slots.values()]
    assert all(type(tensor) is torch.Tensor for tensor in held)


def test_metrics_pictures_and_export_are_those_of_one_process(runs):
    one, two, _ = runs
    for wanted, row in zip(rows(one), rows(two), strict=True):
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            assert (not wanted[name] and not row[name]) or float(row[name]) == pytest.approx(
                float(wanted[name]), rel=1e-4
            )
    pictures = [(run / "pictures" / "update_00000002.png").read_bytes() for run in (one, two)]
    assert pictures[0] == pictures[1]
    assert load_generator(two).spec == load_generator(one).spec
