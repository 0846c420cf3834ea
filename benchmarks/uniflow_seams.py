"""Seams of a patch-wise decoder: how much more a reconstruction errs across the borders of patches than inside them.

python benchmarks/uniflow_seams.py --checkpoints RUN [RUN ...] --data shapes [--data-args max_objects=1] [--count 500]

The error of a step is that of the difference between two neighbouring pixels: an offset of a whole patch does not
show in it, a patch that does not meet its neighbour does. The ratio is the mean absolute error of the steps across
borders to that of the steps inside patches; 1 is no seam.
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vistok import cli
from vistok.checkpoint import load_autoencoder
from vistok.config import parse_overrides
from vistok.data.datamodule import load_images
from vistok.eval.images import image_batches
from vistok.pipeline import decode_images, encode_images


def step_errors(error: Float[Tensor, "N 3 H W"], patch: int) -> tuple[float, float]:
    """Mean absolute error of the steps across borders and of those inside patches, along both axes."""
    across, inside = [], []
    for axis in (2, 3):
        steps = error.diff(dim=axis).abs()
        index = torch.arange(1, error.shape[axis])
        across.append(steps.index_select(axis, (index % patch == 0).nonzero().flatten()).mean())
        inside.append(steps.index_select(axis, (index % patch != 0).nonzero().flatten()).mean())
    return float(sum(across) / 2), float(sum(inside) / 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, metavar="DIR")
    cli.add_data_flags(parser)
    parser.add_argument("--count", type=int, default=500)
    args = parser.parse_args()
    print(f"{'checkpoint':>40}  PSNR, dB  across  inside  ratio")
    for folder in args.checkpoints:
        model = load_autoencoder(folder)
        data = load_images(args.data, "val", model.spec.image_size_px, parse_overrides(args.data_args))
        images = torch.cat([batch["image"] for batch in image_batches(data, 50, args.workers, args.count)])
        decoded = decode_images(model, encode_images(model, images, 50), seed=0, batch_size=50).float() / 127.5 - 1
        error = decoded - images
        across, inside = step_errors(error, model.encoder.patch_size)
        psnr = (-10 * (error.square().mean(dim=(1, 2, 3)) / 4).log10()).mean()
        print(f"{folder!s:>40}  {psnr:8.2f}  {across:.4f}  {inside:.4f}  {across / inside:.3f}")


if __name__ == "__main__":
    cli.main(main)
