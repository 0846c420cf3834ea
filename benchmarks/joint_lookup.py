"""Finding the entries of TokenFlow's two codebooks at every scale: our lookup against distances and one-hot codes.

python benchmarks/joint_lookup.py [--batch 4 --entries 32768 --runs 3]

The other side is what the published code computes at each scale: the squared distances of all vectors to all entries
of each codebook, their weighted sum, argmin, and the one-hot matrix of the result. Vectors are random, as many as
TokenFlow-XL's 15 scales have positions. Times are the shortest of all runs, so that other work on the machine
counts little. Memory is the growth of the peak of a fresh process (of the allocator on a GPU), output included.
"""

import argparse
import platform
import time

import torch
import torch.nn.functional as F
from memory import in_fresh_process, peak_bytes

from vistok.quantizers.shared_dual_vq import SharedDualCodebook

SCALES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27)


def by_distances(codebook: SharedDualCodebook, z: torch.Tensor) -> torch.Tensor:
    """Ids of the nearest entries as the published code finds them."""
    rows, vectors = codebook.rows(), codebook.normalize(z).flatten(0, 1)
    semantic, pixel = (
        part.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * part @ table.T
        for part, table in zip(vectors.split(codebook.widths, 1), rows.split(codebook.widths, 1))
    )
    ids = (semantic + 1.0 * pixel).argmin(1)
    F.one_hot(ids, codebook.vocab_size)
    return ids.view(z.shape[:2])


SIDES = {"lookup": SharedDualCodebook.nearest, "distances": by_distances}


def make(args: argparse.Namespace) -> tuple[SharedDualCodebook, list[torch.Tensor]]:
    """A codebook and the vectors of each scale."""
    torch.manual_seed(0)
    codebook = SharedDualCodebook(args.entries).requires_grad_(False).to(args.device)
    return codebook, [torch.randn(args.batch, side**2, codebook.dim).to(args.device) for side in SCALES]


def find(side: str, codebook: SharedDualCodebook, scales: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([SIDES[side](codebook, z) for z in scales], dim=1)


def timed(side: str, codebook: SharedDualCodebook, scales: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    find(side, codebook, scales)
    if scales[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def growth(side: str, args: argparse.Namespace) -> int:
    """How much the lookups add to the peak of this process; those of one position have loaded all code before."""
    codebook, scales = make(args)
    find(side, codebook, scales[:1])
    before = peak_bytes(args.device)
    find(side, codebook, scales)
    return peak_bytes(args.device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 4), ("entries", 32768), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    # First, because a process starts with the peak of its parent.
    memory = {side: in_fresh_process(growth, side, args) for side in SIDES}
    codebook, scales = make(args)
    ids = {side: find(side, codebook, scales) for side in SIDES}
    rounds = [{side: timed(side, codebook, scales) for side in SIDES} for _ in range(args.runs)]
    seconds = {side: min(each[side] for each in rounds) for side in SIDES}
    total = ids["lookup"].numel()
    print(f"{total} vectors of {codebook.dim}, {args.entries} entries, {args.device}, shortest of {args.runs}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for side in SIDES:
        faster, smaller = seconds["distances"] / seconds[side], memory["distances"] / max(memory[side], 1)
        print(
            f"{side:9s} {seconds[side] * 1e3:8.0f} ms ({faster:5.1f} x)   "
            f"{memory[side] / 1e6:7.1f} MB ({smaller:5.1f} x)"
        )
    differing = (ids["lookup"] != ids["distances"]).sum()
    print(f"vectors whose id differs: {differing} of {total}")


if __name__ == "__main__":
    main()
