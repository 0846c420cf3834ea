"""Decoding images of several code lengths: one batch against one batch for each length, in the same run.

python benchmarks/mixed_lengths.py [--images 1 --steps 8 --runs 3]
"""

import argparse
import platform
import statistics
import time

import torch

from vistok.rng import SampleRng
from vistok.tokenizers.flextok import Config, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 1), ("steps", 8), ("runs", 3), ("width", 128), ("depth", 4), ("image-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"encoder_width": 64, "encoder_depth": 1, "decoder_width": args.width, "decoder_depth": args.depth}
    config = Config(image_size=args.image_size, patch_size=8, num_registers=128, head_dim=32, **sizes)
    model = build(config).to(args.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    lengths = [2**power for power in range(8)]
    count = args.images * len(lengths)
    codes = model.quantizer.decode(torch.randint(0, 64000, (count, 128))).to(args.device)
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

    timed(mixed), timed(separate)
    pairs = [(timed(mixed), timed(separate)) for _ in range(args.runs)]
    difference = max(float((one[1] - other[1]).abs().max()) for one, other in pairs)
    one_s, other_s = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
    print(f"decoder {args.width} x {args.depth}, {count} images of 8 lengths, {args.steps} steps, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"one batch            {one_s * 1e3:8.1f} ms   (median of {args.runs})")
    print(f"a batch per length   {other_s * 1e3:8.1f} ms")
    print(f"ratio                {other_s / one_s:8.2f} x   largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
