"""Token merging while a tokenizer encodes: speed against reconstruction.

python benchmarks/merging_tokenizers.py --checkpoints RUN [RUN ...] --data digits [--ratios 0.9,0.8,0.7 --rounds 5]
python benchmarks/merging_tokenizers.py --untrained flextok tokenflow uniflow [--batch 1 --rounds 3]

Checkpoints are measured on held-out images: the speed of encoding, PSNR, and the share of ids that stay the same.
Untrained models have the published size and are measured for speed alone, on noise; FlexTok without its VAE, reading
32 px in pixels, so that its encoder sees as many patches as it does of a latent. Speed is that of the whole encoder,
parts that do not merge included, in processor time on one thread, all settings in turns.
"""

import argparse
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vistok import cli
from vistok.checkpoint import load_autoencoder
from vistok.config import Component, build, parse_overrides
from vistok.data.datamodule import load_images
from vistok.eval.images import image_batches
from vistok.eval.reconstruction import psnr
from vistok.interfaces import Autoencoder
from vistok.merging.vit import merge_tokens
from vistok.pictures import to_uint8
from vistok.pipeline import decode_images, encode_images
from vistok.tokens import Tokens

PUBLISHED = {"flextok": {"image_size": 32}, "tokenflow": {}, "uniflow": {}}


def merging(model: Autoencoder, setting: tuple[str, float] | None):
    return nullcontext() if setting is None else merge_tokens(model, setting[0], ratio=setting[1])


@torch.no_grad()
def measure(name: str, model: Autoencoder, images: Float[Tensor, "N 3 H W"], args: argparse.Namespace) -> None:
    """Print one line for each setting."""
    settings = [None, *((method, ratio) for method in args.methods for ratio in args.ratios)]
    with merge_tokens(model, r=0) as unmerged:
        lengths = {None: unmerged.lengths[-1]}
    first, qualities = None, {}
    for setting in settings if args.checkpoints else ():
        with merging(model, setting):
            code = encode_images(model, images, args.batch)
        decoded = decode_images(model, code, seed=0, batch_size=args.batch)
        qualities[setting] = f"{psnr(to_uint8(images), decoded).mean():8.2f}"
        if isinstance(code, Tokens):
            first = code.ids if first is None else first
            qualities[setting] += f"  {(code.ids == first).float().mean():8.1%}"
    encode_images(model, images[:1], 1)  # the first pass of a process is slow
    seconds = defaultdict(list)
    for _ in range(args.rounds):
        for setting in settings:
            with merging(model, setting) as merged:
                started = time.process_time()
                encode_images(model, images, args.batch)
                seconds[setting].append(time.process_time() - started)
                lengths.setdefault(setting, merged and merged.lengths[-1])
    base = statistics.median(seconds[None])
    print(f"\n{name}: {len(images)} images in batches of {args.batch}, torch {torch.__version__}, one thread")
    print("method    ratio  tokens  images/s  speed  PSNR, dB  same ids")
    for setting in settings:
        method, ratio = setting or ("unmerged", 1.0)
        spent = statistics.median(seconds[setting])
        print(
            f"{method:8s}  {ratio:5.2f}  {lengths[setting]:6d}  {len(images) / spent:8.2f}  {base / spent:4.2f}x  "
            f"{qualities.get(setting, '')}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoints", type=Path, nargs="+", metavar="DIR", default=[])
    which.add_argument("--untrained", choices=PUBLISHED, nargs="+", default=[])
    cli.add_data_flags(parser, default="digits")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["tome", "pitome", "random"])
    parser.add_argument(
        "--ratios", type=lambda text: [float(part) for part in text.split(",")], default=[0.9, 0.8, 0.7]
    )
    for name, default in (("count", 297), ("batch", 99), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.checkpoints:
        model = load_autoencoder(folder)
        data = load_images(args.data, "val", model.spec.image_size_px, parse_overrides(args.data_args))
        batches = image_batches(data, args.batch, args.workers, args.count)
        measure(str(folder), model, torch.cat([batch["image"] for batch in batches]), args)
    for name in args.untrained:
        torch.manual_seed(0)
        model = build("tokenizers", Component(name, PUBLISHED[name])).eval()
        side = model.spec.image_size_px
        measure(f"{name}, untrained", model, torch.rand(args.batch, 3, side, side) * 2 - 1, args)


if __name__ == "__main__":
    cli.main(main)
