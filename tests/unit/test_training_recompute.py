"""Activation checkpointing: less is kept, nothing else changes."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tiny_models.args import VARIANTS
from tiny_models.models import SPECS, make_generator, make_tokenizer
from tiny_models.text import condition_for
from vistok.errors import UserError
from vistok.nn.transformer import recompute_blocks
from vistok.tokens import Tokens

SIZE = {"width": 64, "depth": 6}


def passed(name, spec, variant, recompute):
    """Report and gradients of a training pass with dropout, and the bytes that it kept for its backward pass."""
    net = make_generator(name, spec, **SIZE, **variant, dropout=0.2).train()
    keys = list(net.state_dict())
    if recompute:
        recompute_blocks(net)
    assert list(net.state_dict()) == keys
    slots = [torch.randint(0, n, (4, spec.num_positions), generator=torch.Generator()) for n in spec.vocab_sizes]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = Tokens(torch.stack(slots, dim=-1), spec)
        report = net(tokens, condition_for(net, 4), torch.Generator().manual_seed(0))
    report.total.backward()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    size = sum(count for storage, count in kept.items() if storage not in weights)
    return report.total, {n: p.grad for n, p in net.named_parameters()}, size


@pytest.mark.parametrize(
    ("name", "spec", "variant"),
    [
        ("gpt", "grid", {}),
        ("gpt", "slots", {}),
        ("gpt", "grid", VARIANTS["gpt"]["read_text"]),
        ("masked", "grid", VARIANTS["masked"]["read_prefix"]),
    ],
)
def test_loss_and_gradients_stay_the_same_and_memory_does_not(name, spec, variant):
    loss, gradients, size = passed(name, SPECS[spec], variant, recompute=False)
    again, recomputed, rest = passed(name, SPECS[spec], variant, recompute=True)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(recomputed, gradients)
    inputs = SIZE["depth"] * 2 * 4 * (SPECS[spec].num_positions + 2) * SIZE["width"] * 4  # what blocks begin with
    assert rest + inputs < 0.5 * size


def test_a_net_in_eval_mode_samples_as_before():
    nets = [make_generator("gpt", SPECS["grid"]) for _ in range(2)]
    recompute_blocks(nets[1])
    ids = torch.zeros(2, 15, 1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(*(net.logits(ids, condition_for(net, 2)) for net in nets))


def test_a_tokenizer_of_transformer_blocks_has_them_too():
    net = make_tokenizer("flextok")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def gradients():
        net.zero_grad()
        net.training_loss(images, torch.Generator().manual_seed(0)).total.backward()
        return [parameter.grad for parameter in net.parameters()]

    before = gradients()
    recompute_blocks(net)
    assert all(map(torch.equal, before, gradients()))


def test_compiled_passes_recompute_too():
    nets = [make_generator("gpt", SPECS["grid"], depth=1, dropout=0.0).train() for _ in range(2)]
    recompute_blocks(nets[1])
    nets[1].compile(backend="eager")
    ids = Tokens(torch.zeros(2, 15, 1, dtype=torch.int64), SPECS["grid"])
    for net in nets:
        net(ids, condition_for(net, 2), torch.Generator().manual_seed(0)).total.backward()
    torch.testing.assert_close(*({n: p.grad for n, p in net.named_parameters()} for net in nets))


def test_a_tokenizer_of_convolutions_has_none():
    with pytest.raises(UserError, match="VQGAN has none"):
        recompute_blocks(make_tokenizer("vqgan"))
