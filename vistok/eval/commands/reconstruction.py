"""``reconstruction``: measure a tokenizer on real images."""

from __future__ import annotations

import argparse
import time

from vistok.checkpoint import export_hash, export_info, load_autoencoder
from vistok.cli import flag_for, positive_int, token_counts
from vistok.config import parse_overrides
from vistok.data.datamodule import CheckableDataset, load_images
from vistok.eval import reconstruction, similarity
from vistok.eval.codebook import describe
from vistok.eval.commands.flags import add_measuring_flags, features_of, identity
from vistok.eval.commands.output import new_table, progress_bar, save, show
from vistok.eval.curves import curve_of, plot_by_tokens
from vistok.eval.fid import fid_notes
from vistok.eval.images import PixelHash, image_batches, unaugmented
from vistok.eval.processes import is_first
from vistok.eval.protocol import EvalProtocol
from vistok.pictures import save_png
from vistok.pipeline import prefix_lengths, read_decode_options

HELP = "PSNR, SSIM, rFID, LPIPS and codebook usage of a tokenizer, by tokens and steps"
EXAMPLES = (
    "python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data digits",
    "python -m vistok.eval reconstruction --checkpoint runs/demo/tokenizer --data DIR --features none",
    "python -m vistok.eval reconstruction --checkpoint runs/digits/flextok --data digits --steps 1,2,4,8",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    add_measuring_flags(parser, ("none",))
    parser.add_argument("--split", default="val", choices=("train", "val"), help="images to reconstruct (default: val)")
    parser.add_argument("--count", type=positive_int, help="how many of them (default: all)")
    parser.add_argument(
        "--tokens", type=token_counts, metavar="K,K,...", help="prefixes to decode (default: powers of two up to all)"
    )
    parser.add_argument(
        "--steps",
        type=token_counts,
        metavar="N,N,...",
        help="of a decoder that is a flow: also each of these, all tokens",
    )
    parser.add_argument(
        "--lpips", metavar="NET:FILE", help="alex:FILE or vgg:FILE, torchvision's weights of that network"
    )
    parser.add_argument(
        "--similarity",
        nargs="*",
        default=[],
        metavar="DIR",
        help="cosine of image features: folders of a CLIP or DINOv2 of transformers, or NAME=FILE of timm",
    )


@flag_for("data.args.", "--data-args ")
def run(args: argparse.Namespace) -> None:
    """Measure a tokenizer on real images."""
    started = time.perf_counter()
    tokenizer = load_autoencoder(args.checkpoint, args.device)
    lengths = prefix_lengths(tokenizer.spec, args.tokens)
    decode, steps = read_decode_options(tokenizer, args.decode), reconstruction.check_steps(tokenizer, args.steps)
    # All images of a folder without train/ and val/: here nothing needs to be held out.
    held_out = {"val": 1.0, "train": 0.0}[args.split]
    data_args = parse_overrides(args.data_args)
    dataset = load_images(args.data, args.split, tokenizer.spec.image_size_px, data_args, val_fraction=held_out)
    network = None if args.features == "none" else features_of(args)
    comparisons = [similarity.cosine(text, args.device) for text in args.similarity]
    if args.lpips:
        comparisons.insert(0, similarity.lpips(args.lpips, tokenizer.spec.image_size_px, args.device))
    count = min(args.count or len(dataset), len(dataset))
    checked, definitions = None, reconstruction.DEFINITIONS | {one.name: one.definition for one in comparisons}
    if isinstance(dataset, CheckableDataset):
        checked, definitions = dataset, definitions | dataset.agreement_definitions

    pixels = PixelHash()
    batches = image_batches(dataset, args.batch_size, args.workers, count, pixels=pixels)
    rows = reconstruction.variants(lengths, decode, steps)
    with progress_bar("reconstruct", count * len(rows)) as bar:
        metrics = reconstruction.measure_reconstruction(
            tokenizer,
            batches,
            network,
            lengths,
            args.seed,
            decode,
            args.device,
            checked,
            bar.update,
            steps,
            comparisons,
        )
    originals = pixels.reference("the originals")
    if not is_first():
        return
    shown = {sample["key"]: sample for sample in map(dataset.get, range(min(10, count)))}
    examples = reconstruction.decode_examples(tokenizer, list(shown.values()), rows, args.seed)

    protocol = EvalProtocol(
        task="reconstruction",
        data=unaugmented(dataset),
        split=dataset.description["split"],
        count=metrics["counts"]["images"],
        image_size_px=tokenizer.spec.image_size_px,
        quantised=True,
        weights={"tokenizer": export_info(args.checkpoint).get("weights", "unknown")},
        settings={"tokens": lengths, "decode": decode, **({"steps": steps} if steps else {})},
        seed=args.seed,
        features=identity(network),
        reference=originals,
        definitions=definitions,
        models={"tokenizer": export_hash(args.checkpoint)},
    )
    path = args.out / "reconstruction.json"
    save_png(reconstruction.picture_examples(rows, *examples), path.with_suffix(".png"))
    reconstruction.save_strips(reconstruction.strips_of(path), rows, *examples)
    notes = fid_notes(network, protocol.count, protocol.count) if network else []
    save(args, started, protocol, metrics, describe(metrics["codebook"]) + notes)
    if steps:
        plot_by_tokens(metrics["steps"], curve_of(path, "steps"), axis="steps")
        title = f"by number of steps, from {lengths[-1]} tokens"
        show(new_table(title, *reconstruction.table_by_steps(metrics)), [])
