import pytest
import torch

from tiny_models.tokenizer import Config, TinyTokenizer
from vistok.training.ema import Ema, averaged
from vistok.training.optim import OptimConfig
from vistok.training.tasks import LossTask


@pytest.fixture
def task():
    net = TinyTokenizer(Config())
    net.decoder.bias.requires_grad_(False)
    return LossTask(net, OptimConfig(), max_updates=10)


def make_ema(task, decay):
    ema = Ema(decay)
    ema.on_train_start(None, task)
    return ema


def update(ema, task, value):
    with torch.no_grad():
        task.net.decoder.weight.fill_(value)
        task.net.seen += 1
    task.updates, task.updated = task.updates + 1, True
    ema.on_train_batch_end(None, task)


def test_decay_warms_up_and_then_is_constant(task):
    ema = make_ema(task, decay=0.25)
    expected = task.net.decoder.weight.detach().clone()
    for number, value in enumerate((1.0, -2.0, 3.0, 4.0), start=1):
        update(ema, task, value)
        decay = min(0.25, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(ema.average["decoder.weight"], expected)
    assert (1 + 1) / (10 + 1) < 0.25 == decay, "both branches were exercised"


def test_a_micro_batch_without_update_changes_nothing(task):
    ema = make_ema(task, decay=0.5)
    before = ema.average["decoder.weight"].clone()
    with torch.no_grad():
        task.net.decoder.weight.fill_(9.0)
    ema.on_train_batch_end(None, task)
    assert torch.equal(ema.average["decoder.weight"], before)


def test_only_trainable_parameters_are_averaged_and_buffers_are_current(task):
    ema = make_ema(task, decay=0.9)
    for value in (1.0, 2.0):
        update(ema, task, value)
    assert set(ema.average) == {name for name, p in task.net.named_parameters() if p.requires_grad}
    state = averaged(task.net, ema.average)
    assert state.keys() == task.net.state_dict().keys()
    assert int(state["seen"]) == 2
    assert torch.equal(state["decoder.weight"], ema.average["decoder.weight"])
    assert torch.equal(state["decoder.bias"], task.net.decoder.bias)


def test_swapped_gives_the_raw_weights_back_even_after_an_error(task):
    ema = make_ema(task, decay=0.9)
    update(ema, task, 5.0)
    with pytest.raises(KeyError), ema.swapped(task):
        assert torch.equal(task.net.decoder.weight, ema.average["decoder.weight"])
        assert not torch.equal(task.net.decoder.weight, torch.full_like(task.net.decoder.weight, 5.0))
        with pytest.raises(AssertionError, match="raw weights"):
            ema.on_save_checkpoint(None, task, {})
        raise KeyError
    assert torch.equal(task.net.decoder.weight, torch.full_like(task.net.decoder.weight, 5.0))
    ema.on_save_checkpoint(None, task, {})


def test_decay_zero_is_the_raw_weights(task):
    ema = make_ema(task, decay=0.0)
    update(ema, task, 3.0)
    assert torch.equal(ema.average["decoder.weight"], task.net.decoder.weight)
