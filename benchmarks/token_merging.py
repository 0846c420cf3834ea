"""Token merging in a ViT against the same model as timm runs it, and what matching and merging themselves cost.

python benchmarks/token_merging.py [--model vit_small_patch16_224 --batch 8 --r 8,13,16 --rounds 9 --threads 1]

Both sides take turns in one run; a ratio is that of the medians. A step is the mean of the keys over heads, the
matching and the merge of the tokens, at equal numbers of merges.
"""

import argparse
import statistics
import time
import warnings
from collections import defaultdict

import timm
import torch

from vistok.merging.matching import Matching
from vistok.merging.pitome import PiToMe
from vistok.merging.tome import ToMe
from vistok.merging.vit import METHODS, merge_tokens

HEADS, HEAD_DIM = 6, 64


class Timed:
    """A method that takes the time of its matchings and of what they do to the tokens."""

    def __init__(self, method) -> None:
        self.method, self.seconds = method, 0.0

    def match(self, metric, r, prefix, layer, depth) -> "TimedMatching":
        started = time.perf_counter()
        matching = self.method.match(metric, r, prefix, layer, depth)
        self.seconds += time.perf_counter() - started
        return TimedMatching(self, matching)


class TimedMatching:
    def __init__(self, timed: Timed, matching: Matching) -> None:
        self.timed, self.matching = timed, matching

    def merge(self, x, size):
        started = time.perf_counter()
        merged = self.matching.merge(x, size)
        self.timed.seconds += time.perf_counter() - started
        return merged

    @property
    def slots(self):
        started = time.perf_counter()
        slots = self.matching.slots
        self.timed.seconds += time.perf_counter() - started
        return slots


def in_turns(runs, rounds: int) -> dict[str, float]:
    """Median seconds of each, measured one after the other ``rounds`` times."""
    seconds = defaultdict(list)
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def whole_model(args) -> None:
    model = timm.create_model(args.model).eval()
    images = torch.randn(args.batch, 3, *model.patch_embed.img_size)
    timed = {f"{name} r={r}": (Timed(METHODS[name]), r) for name in ("tome", "pitome") for r in args.r}

    def merged(method, r):
        def run():
            with merge_tokens(model, method, r=r):
                started = time.perf_counter()
                model(images)
                totals[method, r].append(time.perf_counter() - started)
                shares[method, r].append(method.seconds / totals[method, r][-1])
                method.seconds = 0.0

        return run

    totals, shares = defaultdict(list), defaultdict(list)
    runs = {"timm": lambda: model(images)} | {name: merged(*setting) for name, setting in timed.items()}
    base = in_turns(runs, args.rounds)["timm"]
    print(f"{args.model}, batch {args.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'timm':16s} {args.batch / base:7.2f} images/s")
    for name, setting in timed.items():
        total, share = statistics.median(totals[setting]), statistics.median(shares[setting])
        print(f"{name:16s} {args.batch / total:7.2f} images/s  {base / total:5.2f} x  matching and merging {share:.1%}")


def one_step(tokens: int, args) -> None:
    r = tokens // 10
    centres, nearest = torch.randn(8, HEAD_DIM), torch.randint(0, 8, (args.batch, 1, tokens))
    keys = centres[nearest] + 0.7 * torch.randn(args.batch, HEADS, tokens, HEAD_DIM)
    x = torch.randn(args.batch, tokens, HEADS * HEAD_DIM)
    methods = {"tome": ToMe(), "pitome": PiToMe(), "pitome_deit": PiToMe(0.75, "elu")}
    metric = keys.mean(1)
    runs = {}
    for name, method in methods.items():
        runs[name, "matching"] = lambda method=method: method.match(metric, r, 1, 3, 12)
        runs[name, "step"] = lambda method=method: method.match(keys.mean(1), r, 1, 3, 12).merge(x)
    seconds = in_turns(runs, 4 * args.rounds)
    print(f"{tokens} tokens, {r} merges, ms per image (times ToMe's)")
    for name in methods:
        parts = [
            f"{part} {1e3 * seconds[name, part] / args.batch:.3f} ({seconds[name, part] / seconds['tome', part]:.2f} x)"
            for part in ("matching", "step")
        ]
        print(f"{name:16s} {'  '.join(parts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=lambda text: [int(part) for part in text.split(",")], default=[8, 13, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*was asked to merge")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        whole_model(args)
        for tokens in (197, 577):
            one_step(tokens, args)


if __name__ == "__main__":
    main()
