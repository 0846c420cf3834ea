"""Token-Shuffle against one code for each position: sampling time and memory of attention, both sides in one run.

python benchmarks/token_shuffle.py [--side 32 --windows 1,2,4 --width 384 --depth 6 --batch 2 --cfg-scale 2 --runs 2]

Memory of attention, by what is really held: keys and values at the end of a sampling, and what a training pass keeps
for its backward pass inside the attentions, where all weights are written down (``SDPBackend.MATH``).
"""

import argparse
import time
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok.generators import gpt
from vistok.generators.gpt import GPT, Config, build
from vistok.generators.token_shuffle import Config as ShuffleConfig
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.nn.attention import KVCache
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, Tokens, TokenSpec

UNITS = ("s", "MiB", "MiB")


def make(args: argparse.Namespace, window: int) -> GPT:
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(args.side, args.side), (args.codes,), 8, 16 * args.side)
    heads = args.width // 64
    config = Config(args.width, args.depth, heads, num_classes=10, shuffle=ShuffleConfig(window))
    return build(config, spec).to(args.device).eval()


def sample(model: GPT, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds, and bytes of keys and values."""
    caches: list[KVCache] = []
    condition, rng = ClassCondition(torch.arange(args.batch) % 10), SampleRng.from_seed(0, args.batch)
    with patch.object(gpt, "KVCache", lambda *sizes, **more: caches.append(KVCache(*sizes, **more)) or caches[-1]):
        started = time.perf_counter()
        model.generate(condition, SampleOptions(cfg_scale=args.cfg_scale), rng).ids.cpu()
        seconds = time.perf_counter() - started
    return seconds, sum(store.nbytes for cache in caches for store in cache._store if store is not None)


def kept_for_backward(model: GPT, args: argparse.Namespace) -> int:
    """Bytes that the attentions of one training pass keep."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if inside and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    inside: list[bool] = []
    alive: list[torch.Tensor] = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda *_: inside.append(True))
        block.attention.register_forward_hook(lambda *_: inside.clear())
    ids = torch.zeros(args.batch, args.side**2, 1, dtype=torch.int64, device=args.device)
    condition = ClassCondition(torch.arange(args.batch, device=args.device) % 10)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        model.loss(Tokens(ids, model.spec), condition, torch.Generator(args.device))
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"side": 32, "codes": 1024, "width": 384, "depth": 6, "batch": 2, "runs": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--windows", default="1,2,4")
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    models = {int(window): make(args, int(window)) for window in args.windows.split(",")}
    # In turn, so that whatever else the machine does meets all of them.
    rounds = [{window: sample(model, args) for window, model in models.items()} for _ in range(args.runs)]
    print(
        f"GPT {args.width} x {args.depth}, {args.side} x {args.side} codes, batch {args.batch}, {args.device}, ", end=""
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("window  positions  parameters       sampling        keys, values     kept for backward")
    first: list[float] = []
    for window, model in models.items():
        times, (cached, *_) = zip(*(one[window] for one in rounds))
        figures = [min(times), cached / 2**20, kept_for_backward(model, args) / 2**20]
        first = first or figures
        columns = " ".join(f"{new:8.2f} {unit:3} {old / new:5.1f}x" for new, unit, old in zip(figures, UNITS, first))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{window:6} {model.adapter.num_positions:10} {parameters:9.1f} M {columns}")


if __name__ == "__main__":
    main()
