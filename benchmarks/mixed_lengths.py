"""Decoding images of eight code lengths as one batch, in the same run against a batch for each length.

python benchmarks/mixed_lengths.py [--images 1 --steps 8 --runs 3]

Batches for each length are timed twice: with equal registers merged, as this package decodes, and with all registers
in every pass, as published.
"""

import argparse
import platform
import statistics
import time
from unittest.mock import patch

import torch

from vistok.rng import SampleRng
from vistok.tokenizers.flextok import Config, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 64, "depth": 2, "image-size": 16, "patch-size": 4, "registers": 32}
    for name, default in ({"images": 1, "steps": 8, "runs": 5} | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    decoder = {"decoder_width": args.width, "decoder_depth": args.depth, "num_registers": args.registers}
    encoder = {"encoder_width": 64, "encoder_depth": 1, "head_dim": 32}
    model = build(Config(image_size=args.image_size, patch_size=args.patch_size, **encoder, **decoder))
    model = model.to(args.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    lengths = torch.linspace(1, args.registers, 8).round().long().tolist()
    count = args.images * len(lengths)
    codes = model.quantizer.decode(torch.randint(0, 64000, (count, args.registers))).to(args.device)
    keep = torch.tensor(lengths, device=args.device).repeat_interleave(args.images)

    def mixed() -> torch.Tensor:
        return model.decode(codes, SampleRng.from_seed(0, count), keep=keep, steps=args.steps)

    def separate() -> torch.Tensor:
        rows = [slice(start, start + args.images) for start in range(0, count, args.images)]
        streams = [SampleRng.from_seed(0, args.images, start=row.start) for row in rows]
        parts = zip(rows, streams)
        return torch.cat([model.decode(codes[row], rng, keep=keep[row], steps=args.steps) for row, rng in parts])

    def timed(decode) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        images = decode().cpu()
        return time.perf_counter() - started, images

    def published() -> torch.Tensor:
        with patch.object(model.decoder, "merge", lambda condition, distinct: (condition, None)):
            return separate()

    ways = {"one batch": mixed, "a batch per length": separate, "a batch per length, all registers": published}
    runs = [{name: timed(way) for name, way in ways.items()} for _ in range(1 + args.runs)][1:]
    seconds = {name: statistics.median(run[name][0] for run in runs) for name in ways}
    difference = max(float((run[name][1] - run["one batch"][1]).abs().max()) for run in runs for name in ways)
    print(f"decoder {args.width} x {args.depth}, {count} images of {lengths} tokens, {args.steps} steps, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for name, median in seconds.items():
        print(f"{name:>34} {median * 1e3:9.1f} ms {median / seconds['one batch']:6.2f} x   (median of {args.runs})")
    print(f"largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
