"""``python -m vistok.merging``: what token merging does to a vision transformer's speed and answers."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vistok.cli import ArgumentParser, add_data_flags, flag_for, main, positive_int, token_counts, usable_device
from vistok.config import parse_overrides
from vistok.data.datamodule import load_images, make_loader, ordered_batches
from vistok.errors import UserError
from vistok.merging.flops import count_macs
from vistok.merging.vit import METHODS, Merging, apply, remove
from vistok.nn.vision_teacher import VisionTower, load_model

console = Console()

EXAMPLES = """examples:
  python -m vistok.merging benchmark --model vit_small_patch16_224 --r 8,13,16
  python -m vistok.merging benchmark --model vit_small_patch16_224 --methods tome,pitome,random --ratio 0.9,0.95
  python -m vistok.merging benchmark --model deit_small_patch16_224 --weights timm/deit_small_patch16_224.fb_in1k \\
      --data DIR --methods tome,pitome --r 13 --inflection=-1
"""


@dataclass
class Setting:
    """One row of the table."""

    name: str
    merging: dict[str, Any] | None
    tokens: int = 0
    gmacs: float = 0.0
    seconds: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@flag_for("data.args.", "--data-args ")
def run_benchmark(args: argparse.Namespace) -> None:
    """Measure merging settings against the unmerged model."""
    if not (args.r or args.ratio):
        raise UserError("nothing to measure: give --r or --ratio")
    torch.manual_seed(args.seed)
    model = load_model(args.model, args.weights).to(args.device).eval()
    settings = [Setting("unmerged", None)]
    for method in args.methods:
        settings += [
            Setting(f"{method} r={r}", {"method": method, "r": r, "inflection": args.inflection}) for r in args.r
        ]
        settings += [Setting(f"{method} ratio={ratio:g}", {"method": method, "ratio": ratio}) for ratio in args.ratio]
    for setting in settings:  # what cannot be measured is told before anything is
        _apply(model, setting)
        remove(model)
    tower = VisionTower(model).to(args.device)
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(f"{args.model} reads images of {height} x {width} px: only square ones can be measured")
    dataset = load_images(args.data, "val", height, parse_overrides(args.data_args), val_fraction=1.0)
    loader = make_loader(dataset, ordered_batches(min(args.count, len(dataset)), args.batch_size), args.workers)
    batches = [tower.pixels(batch["image"].to(args.device)) for batch in loader]

    with torch.inference_mode(), torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
        for setting in tqdm(settings, desc="answers", unit="setting"):
            _answers(model, setting, batches)
        # In turns, so that whatever else the machine does meets all of them alike.
        for _ in tqdm(range(args.rounds), desc="speed", unit="round"):
            for setting in settings:
                _time(model, setting, batches[0])
    _print(args, model, settings, sum(map(len, batches)))


def _apply(model: Any, setting: Setting) -> Merging | None:
    return apply(model, **setting.merging) if setting.merging else None


def _answers(model: Any, setting: Setting, batches: list[Float[Tensor, "B 3 H W"]]) -> None:
    merging = _apply(model, setting)
    setting.gmacs = count_macs(model, batches[0][:1]) / 1e9
    for pixels in batches:
        tokens = model.forward_features(pixels)
        setting.features.append(model.forward_head(tokens, pre_logits=True).float())
        setting.logits.append(model.forward_head(tokens).float())
        setting.tokens = merging.lengths[-1] if merging else tokens.shape[1]
    remove(model)


def _time(model: Any, setting: Setting, pixels: Float[Tensor, "B 3 H W"]) -> None:
    _apply(model, setting)
    model(pixels)  # the caches hold another setting
    _wait(pixels)
    started = time.perf_counter()
    model(pixels)
    _wait(pixels)
    setting.seconds.append((time.perf_counter() - started) / len(pixels))
    remove(model)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _print(args: argparse.Namespace, model: Any, settings: list[Setting], count: int) -> None:
    table = Table(title=f"{args.model}, batches of {args.batch_size} on {args.device}", title_justify="left")
    for column in ("", "tokens out", "GMACs", "images/s", "speed", "same top-1", "cosine"):
        table.add_column(column, justify="right" if column else "left")
    base = settings[0]
    seconds = {setting.name: statistics.median(setting.seconds) for setting in settings}
    features, logits = torch.cat(base.features), torch.cat(base.logits)
    for setting in settings:
        same = (torch.cat(setting.logits).argmax(1) == logits.argmax(1)).float().mean().item()
        cosine = torch.cosine_similarity(torch.cat(setting.features), features).mean().item()
        table.add_row(
            setting.name,
            str(setting.tokens),
            f"{setting.gmacs:.2f}",
            f"{1 / seconds[setting.name]:.1f}",
            f"{seconds[base.name] / seconds[setting.name]:.2f}",
            f"{same:.1%}" if model.num_classes else "-",
            f"{cosine:.4f}",
        )
    # Wider than the terminal rather than with digits cut off.
    table.width = Measurement.get(console, console.options.update(width=1000), table).maximum
    console.print(table, crop=False)
    notes = [
        f"speed: times that of the unmerged model with timm's fused attention; median of {args.rounds} rounds in turns,"
        f" {torch.get_num_threads()} threads, torch {torch.__version__}",
        f"same top-1 and cosine of the pooled features: against the unmerged model on {count} images of {args.data}",
    ]
    if args.weights is None:
        notes.append(f"weights drawn with seed {args.seed}: what answers agree on says nothing about a trained model")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def build_parser() -> argparse.ArgumentParser:
    """All commands of this module."""
    parser = ArgumentParser(
        prog="python -m vistok.merging", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    text = "tokens, GMACs, images/s and agreement of merging settings against the unmerged model"
    one = commands.add_parser(
        "benchmark",
        help=text,
        description=text,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.set_defaults(run=run_benchmark)
    one.add_argument("--model", required=True, metavar="NAME", help="a vision transformer of timm")
    one.add_argument(
        "--weights", metavar="FILE", help="its weights, or a repository of the hub (default: drawn with --seed)"
    )
    one.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=["tome", "pitome", "random"],
        metavar="M,M,...",
        help=f"of {', '.join(METHODS)} (default: tome,pitome,random)",
    )
    one.add_argument("--r", type=token_counts, default=[], metavar="R,R,...", help="merges in every block")
    one.add_argument(
        "--ratio", type=_shares, default=[], metavar="Q,Q,...", help="share of the patches that every block keeps"
    )
    one.add_argument(
        "--inflection",
        type=float,
        default=0.0,
        metavar="X",
        help="bends --r over depth: -1 merges most in the first blocks, 1 in the last (default: 0, constant)",
    )
    add_data_flags(one, default="photos")
    one.add_argument("--count", type=positive_int, default=64, help="images to compare answers on (default: 64)")
    one.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="default: %(default)s")
    one.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="timings each (default: %(default)s)")
    one.add_argument("--device", type=usable_device, default="cpu", help="default: %(default)s")
    one.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    one.add_argument("--seed", type=int, default=0, help="of fresh weights (default: %(default)s)")
    return parser


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.9,0.95, got {text!r}") from None


def run() -> None:
    """Parse the command line and do what it says."""
    args = build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main(run)
