import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from vistok.errors import UserError
from vistok.nn.transformer import Block
from vistok.training.optim import OptimConfig, decay_groups, lr_factor, make_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.tied_head = nn.Linear(4, 5, bias=False)
        self.tied_head.weight = self.embedding.weight
        self.registers = nn.Parameter(torch.zeros(8, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_weights_of_linear_and_conv_layers_decay_and_nothing_else():
    net = Net()
    names = {p: name for name, p in net.named_parameters()}
    decaying, others = (sorted(names[p] for p in group["params"]) for group in decay_groups(net, 0.1))
    assert decaying == ["conv.weight", "linear.weight"]
    expected = [
        "conv.bias",
        "embedding.weight",
        "linear.bias",
        "norm.bias",
        "norm.weight",
        "registers",
    ]
    assert others == expected


def test_every_trainable_parameter_is_in_exactly_one_group():
    net = Net()
    grouped = [id(p) for group in make_optimizer(net, OptimConfig()).param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in net.parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in decay_groups(net, 0.1)] == [0.1, 0.0]


def test_cosine_schedule_values():
    config = OptimConfig(warmup_updates=4, min_lr_ratio=0.1)
    factors = [lr_factor(update, config, 24) for update in range(26)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[24] == factors[25] == pytest.approx(0.1)


def test_constant_schedule_and_no_warmup():
    assert [lr_factor(update, OptimConfig(schedule="constant"), 10) for update in (0, 5, 99)] == [1.0, 1.0, 1.0]
    assert lr_factor(0, OptimConfig(), 10) == 1.0


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8, 2, 12, nn.RMSNorm, cross=True) for _ in range(2))
        self.head = nn.Linear(8, 5)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    net = Transformer()
    names = {p: name for name, p in net.named_parameters()}
    optimizer = make_optimizer(net, OptimConfig(name="muon", weight_decay=0.1))
    groups = [(group.get("parts"), group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    suffixes = {fused: sorted({names[p].split(".", 2)[2] for p in params}) for fused, _, params in groups if fused}
    assert suffixes[1] == [
        "attention.out.weight",
        "cross_attention.out.weight",
        "cross_attention.q.weight",
        "mlp.down.weight",
    ]
    assert suffixes[2] == ["cross_attention.kv.weight", "mlp.gate_up.weight"]
    assert suffixes[3] == ["attention.qkv.weight"]
    assert all(decay == 0.1 for fused, decay, _ in groups if fused)
    rest = {names[p] for fused, _, params in groups if not fused for p in params}
    assert {"head.weight", "head.bias"} < rest and all("norm" in name or "head" in name for name in rest)


def test_a_step_of_muon_is_orthogonal_in_every_part_and_as_large_as_the_rate_says():
    net = Transformer()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = make_optimizer(net, OptimConfig(name="muon", lr=0.5, weight_decay=0.1))
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    weight = net.blocks[0].attention.qkv.weight
    for part, old, grad in zip(weight.chunk(3), before["blocks.0.attention.qkv.weight"].chunk(3), weight.grad.chunk(3)):
        step = (old * (1 - 0.5 * 0.1) - part) / (0.5 * 0.2 * 8**0.5)
        u, _, v = torch.linalg.svd(grad)
        # Of the gradient, the directions and not the strengths; the weakest are not there yet after five iterations.
        strengths = (u.T @ step @ v.T).diagonal()
        assert ((strengths[:-2] > 0.6) & (strengths[:-2] < 1.25)).all()
        assert (u.T @ step @ v.T - strengths.diag()).abs().max() < 0.06  # bfloat16
    head = before["head.weight"] * (1 - 0.5 * 0.1) - 0.5 * net.head.weight.grad.sign()
    torch.testing.assert_close(net.head.weight, head, rtol=0, atol=1e-4)


def test_muon_averages_gradients_over_updates():
    net = Transformer()
    optimizer = make_optimizer(net, OptimConfig(name="muon"))
    weight = net.blocks[0].mlp.down.weight
    for scale in (1.0, 2.0):
        for p in net.parameters():
            p.grad = torch.full_like(p, scale)
        optimizer.step()
    torch.testing.assert_close(
        optimizer.state[weight]["momentum"], torch.full_like(weight, 0.05 * 0.95 + 0.05 * 2.0), rtol=1e-5, atol=0
    )


def test_muon_goes_on_from_its_state():
    nets = [Transformer(), Transformer()]
    optimizers = [make_optimizer(net, OptimConfig(name="muon", lr=0.1)) for net in nets]

    def update(net, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    update(nets[0], optimizers[0], 1)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    for net, optimizer in zip(nets, optimizers):
        update(net, optimizer, 2)
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a, b)


def test_muon_needs_transformer_blocks():
    with pytest.raises(UserError, match=r"optim\.name=muon: Net has no transformer blocks"):
        make_optimizer(Net(), OptimConfig(name="muon"))
