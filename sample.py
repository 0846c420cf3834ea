"""Sample images from a generator, or reconstruct images with a tokenizer."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import torch
from tqdm import tqdm

from vistok import cli
from vistok.checkpoint import export_info, load_autoencoder, load_text_encoder
from vistok.data.datamodule import load_images
from vistok.errors import UserError
from vistok.interfaces import NULL_CLASS, ClassCondition, Condition, Generator, SampleOptions
from vistok.pictures import prefix_grid, save_images, save_png, to_uint8
from vistok.pipeline import (
    decode_prefixes,
    encode_images,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_sample_options,
    sample_images,
)

EXAMPLES = """writes for a generator:
  OUT/grid.png  OUT/00000.png ...  OUT/samples.npz (uint8 arr_0, N x H x W x 3, for FID evaluators)
and for a tokenizer:
  OUT/reconstruction.png, and grid.png, 00000.png ... and samples.npz in OUT/original/, OUT/tokens_004/ ...

examples:
  python sample.py --checkpoint runs/demo/generator --class 3 --count 16 --cfg-scale 2 --top-p 0.95 --out samples/
  python sample.py --checkpoint runs/t2i/generator --prompt "a small red circle" --count 4 --cfg-scale 3
  python sample.py --checkpoint runs/demo/tokenizer --images DIR --tokens 1,4,16 --out reconstructions/
"""
SAMPLING = ("cfg_scale", "temperature", "top_k", "top_p")
FLAGS_OF = {
    "generator": ("class", "prompt", "negative_prompt", "tokenizer", "text_encoder", "sampling", *SAMPLING),
    "tokenizer": ("images", "on_error"),
}


def parse() -> argparse.Namespace:
    """The command line; flags of one kind of model are None where they are not given."""
    parser = cli.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run or export folder")
    add("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples/")
    add("--tokens", type=cli.token_counts, metavar="K[,K...]", help="of ordered codes (default: all, or 1, 2, 4, ...)")
    add("--count", type=cli.positive_int, default=16, metavar="N", help="images (default: 16)")
    add("--seed", type=int, default=0, metavar="N", help="image i depends on seed and i alone (default: 0)")
    add("--batch-size", type=cli.positive_int, default=64, metavar="N", help="images at a time (default: 64)")
    add("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=cli.usable_device, default=device, help="default: %(default)s")
    add("--precision", choices=("32", "bf16"), default="32", help="bf16 computes under autocast (default: 32)")
    add = parser.add_argument_group("for a generator").add_argument
    add("--class", metavar="C", help="class number or name (default: all in turn)")
    add("--prompt", metavar="TEXT", help='what a generator conditioned on text shall show; "" is anything')
    add("--negative-prompt", metavar="TEXT", help='what guidance leads away from (default: "", the empty text)')
    add("--tokenizer", type=Path, metavar="DIR", help="default: the one that the generator was trained on")
    add("--text-encoder", type=Path, metavar="DIR", help="default: the one that the generator was trained with")
    add("--cfg-scale", type=float, metavar="S", help="guidance scale; 1 is none (default: 1)")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest code (default: 1)")
    add("--top-k", type=int, metavar="K", help="keep the k likeliest codes; 0 keeps all (default: 0)")
    add("--top-p", type=float, metavar="P", help="keep this much probability; 1 keeps all (default: 1)")
    add("--sampling", nargs="*", metavar="key=value", help="options of this kind of generator, such as steps=64")
    add = parser.add_argument_group("for a tokenizer").add_argument
    add(
        "--images",
        metavar="DATA",
        help="image folder (its val/ if it has one, else all of it), shards, digits or shapes",
    )
    add("--on-error", choices=("stop", "skip"), help="unreadable images (default: stop)")
    return parser.parse_args()


def generate(args: argparse.Namespace) -> None:
    """Write a grid, one PNG for each sample, and ``samples.npz``."""
    flags = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    SampleOptions(**flags)  # refuses bad values before anything is loaded
    generator, tokenizer, _ = load_models(args.checkpoint, args.tokenizer, args.device)
    if args.tokens is not None:
        if len(args.tokens) > 1:
            raise UserError(f"--tokens: a generator takes one number, got {len(args.tokens)}")
        (flags["num_tokens"],) = prefix_lengths(generator.spec, args.tokens)
    condition, labels = (texts if generator.text_width else classes)(args, generator)
    decode = read_decode_options(tokenizer, args.decode)
    flags["extra"] = read_sample_options(generator, args.sampling or [])
    with tqdm(total=args.count, desc="sample", unit="img", leave=False) as bar:
        images = sample_images(
            generator, tokenizer, condition, SampleOptions(**flags), args.seed, args.batch_size, decode, bar.update
        )
    save_images(args.out, images, labels)
    print(f"{args.count} samples: {args.out / 'grid.png'}, {args.out / 'samples.npz'}")


def classes(args: argparse.Namespace, generator: Generator) -> tuple[Condition, list[str]]:
    """``--class`` for each sample, or all classes in turn; and their names.

    Raises:
        UserError: for an unknown class, or flags of a generator conditioned on text.
    """
    if any(given is not None for given in (args.prompt, args.negative_prompt, args.text_encoder)):
        raise UserError(
            "--prompt, --negative-prompt and --text-encoder are for a generator conditioned on text, "
            f"that in {args.checkpoint} is not: give --class"
        )
    names = export_info(args.checkpoint).get("class_names") or []
    names += [str(number) for number in range(len(names), generator.num_classes)]
    wanted = getattr(args, "class")
    class_ids = torch.arange(args.count) % len(names) if names else torch.full((args.count,), NULL_CLASS)
    if wanted is not None:
        class_ids = torch.full((args.count,), class_number(wanted, names))
    return ClassCondition(class_ids), [names[number] if number >= 0 else "" for number in class_ids.tolist()]


def texts(args: argparse.Namespace, generator: Generator) -> tuple[Condition, list[str]]:
    """``--prompt`` for each sample, as the text encoder sees it; and as a label.

    Raises:
        UserError: if there is none, for ``--class``, or if the text encoder is missing.
    """
    if getattr(args, "class") is not None or args.prompt is None:
        raise UserError(f"the generator in {args.checkpoint} is conditioned on text: give --prompt TEXT, no --class")
    encoder = load_text_encoder(args.checkpoint, args.text_encoder, args.device)
    same = torch.zeros(args.count, dtype=torch.int64)
    condition = encoder.encode([args.prompt])
    if args.negative_prompt is not None:
        negative = encoder.encode([args.negative_prompt])
        condition = replace(condition, null_states=negative.states, null_mask=negative.mask)
    return condition[same], [shorten(args.prompt, 60)] * args.count


@cli.flag_for("data.args.on_error=", "--on-error ")
def reconstruct(args: argparse.Namespace) -> None:
    """Write a grid (rows are images, columns the original and numbers of tokens), and each column as files."""
    if args.images is None:
        raise UserError(f"{args.checkpoint} holds a tokenizer: give the images to reconstruct with --images DIR")
    tokenizer = load_autoencoder(args.checkpoint, args.device)
    lengths, decode = prefix_lengths(tokenizer.spec, args.tokens), read_decode_options(tokenizer, args.decode)
    size = tokenizer.spec.image_size_px
    data = load_images(args.images, "val", size, val_fraction=1.0, on_error=args.on_error or "stop")
    # By key, because the next image stands in for one that is skipped.
    found = {sample["key"]: sample["image"] for sample in map(data.get, range(min(args.count, len(data))))}
    images = torch.stack(list(found.values()))
    with tqdm(total=len(images) * len(lengths), desc="reconstruct", unit="img", leave=False) as bar:
        tokens = encode_images(tokenizer, images, args.batch_size)
        decoded = decode_prefixes(tokenizer, tokens, lengths, args.seed, args.batch_size, decode, bar.update)
    originals, unlabelled = to_uint8(images), [""] * len(images)
    save_images(args.out / "original", originals, unlabelled)
    for length, column in decoded.items():
        save_images(args.out / f"tokens_{length:03d}", column, unlabelled)
    save_png(prefix_grid(originals, decoded, list(found)), args.out / "reconstruction.png")
    print(f"{len(images)} images, columns {lengths}: {args.out / 'reconstruction.png'}")


def class_number(text: str, names: list[str]) -> int:
    """The class that a name or a number stands for.

    Raises:
        UserError: if there is none.
    """
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    if not names:
        raise UserError(f"--class {text}: this generator was trained without classes")
    close = difflib.get_close_matches(text, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"--class {text}: no such class; there are 0..{len(names) - 1} ({', '.join(names[:10])}){hint}")


def check_writable(folder: Path) -> None:
    """Raise UserError if files could not be written to ``folder``, before time is spent on them."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--out: cannot write to {folder}: {existing} is no folder that you may write to")


def main() -> None:
    """Parse the command line; what the checkpoint holds decides what happens."""
    args = parse()
    kind = export_info(args.checkpoint)["kind"]
    other = "tokenizer" if kind == "generator" else "generator"
    if foreign := [name for name in FLAGS_OF[other] if getattr(args, name) is not None]:
        raise UserError(f"--{foreign[0].replace('_', '-')} is for a {other}, but {args.checkpoint} holds a {kind}")
    check_writable(args.out)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
        (generate if kind == "generator" else reconstruct)(args)


if __name__ == "__main__":
    cli.main(main)
