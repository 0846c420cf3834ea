"""What a log row says of speed: positions/s, and the share of a device's arithmetic."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_models.text import condition_for
from vistok.config import Component, build
from vistok.nn.attention import training_attention
from vistok.tokens import Grid2D, Ordered1D, Tokens, TokenSpec
from vistok.training import callbacks
from vistok.training.callbacks import throughput
from vistok.training.throughput import peak_flops

SIZE = {"width": 128, "depth": 3, "heads": 4, "num_classes": 10}
GRID = TokenSpec(Grid2D(8, 8), (96,), 4, 128)
CASES = {
    "codes": (GRID, {}),
    "windows": (GRID, {"shuffle": {"window": 2}}),
    "slots": (TokenSpec(Grid2D(4, 4), (5, 3, 8), 4, 64), {"head": {"width": 64, "depth": 2, "heads": 2}}),
    "ordered": (TokenSpec(Ordered1D(48), (96,), 4, 128), {"positions": "learned", "condition": "class_start"}),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_that_torch_counts(case):
    spec, args = CASES[case]
    net = build("generators", Component("gpt", {**SIZE, **args}), spec).train()
    tokens = Tokens(torch.zeros(2, spec.num_positions, spec.num_slots, dtype=torch.int64), spec)
    # The flash kernel of a CPU is unknown to the counter.
    with training_attention(torch.device("cpu")), FlopCounterMode(display=False) as counter:
        net(tokens, condition_for(net, 2), torch.Generator()).total.backward()
    assert 2 * net.train_flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_a_gpt_by_hand():
    net = build("generators", Component("gpt", SIZE), GRID)
    weights = 3 * (4 * 128**2 + 3 * 128 * 512) + 96 * 128  # 8/3 of the width, rounded up to 256
    assert net.train_flops == 64 * (6 * weights + 12 * 3 * 128 * 64)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_whole_words(name, peak):
    assert peak_flops(name) == peak


def test_a_row_has_the_share_of_the_peak_where_that_is_known(monkeypatch):
    net = build("generators", Component("gpt", SIZE), GRID)
    task = SimpleNamespace(net=net, device=torch.device("cuda"))

    def row(precision, name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return throughput(SimpleNamespace(world_size=4, precision=precision), task, images_per_s=1000.0)

    known = row("bf16-mixed", "NVIDIA A100-SXM4-80GB")
    assert known == {"images_per_s": 1000.0, "tokens_per_s": 64000.0, "mfu": 1000 * net.train_flops / (4 * 312e12)}
    speeds = {"images_per_s": 1000.0, "tokens_per_s": 64000.0}
    assert row("32-true", "NVIDIA A100-SXM4-80GB") == row("bf16-mixed", "a new one") == speeds
    task.device = torch.device("cpu")
    assert row("bf16-mixed", "NVIDIA A100-SXM4-80GB") == speeds


def test_the_progress_line_says_it():
    log = SimpleNamespace(latest={"train/loss": 2.0, "train/images_per_s": 10.0, "train/tokens_per_s": 640.0})
    line = callbacks.ProgressLine(log)
    assert "10 images/s, 640 tokens/s, " in line._numbers(torch.device("cpu"))
    log.latest["train/mfu"] = 0.413
    assert "640 tokens/s, MFU 41%, " in line._numbers(torch.device("cpu"))
