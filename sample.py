"""Sample images from a generator, or reconstruct images with a tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from vistok import cli
from vistok.checkpoint import export_info, load_tokenizer
from vistok.config import parse_overrides
from vistok.data.datamodule import load_data
from vistok.errors import UserError
from vistok.eval.pictures import save_png
from vistok.eval.reconstruction import picture_reconstruction, prefix_lengths
from vistok.interfaces import NULL_CLASS, SampleOptions
from vistok.pipeline import load_models, sample_images, save_images

EXAMPLES = """examples:
  python sample.py --checkpoint runs/demo/generator --class 3 --count 16 --cfg-scale 2 --out samples/
  python sample.py --checkpoint runs/demo/tokenizer --images DIR --tokens 1,4,16 --out samples/
"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run or export folder")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples/")
    parser.add_argument("--tokens", metavar="K[,K...]", help="tokens of ordered codes (default: all, or powers of two)")
    parser.add_argument("--count", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on the seed and i alone (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    one = parser.add_argument_group("generator")
    one.add_argument("--class", dest="class_id", metavar="C", help="class number or name (default: all in turn)")
    one.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one the generator was trained on")
    one.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none (default: 1)")
    one.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest code (default: 1)")
    one.add_argument("--top-k", type=int, default=0, help="keep the k likeliest codes; 0 keeps all (default: 0)")
    one.add_argument("--top-p", type=float, default=1.0, help="keep this much probability; 1 keeps all (default: 1)")
    two = parser.add_argument_group("tokenizer")
    two.add_argument("--images", metavar="DATA", help="image folder (or digits, shapes, shards) to reconstruct")
    args = parser.parse_args()
    if args.count < 1 or args.batch_size < 1:
        raise UserError("--count and --batch-size must be at least 1")
    return args


def token_counts(text: str | None) -> list[int] | None:
    """Whole numbers between commas."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--tokens takes whole numbers such as 1,4,16, got {text!r}") from None


def reconstruct(args: argparse.Namespace) -> None:
    """Write a grid: one row for each image, the original and each number of tokens as columns."""
    if args.images is None:
        raise UserError(f"{args.checkpoint} holds a tokenizer: give the images to reconstruct with --images DIR")
    tokenizer = load_tokenizer(args.checkpoint, args.device)
    lengths = prefix_lengths(tokenizer.spec, token_counts(args.tokens))
    data = load_data(args.images, "val", tokenizer.spec.image_size_px)
    samples = [data.get(index, None) for index in range(min(args.count, len(data)))]
    picture = picture_reconstruction(tokenizer, samples, lengths, args.seed, parse_overrides(args.decode))
    save_png(picture, args.out / "reconstruction.png")
    print(f"{len(samples)} images, columns {lengths}: {args.out / 'reconstruction.png'}")


def generate(args: argparse.Namespace) -> None:
    """Write a grid, one PNG for each sample, and ``samples.npz``."""
    lengths = token_counts(args.tokens) or [None]
    if len(lengths) > 1:
        raise UserError("a generator takes one number of --tokens")
    options = SampleOptions(args.cfg_scale, args.temperature, args.top_k, args.top_p, lengths[0])
    generator, tokenizer, _ = load_models(args.checkpoint, args.tokenizer, args.device)
    names = export_info(args.checkpoint).get("class_names") or [str(c) for c in range(generator.num_classes)]
    class_ids = torch.arange(args.count) % generator.num_classes if names else torch.full((args.count,), NULL_CLASS)
    if args.class_id is not None:
        class_ids = torch.full((args.count,), class_number(args.class_id, names))
    with tqdm(total=args.count, desc="sample", unit="img", leave=False) as bar:
        images = sample_images(
            generator,
            tokenizer,
            class_ids,
            options,
            args.seed,
            args.batch_size,
            parse_overrides(args.decode),
            bar.update,
        )
    save_images(args.out, images, [names[c] if c >= 0 else "" for c in class_ids.tolist()])
    print(f"{args.count} samples: {args.out / 'grid.png'}, {args.out / 'samples.npz'}")


def class_number(text: str, names: list[str]) -> int:
    """The class that a number or a name stands for.

    Raises:
        UserError: if there is none.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"--class {text}: this generator knows 0..{len(names) - 1} ({', '.join(names[:10])})")


def main() -> None:
    """Parse the command line; what the checkpoint holds decides what happens."""
    args = parse()
    (generate if export_info(args.checkpoint)["kind"] == "generator" else reconstruct)(args)


if __name__ == "__main__":
    cli.main(main)
