import math

import pytest
import torch
from torch import nn

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
