"""Sampling whole scales with the key-value cache against two ways without: the ratios, measured in the same run.

python benchmarks/next_scale_sampling.py [--width 512 --depth 8 --batch 1 --runs 3]

The model has TokenFlow-t2i's layout: 131 positions of text and 817 codes in 9 scales. Without the cache a pass runs
either the sequence so far, or all positions (those of later scales hold zeros that nobody sees), as code of fixed
shapes does.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from vistok.generators.tokenflow_t2i import Config, TokenFlowT2I
from vistok.interfaces import SampleOptions, TextCondition
from vistok.rng import SampleRng
from vistok.tokens import MultiScale, TokenSpec

SIDES = (1, 2, 4, 6, 8, 10, 12, 14, 16)
ROUNDS = {"1 round": [[100, 1.0]], "2 rounds": [[100, 1.0], [10, 1.0]]}


class AllPositions(TokenFlowT2I):
    """Every pass runs all positions."""

    def _runner(self, there, contexts, cached):
        scales = []

        def run(x, is_first):
            if is_first:
                scales.append(x)
            so_far = torch.cat([*scales[:-1], x], dim=1)
            missing = self.front + self.spec.num_positions - so_far.shape[1]
            return self.backbone(F.pad(so_far, (0, 0, 0, missing)), there, contexts)[:, : so_far.shape[1]]

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("depth", 8), ("batch", 1), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    spec = TokenSpec(MultiScale(tuple((side, side) for side in SIDES)), (4096,), 40, 256)
    config = Config(args.width, args.depth, args.width // 64, 8 * args.width // 3)
    torch.manual_seed(0)
    model, slow = (kind(config, spec).to(args.device).eval() for kind in (TokenFlowT2I, AllPositions))
    torch.nn.init.normal_(model.head.weight, std=0.2)  # as sure as a trained model
    slow.load_state_dict(model.state_dict())
    states = torch.randn(args.batch, 64, args.width)
    text = torch.ones(args.batch, 64, dtype=torch.bool)
    condition = TextCondition(states, text, states[:1, :1], text[:1, :1])

    # Neighbours on a busy machine hardly change the seconds of a processor.
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def sample(model: TokenFlowT2I, use_cache: bool, rounds: list) -> tuple[float, torch.Tensor]:
        options = SampleOptions(cfg_scale=8.5, use_cache=use_cache, extra={"rounds": rounds})
        started = clock()
        tokens = model.generate(condition, options, SampleRng.from_seed(0, args.batch))
        ids = tokens.ids.cpu()
        return clock() - started, ids

    sample(model, True, [])
    print(f"next-scale {args.width} x {args.depth}, {spec.num_positions} codes, batch {args.batch}, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    ways = {"cached": (model, True), "sequence so far": (model, False), "all positions": (slow, False)}
    for name, rounds in ROUNDS.items():
        results = [{way: sample(*how, rounds) for way, how in ways.items()} for _ in range(args.runs)]
        seconds = {way: statistics.median(result[way][0] for result in results) for way in ways}
        same = all(torch.equal(result[way][1], result["cached"][1]) for result in results for way in ways)
        shown = (f"{way} {s:.2f} s ({s / seconds['cached']:.2f} x)" for way, s in seconds.items())
        print(f"{name}: {', '.join(shown)}; same ids: {same}")


if __name__ == "__main__":
    main()
