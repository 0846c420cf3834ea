"""Make a trained continuous tokenizer discrete: fit a table of levels to each channel of its latents (TokenBridge).

Tables and order are fitted to the training split; what they cost is measured on the validation split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vistok import cli
from vistok.checkpoint import export, export_hash, export_info
from vistok.config import Component, parse_overrides, to_plain
from vistok.data.datamodule import Dataset, load_images
from vistok.errors import UserError
from vistok.eval.codebook import CodebookUsage
from vistok.eval.images import image_batches
from vistok.eval.protocol import number
from vistok.files import new_folder
from vistok.quantizers.dimensionwise import KL16_ORDER, TABLES, check_latents, spectral_order
from vistok.tokenizers.tokenbridge import Config, TokenBridge, build
from vistok.tokens import Grid2D

EXAMPLES = """examples:
  python -m vistok.discretize --tokenizer runs/digits/klvae --data digits --out runs/digits/tokenbridge --levels 16
  python -m vistok.discretize --tokenizer weights/kl16 --data DIR --out weights/tokenbridge_kl16 \\
                              --mode published --order published
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = cli.ArgumentParser(
        prog="python -m vistok.discretize",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="run or export folder of a continuous tokenizer")
    add("--out", type=Path, required=True, metavar="DIR", help="export folder to write")
    cli.add_data_flags(parser)
    add("--count", type=cli.positive_int, default=4096, metavar="N", help="images of each split (default: %(default)s)")
    add("--levels", type=int, default=64, metavar="B", help="levels of each channel (default: %(default)s)")
    add(
        "--components",
        type=cli.positive_int,
        metavar="K",
        help="quantize so many principal components instead of the channels (default: the channels)",
    )
    add(
        "--mode",
        choices=("published", *TABLES),
        default="gaussian",
        help="table of each channel; published is the paper's for latents of unit variance (default: %(default)s)",
    )
    add(
        "--order",
        choices=("spectral", "natural", "published"),
        default="spectral",
        help="of the slots: low spatial frequencies first, as the channels come, or the paper's for KL-16 "
        "(default: %(default)s)",
    )
    add("--cutoff", type=float, default=0.25, metavar="R", help="low frequencies, of Nyquist's (default: %(default)s)")
    add("--drop-dc", action="store_true", help="leave the mean of each channel out of the spectral order")
    add("--batch-size", type=cli.positive_int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=cli.usable_device, default=device, help="default: %(default)s")
    return parser.parse_args()


@cli.flag_for("data.args.", "--data-args ")
def main() -> None:
    """Fit, measure, print, export."""
    args = parse()
    with new_folder(args.out) as out:
        config = Config(str(args.tokenizer), export_hash(args.tokenizer), args.levels, args.components)
        bridge = build(config).to(args.device)
        size, data_args = bridge.spec.image_size_px, parse_overrides(args.data_args)
        train, val = (load_images(args.data, split, size, data_args) for split in ("train", "val"))
        fit(bridge, encode(bridge, train, args), args)
        table, held_out = costs(bridge, encode(bridge, val, args))
        details = {name: getattr(args, name) for name in ("mode", "order", "cutoff", "drop_dc")}
        extra = {
            "weights": export_info(args.tokenizer).get("weights", "unknown"),
            "fit": {**details, "images": min(args.count, len(train)), "data": train.description},
            "held_out": held_out,
        }
        component = Component("tokenbridge", to_plain(config))
        export(out, "tokenizer", component, bridge.spec, bridge.state_dict(), extra, bridge.frozen_helpers)
    console = Console()
    console.print(table)
    console.print(f"saved: {args.out}", highlight=False, soft_wrap=True)


@torch.no_grad()
def encode(bridge: TokenBridge, data: Dataset, args: argparse.Namespace) -> Float[Tensor, "M N C"]:
    """Latents of the first images of a data set, on the CPU."""
    count, tokenizer = min(args.count, len(data)), bridge.tokenizer.module
    latents = []
    with tqdm(total=count, desc="encode", unit="img", leave=False) as bar:
        for batch in image_batches(data, args.batch_size, args.workers, count):
            latents.append(tokenizer.encode(batch["image"].to(args.device)).cpu())
            bar.update(len(latents[-1]))
    return torch.cat(latents)


def fit(bridge: TokenBridge, latents: Float[Tensor, "M N C"], args: argparse.Namespace) -> None:
    """Set tables and order as the command line says.

    Raises:
        UserError: for latents that no table fits, or an order that they cannot have.
    """
    check_latents(latents)
    if args.components is not None:
        bridge.fit_components(latents)
        latents = bridge.project(latents.to(args.device)).cpu()
    if args.mode != "published":
        bridge.quantizer.fit(latents, args.mode)
    if args.order == "published":
        bridge.set_order(KL16_ORDER)
    elif args.order == "spectral":
        layout = bridge.spec.layout
        if not isinstance(layout, Grid2D):
            raise UserError(f"--order spectral needs latents on a grid, not {layout}: give --order natural")
        grids = latents.unflatten(1, (layout.height, layout.width))
        bridge.set_order(spectral_order(grids, args.cutoff, args.drop_dc))


def costs(bridge: TokenBridge, latents: Float[Tensor, "M N C"]) -> tuple[Table, dict[str, float]]:
    """What quantizing these latents costs: a table of the slots, and the means over them."""
    total = latents.var(dim=(0, 1)).sum()
    latents = bridge.cpu().project(latents)
    order, usage = bridge.order.tolist(), CodebookUsage(bridge.spec.vocab_sizes)
    quantizer = bridge.quantizer
    ids = quantizer.quantize(latents)
    usage.update(ids[..., order])
    entropy = usage.compute()
    mean, variance = latents.mean(dim=(0, 1)), latents.var(dim=(0, 1))
    mse = (quantizer.decode(ids) - latents).square().mean(dim=(0, 1))
    outside = ((latents < quantizer.levels[:, 0]) | (latents > quantizer.levels[:, -1])).float().mean(dim=(0, 1))
    title = f"{len(latents)} held-out images, {quantizer.num_levels} levels"
    if bridge.config.components is not None:
        title += f", {len(order)} components with {float(variance.sum() / total):.2%} of the variance"
    table = Table(title=title, title_justify="left")
    for column in ("slot", "channel", "mean", "std", "MSE", "MSE/variance", "bits", "beyond"):
        table.add_column(column, justify="right")
    for slot, channel in enumerate(order):
        bits = entropy.get(f"slot_{slot}/entropy_bits", entropy["entropy_bits"])
        figures = (mean, variance.sqrt(), mse, mse / variance)
        numbers = [number(float(figure[channel])) for figure in figures]
        table.add_row(str(slot), str(channel), *numbers, f"{bits:.2f}", f"{outside[channel]:.2%}")
    relative = float((mse / variance).mean())
    table.add_section()
    table.add_row("all", "", "", "", number(float(mse.mean())), number(relative), f"{entropy['entropy_bits']:.2f}", "")
    return table, {"mse": float(mse.mean()), "mse_over_variance": relative, "entropy_bits": entropy["entropy_bits"]}


if __name__ == "__main__":
    cli.main(main)
