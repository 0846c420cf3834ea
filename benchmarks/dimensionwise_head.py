"""The dimension-wise head with its key-value cache against feeding the prefix again: one ratio, both in the same run.

python benchmarks/dimensionwise_head.py [--width 1024 --depth 4 --slots 16 --levels 64 --rows 64 --runs 5]
"""

import argparse
import platform
import statistics
import time

import torch

from vistok.generators.dimensionwise_head import Config, DimensionwiseHead
from vistok.generators.sampling import Picker
from vistok.interfaces import SampleOptions
from vistok.tokens import Grid2D, TokenSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("width", 1024), ("depth", 4), ("heads", 8), ("slots", 16), ("levels", 64), ("rows", 64), ("runs", 5))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(16, 16), (args.levels,) * args.slots, args.slots, 256)
    head = DimensionwiseHead(spec, args.width, Config(args.width, args.depth, args.heads)).to(args.device).eval()
    for parameter in head.parameters():  # a fresh head is uniform
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    features = torch.randn(args.rows, args.width, device=args.device)
    uniform = torch.rand(args.rows, 1, args.slots, device=args.device)

    @torch.no_grad()
    def sample(use_cache: bool) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        ids = head.sample(features, uniform, Picker(SampleOptions(use_cache=use_cache), 1.0)).cpu()
        return time.perf_counter() - started, ids

    sample(True)
    pairs = [(sample(True), sample(False)) for _ in range(args.runs)]
    same = all(torch.equal(cached[1], uncached[1]) for cached, uncached in pairs)
    cached_ms, uncached_ms = (1000 * statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    print(f"head {args.width} x {args.depth}, {args.slots} slots of {args.levels}, {args.rows} tokens, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"cached      {cached_ms:8.1f} ms  ({args.slots} slot passes a token, median of {args.runs})")
    print(f"prefix again{uncached_ms:8.1f} ms  ({args.slots * (args.slots + 1) // 2} slot passes)")
    print(f"ratio       {uncached_ms / cached_ms:8.2f} x   same ids: {same}")


if __name__ == "__main__":
    main()
