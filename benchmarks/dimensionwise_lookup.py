"""Finding the nearest level of each channel: the quantizer's lookup against the distances to all levels.

python benchmarks/dimensionwise_lookup.py [--positions 16384 --channels 16 --levels 64 --runs 9]

The distances are what the published code computes: |x - level| for every value and level, then argmin. The search is
torch.searchsorted on the midpoints, which is what a lookup without a grid would be. Times are the shortest of all
runs, so that other work on the machine counts little. Memory is the growth of the peak of a fresh process (of the
allocator on a GPU), output included.
"""

import argparse
import platform
import time

import torch
from memory import in_fresh_process, peak_bytes

from vistok.quantizers.dimensionwise import DimensionwiseQuantizer

SIDES = {
    "lookup": lambda quantizer, x: quantizer.quantize(x),
    "search": lambda quantizer, x: torch.searchsorted(quantizer.midpoints, x.T.contiguous()).T,
    "distances": lambda quantizer, x: (x[..., None] - quantizer.levels).abs().argmin(-1),
}


def make(args: argparse.Namespace) -> tuple[DimensionwiseQuantizer, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = DimensionwiseQuantizer(args.channels, args.levels).to(args.device)
    return quantizer, torch.randn(args.positions, args.channels).to(args.device)


def timed(side: str, quantizer: DimensionwiseQuantizer, x: torch.Tensor) -> float:
    started = time.perf_counter()
    SIDES[side](quantizer, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def growth(side: str, args: argparse.Namespace) -> int:
    """How much one lookup adds to the peak of this process; a lookup of few values has loaded all code before."""
    quantizer, x = make(args)
    SIDES[side](quantizer, x[:64])
    before = peak_bytes(args.device)
    SIDES[side](quantizer, x)
    return peak_bytes(args.device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("positions", 16384), ("channels", 16), ("levels", 64), ("runs", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    # First, because a process starts with the peak of its parent.
    memory = {side: in_fresh_process(growth, side, args) for side in SIDES}
    quantizer, x = make(args)
    ids = {side: find(quantizer, x) for side, find in SIDES.items()}
    differing = int((ids["lookup"] != ids["distances"]).sum())
    rounds = [{side: timed(side, quantizer, x) for side in SIDES} for _ in range(args.runs)]
    seconds = {side: min(each[side] for each in rounds) for side in SIDES}
    print(f"{args.positions} x {args.channels} values, {args.levels} levels, {args.device}, shortest of {args.runs}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for side in SIDES:
        faster, smaller = seconds["distances"] / seconds[side], memory["distances"] / max(memory[side], 1)
        print(
            f"{side:9s} {seconds[side] * 1e3:8.2f} ms ({faster:6.1f} x)   "
            f"{memory[side] / 1e6:7.1f} MB ({smaller:5.1f} x)"
        )
    print(f"values whose level differs between lookup and distances: {differing} of {x.numel()}")


if __name__ == "__main__":
    main()
