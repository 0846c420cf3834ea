"""Sample images from a generator, or reconstruct images with a tokenizer."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from vistok import cli
from vistok.checkpoint import export_info, load_autoencoder, load_text_encoder
from vistok.data.datamodule import load_images
from vistok.errors import UserError, first_line
from vistok.interfaces import NULL_CLASS, ClassCondition, Condition, Generator, SampleOptions
from vistok.pictures import prefix_grid, save_images, save_png, to_uint8
from vistok.pipeline import (
    check_guidance,
    decode_prefixes,
    encode_images,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_sample_options,
    sample_prefixes,
)

EXAMPLES = """writes for a generator:
  OUT/grid.png  OUT/00000.png ...  OUT/samples.npz (uint8 arr_0, N x H x W x 3, for FID evaluators)
  of several --tokens: OUT/grid.png, and all three in OUT/tokens_004/ ...
and for a tokenizer:
  OUT/reconstruction.png, and grid.png, 00000.png ... and samples.npz in OUT/original/, OUT/tokens_004/ ...

examples:
  python sample.py --checkpoint runs/demo/generator --class 3 --count 16 --cfg-scale 2 --top-p 0.95 --out samples/
  python sample.py --checkpoint runs/demo/generator --tokens 1,4,16 --cfg-scale 2 --guidance-interval 0,0.5
  python sample.py --checkpoint runs/demo/generator --first 17 --count 1   (image 17 of the first call, alone)
  python sample.py --checkpoint runs/t2i_demo/generator --prompt "a small red circle" --count 4 --cfg-scale 3
  python sample.py --checkpoint runs/t2i_demo/generator --prompts prompts.txt --count 8 --cfg-scale 3
  python sample.py --checkpoint runs/demo/tokenizer --images DIR --tokens 1,4,16 --out reconstructions/
"""
FLAGS_OF = {
    "generator": (
        "class",
        "prompt",
        "prompts",
        "negative_prompt",
        "tokenizer",
        "text_encoder",
        "long_prompts",
        "sampling",
        "first",
        "cfg_scale",
        *cli.SAMPLING,
    ),
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
    add("--count", type=cli.positive_int, default=16, metavar="N", help="images, of each prompt (default: 16)")
    add("--seed", type=int, default=0, metavar="N", help="names the images: i depends on seed and i alone (default: 0)")
    add("--batch-size", type=cli.positive_int, default=64, metavar="N", help="images at a time (default: 64)")
    add("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=cli.usable_device, default=device, help="default: %(default)s")
    add("--precision", choices=("32", "bf16"), default="32", help="bf16 computes under autocast (default: 32)")
    group = parser.add_argument_group("for a generator")
    add = group.add_argument
    add("--class", metavar="C", help="class number or name (default: all in turn)")
    add("--prompt", action="append", metavar="TEXT",
        help='what a generator conditioned on text shall show, "" is anything; may be given several times')  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    add("--negative-prompt", metavar="TEXT", help='what guidance leads away from (default: "", the empty text)')
    add("--tokenizer", type=Path, metavar="DIR", help="default: the one that the generator was trained on")
    add("--text-encoder", type=Path, metavar="DIR", help="default: the one that the generator was trained with")
    add("--long-prompts", choices=("cut", "refuse"),
        help="those with more tokens than the text encoder reads (default: as in its training)")  # fmt: skip
    add("--cfg-scale", type=float, metavar="S", help="guidance scale; 1 is none (default: 1)")
    cli.add_sampling_flags(group)
    add("--sampling", nargs="*", metavar="key=value", help="options of this kind of generator, such as steps=64")
    add("--first", type=cli.non_negative_int, metavar="I", help="begin with image I of the seed's (default: 0)")
    add = parser.add_argument_group("for a tokenizer").add_argument
    add(
        "--images",
        metavar="DATA",
        help="image folder (its val/ if it has one, else all of it), shards, digits, shapes or photos",
    )
    add("--on-error", choices=("stop", "skip"), help="unreadable images (default: stop)")
    return parser.parse_args()


@cli.flag_for("on_long=", "--long-prompts ")
def generate(args: argparse.Namespace) -> None:
    """Write a grid, one PNG for each sample, and ``samples.npz``; the last two for each number of tokens."""
    flags = {} if args.cfg_scale is None else {"cfg_scale": args.cfg_scale}
    options = SampleOptions(**flags, **cli.sampling_flags(args))  # refuses bad values before anything is loaded
    generator, tokenizer, _ = load_models(args.checkpoint, args.tokenizer, args.device)
    if args.negative_prompt is None:
        check_guidance(args.checkpoint, options.cfg_scale)
    lengths = prefix_lengths(generator.spec, args.tokens or [generator.spec.num_positions])
    args.first = args.first or 0
    condition, labels = (texts if generator.text_width else classes)(args, generator)
    decode = read_decode_options(tokenizer, args.decode)
    options = replace(options, extra=read_sample_options(generator, args.sampling or []))
    with tqdm(total=len(condition), desc="sample", unit="img", leave=False) as bar:
        more = (args.seed, args.batch_size, decode, bar.update, args.first)
        sampled = sample_prefixes(generator, tokenizer, condition, options, lengths, *more)
    if len(lengths) == 1:
        save_images(args.out, sampled[lengths[0]], labels, args.first)
        print(f"{len(condition)} samples: {args.out / 'grid.png'}, {args.out / 'samples.npz'}")
        return
    for length, images in sampled.items():
        save_images(args.out / f"tokens_{length:03d}", images, labels, args.first)
    save_png(prefix_grid(None, sampled, labels), args.out / "grid.png")
    print(f"{len(condition)} samples, columns {lengths}: {args.out / 'grid.png'}")


def classes(args: argparse.Namespace, generator: Generator) -> tuple[Condition, list[str]]:
    """``--class`` for each sample, or all classes in turn; and their names.

    Raises:
        UserError: for an unknown class, or flags of a generator conditioned on text.
    """
    of_texts = (args.prompt, args.prompts, args.negative_prompt, args.text_encoder, args.long_prompts)
    if any(given is not None for given in of_texts):
        raise UserError(
            "--prompt, --prompts, --negative-prompt, --text-encoder and --long-prompts are for a generator conditioned "
            f"on text, that in {args.checkpoint} is not: give --class"
        )
    names = export_info(args.checkpoint).get("class_names") or []
    names += [str(number) for number in range(len(names), generator.num_classes)]
    wanted = getattr(args, "class")
    numbers = torch.arange(args.first, args.first + args.count)
    class_ids = numbers % len(names) if names else torch.full_like(numbers, NULL_CLASS)
    if wanted is not None:
        class_ids = torch.full_like(numbers, class_number(wanted, names))
    return ClassCondition(class_ids), [names[number] if number >= 0 else "" for number in class_ids.tolist()]


def texts(args: argparse.Namespace, generator: Generator) -> tuple[Condition, list[str]]:
    """Each prompt for ``--count`` samples, as the text encoder sees it; and as a label.

    Raises:
        UserError: if there is none, for ``--class``, or if the text encoder is missing.
    """
    prompts = [*(args.prompt or []), *(read_prompts(args.prompts) if args.prompts else [])]
    if getattr(args, "class") is not None or not prompts:
        raise UserError(
            f"the generator in {args.checkpoint} is conditioned on text: give --prompt TEXT or --prompts FILE, "
            "no --class"
        )
    encoder = load_text_encoder(args.checkpoint, args.text_encoder, args.device, args.long_prompts)
    negative = [] if args.negative_prompt is None else [args.negative_prompt]
    # All at once, so that one line warns of those that are too long.
    read = encoder.encode([*prompts, *negative])
    condition = read[: len(prompts)]
    if negative:
        condition = condition.away_from(read[len(prompts) :])
    rows = torch.arange(len(prompts)).repeat_interleave(args.count)
    return condition[rows], [prompts[row] for row in rows]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        UserError: if there is no such file, or nothing in it.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {path}: {first_line(error)}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--prompts: {path} has no prompt in it")
    return prompts


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
