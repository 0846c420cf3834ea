"""UniFlow at its released size, random weights: encoding, the condition tower, and one step of every patch's flow.

python benchmarks/uniflow_stages.py [--image-size 448 --batch 1 --steps 1 --precision 32]

Prints the time of each stage as a share of timm's encoding of the same images, measured in the same run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vistok.rng import SampleRng
from vistok.tokenizers.uniflow import Config, build


def seconds_of(run: Callable[[], Tensor], device: str, repeats: int) -> float:
    """Best of ``repeats``, after one run to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("image-size", 448), ("batch", 1), ("steps", 1), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(Config(image_size=args.image_size)).to(args.device).eval()
    size = args.image_size
    images = torch.rand(args.batch, 3, size, size, device=args.device) * 2 - 1
    latents = model.encode(images)
    condition = model.tower(latents)
    noise = SampleRng.from_seed(0, args.batch).normal(3, size, size).to(args.device)
    stages = {
        "timm's encoder": lambda: model.encoder.model.forward_features(model.encoder.pixels(images)),
        "encode": lambda: model.encode(images),
        "condition tower": lambda: model.tower(latents),
        "flow of the patches": lambda: model.sample_pixels(noise, condition, args.steps),
        "decode": lambda: model.decode(latents, SampleRng.from_seed(0, args.batch), steps=args.steps),
    }
    print(f"UniFlow, {size} px, batch {args.batch}, {args.steps} step(s), {args.precision}")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    floor = None
    for name, run in stages.items():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            seconds = seconds_of(run, args.device, args.repeats)
            with FlopCounterMode(display=False) as counter:
                run()
        floor = floor or seconds
        print(f"{name:>20} {seconds:8.3f} s {counter.get_total_flops() / 1e12:7.3f} TFLOP {seconds / floor:6.2f}x")


if __name__ == "__main__":
    main()
