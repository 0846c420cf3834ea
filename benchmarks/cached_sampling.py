"""Cached against uncached sampling of the GPT: one ratio, both sides measured in the same run.

python benchmarks/cached_sampling.py [--width 512 --depth 8 --positions 256 --batch 4 --runs 3]
"""

import argparse
import platform
import statistics
import time

import torch

from vistok.generators.gpt import Config, build
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.rng import SampleRng
from vistok.tokens import Ordered1D, TokenSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("depth", 8), ("positions", 256), ("batch", 4), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    spec = TokenSpec(Ordered1D(args.positions), (1024,), 6, 256)
    config = Config(width=args.width, depth=args.depth, heads=args.width // 64, num_classes=10)
    model = build(config, spec).to(args.device).eval()
    torch.nn.init.normal_(model.adapter.head.weight, std=0.05)
    condition = ClassCondition(torch.arange(args.batch) % 10)

    def sample(use_cache: bool) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        tokens = model.generate(condition, SampleOptions(use_cache=use_cache), SampleRng.from_seed(0, args.batch))
        ids = tokens.ids.cpu()
        return time.perf_counter() - started, ids

    sample(True)
    pairs = [(sample(True), sample(False)) for _ in range(args.runs)]
    same = all(torch.equal(cached[1], uncached[1]) for cached, uncached in pairs)
    cached_s, uncached_s = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    print(f"GPT {args.width} x {args.depth}, {args.positions} positions, batch {args.batch}, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"cached   {cached_s:7.2f} s   (median of {args.runs})")
    print(f"uncached {uncached_s:7.2f} s")
    print(f"ratio    {uncached_s / cached_s:7.2f} x   same ids: {same}")


if __name__ == "__main__":
    main()
