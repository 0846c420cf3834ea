"""Encoding and guided decoding with FlexTok at a published size, random weights: time and peak memory of each stage.

python benchmarks/flextok_stages.py [--size d12-d12 --batch 2 --steps 25 --tokens 256 --precision 32]

Prints the floor beside each stage: its multiply-adds divided by the speed of a large matrix product, measured in the
same run.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vistok.rng import SampleRng
from vistok.tokenizers.flextok import Config, FlexTok

SIZES = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28)}


def matrix_product_tflops(device: str, dtype: torch.dtype) -> float:
    """Speed of a product of two square matrices of 2048, floating point operations a second / 1e12; best of five."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    best = min(timed(lambda: a @ a, device)[0] for _ in range(5))
    return 2 * 2048**3 / best / 1e12


def timed(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds and result."""
    started = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peak_gb(device: str) -> float:
    """Highest memory so far, GB: of the process, or of the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="d12-d12")
    for name, default in (("batch", 2), ("steps", 25), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    encoder, decoder = SIZES[args.size]
    sizes = {"encoder_depth": encoder, "encoder_width": 64 * encoder}
    sizes |= {"decoder_depth": decoder, "decoder_width": 64 * decoder}
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
    )
    model = FlexTok(Config(vae_scale=1.0, **sizes), vae).to(args.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if args.compile:
        model.encoder.compile()
        model.decoder.compile()
    dtype = {"32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    speed = {dtype: matrix_product_tflops(args.device, dtype), torch.float32: None}
    speed[torch.float32] = speed[torch.float32] or matrix_product_tflops(args.device, torch.float32)
    images = torch.rand(args.batch, 3, 256, 256, device=args.device) * 2 - 1
    keep = torch.full((args.batch,), args.tokens, device=args.device)
    noise = SampleRng.from_seed(0, args.batch).normal(16, 32, 32).to(args.device)
    print(f"FlexTok {args.size}, batch {args.batch}, {args.tokens} tokens, {args.steps} steps, guidance 7.5 with APG")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.precision}")
    print(f"matrix product: {', '.join(f'{key} {value:.3f} TFLOP/s' for key, value in speed.items())}")
    print(f"{'weights':>28} {peak_gb(args.device):22.2f} GB")

    def stage(name: str, run: Callable[[], Tensor], exact: bool, measured_steps: int = 1) -> Tensor:
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32 and not exact):
            if args.compile and not exact:
                run()
            seconds, result = timed(run, args.device)
            with FlopCounterMode(display=False) as counter:
                run()
        flops = counter.get_total_flops()
        floor = flops / speed[torch.float32 if exact else dtype] / 1e12
        print(
            f"{name:>28} {seconds:8.2f} s {peak_gb(args.device):10.2f} GB {flops / 1e12:8.3f} TFLOP  "
            f"floor {floor:7.2f} s  {floor / seconds:4.0%} of the speed of a matrix product"
        )
        return result

    latent = stage("VAE encode", lambda: model.encode_latent(images), exact=True)
    codes = stage("encoder and FSQ", lambda: model.encode(latent)[0], exact=False)
    sampled = stage(
        "guided decoder", lambda: model.sample_latent(noise, codes, keep, args.steps, 7.5, apg=True), exact=False
    )
    stage("VAE decode", lambda: model.decode_latent(sampled), exact=True)


if __name__ == "__main__":
    main()
