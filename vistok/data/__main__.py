"""``python -m vistok.data``: write shards, extract tokens or latents, draw sample images of the ``shapes`` world."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from omegaconf import MISSING
from tqdm import tqdm

from vistok.checkpoint import export_hash, load_tokenizer
from vistok.cli import ArgumentParser, add_data_flags, flag_for, main, positive_int, usable_device
from vistok.config import Component, component_config, component_module, parse_overrides, read_yaml, to_plain, typed
from vistok.data import code_cache, folders, latent_cache, shapes, shards
from vistok.data.datamodule import load_images
from vistok.data.images import Record
from vistok.data.text_states import DTYPES
from vistok.errors import UserError
from vistok.files import new_folder
from vistok.interfaces import Tokenizer
from vistok.pictures import to_pil, to_uint8
from vistok.rng import seeded_generator


def run() -> None:
    """Parse the command line and do what it says."""
    arguments = _parser().parse_args()
    arguments.command(arguments)


@flag_for("data.args.on_error=", "--on-error ")
def write_shards(arguments: argparse.Namespace) -> None:
    """An image folder as WebDataset shards; train and val below it become folders of shards."""
    # Nothing is held out here: that is for the reader of the shards to decide.
    config = folders.Config(path=arguments.images, val_fraction=0, on_error=arguments.on_error)
    splits = ("train", "val") if (Path(arguments.images) / "val").is_dir() else ("",)
    count = skipped = 0
    with new_folder(arguments.out) as out:
        for split in splits:
            # Shards keep the encoded files: the image size plays no part.
            dataset = folders.build(config, split or "train", 1)
            (out / split).mkdir(exist_ok=True)
            count += shards.write_shards(
                _shuffled(dataset), out / split, arguments.max_per_shard, dataset.class_names, arguments.captions
            )
            skipped += dataset.num_skipped
    print(f"wrote {count} images to {arguments.out}" + (f", skipped {skipped} unreadable" if skipped else ""))


@flag_for("data.args.", "--data-args ")
def extract_tokens(arguments: argparse.Namespace) -> None:
    """The tokens of both splits of a data set as a code cache."""
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.device)
    extract = partial(
        code_cache.extract,
        tokenizer,
        export_hash(arguments.tokenizer),
        text_encoder=_text_encoder(arguments.text_encoder),
        text_bits=arguments.text_bits,
    )
    _write_cache(extract, tokenizer.spec.image_size_px, "tokens", arguments)


@flag_for("data.args.", "--data-args ")
def extract_latents(arguments: argparse.Namespace) -> None:
    """The latents of both splits of a data set, as a tokenizer's frozen VAE sees it, as a latent cache."""
    if arguments.config:
        tokenizer = _tokenizer_of_run(arguments.config, arguments.tokenizer_args)
    elif arguments.tokenizer_args:
        raise UserError("--tokenizer-args are for the tokenizer of a --config, not for an exported --tokenizer")
    else:
        tokenizer = load_tokenizer(arguments.tokenizer, arguments.device)
    extract = partial(latent_cache.extract, tokenizer, moments=arguments.moments)
    _write_cache(extract, tokenizer.spec.image_size_px, "latents", arguments)


def draw_shapes(arguments: argparse.Namespace) -> None:
    """Images of the shapes world as an image folder with captions."""
    config = shapes.Config(train_count=arguments.count, val_count=arguments.count, seed=arguments.seed)
    dataset = shapes.build(config, arguments.split, arguments.image_size)
    with new_folder(arguments.out) as out:
        for index in tqdm(range(len(dataset)), desc="shapes", unit="img", leave=False):
            sample = dataset.get(index)
            to_pil(to_uint8(sample["image"])).save(out / f"{index:06d}.png")
            (out / f"{index:06d}.txt").write_text(sample["text"] + "\n")
    print(f"wrote {len(dataset)} images to {arguments.out}")


def _write_cache(extract: Callable[..., None], image_size_px: int, what: str, arguments: argparse.Namespace) -> None:
    """Let ``extract`` cache both splits of the data set that ``arguments`` name, with a progress line."""
    data_args = parse_overrides(arguments.data_args)
    datasets = {split: load_images(arguments.data, split, image_size_px, data_args) for split in ("train", "val")}
    total = len(datasets["train"]) * arguments.passes + len(datasets["val"])
    with tqdm(total=total, desc=what, unit="img", leave=False) as bar:
        extract(
            datasets,
            arguments.out,
            batch_size=arguments.batch_size,
            passes=arguments.passes,
            seed=arguments.seed,
            workers=arguments.workers,
            device=arguments.device,
            progress=bar.update,
        )
    read = ", and the states of their captions," if getattr(arguments, "text_encoder", None) else ""
    print(f"wrote the {what} of {total} images{read} to {arguments.out}")


def _tokenizer_of_run(path: str, overrides: list[str]) -> Tokenizer:
    """The tokenizer, with fresh weights, that the config of a run trains.

    Raises:
        UserError: if the config trains none, or the tokenizer cannot be built.
    """
    section = read_yaml(path).get("tokenizer")
    if not isinstance(section, dict):
        raise UserError(f"{path}: expected a run that trains a tokenizer, tokenizer: {{name, args}}, got {section!r}")
    component = typed(Component, section, f"{path}: tokenizer")
    module = component_module("tokenizers", component.name)
    where = f"{path}: tokenizers.{component.name}"
    return module.build(typed(module.Config, component.args, where, parse_overrides(overrides)))


def _text_encoder(words: list[str] | None) -> Component | None:
    """The text encoder that ``name=NAME`` and its arguments describe."""
    if words is None:
        return None
    args = parse_overrides(words)
    component = typed(Component, {"name": args.pop("name", MISSING), "args": args}, "--text-encoder")
    return Component(component.name, to_plain(component_config("text_encoders", component, "--text-encoder")))


def _shuffled(dataset: folders.Folders) -> Iterator[Record]:
    """Every readable image once, in an order that mixes the classes, for readers that stream the shards."""
    order = torch.randperm(len(dataset), generator=seeded_generator("shards"))
    for index in tqdm(order.tolist(), desc="shards", unit="img", leave=False):
        if (found := dataset.read(index)) is not None:
            yield found[0]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m vistok.data", description="Prepare data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, example):
        part = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            epilog=f"example: python -m vistok.data {name} {example}",
        )
        part.set_defaults(command=function)
        part.add_argument("--out", required=True, metavar="DIR", help="folder to make; must not exist")
        return part

    part = command("shards", write_shards, "--images photos/ --out photo_shards/ --captions")
    part.add_argument("--images", required=True, metavar="DIR", help="image folder, flat or one subfolder per class")
    part.add_argument(
        "--max-per-shard", type=positive_int, default=1000, metavar="N", help="images in a shard (%(default)s)"
    )
    part.add_argument("--captions", action="store_true", help="take the .txt files beside the images along")
    part.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="unreadable images (%(default)s)")

    part = command("tokens", extract_tokens, "--tokenizer runs/digits/flextok --data digits --out codes/ --passes 4")
    part.add_argument("--tokenizer", required=True, metavar="DIR", help="exported tokenizer or its run folder")
    part.add_argument("--text-encoder", nargs="+", metavar="key=value",
                      help="store what it makes of captions too: name=t5 path=DIR and more, as text_encoder.args of "
                      "train.py")  # fmt: skip
    part.add_argument("--text-bits", type=int, choices=sorted(DTYPES), default=16,
                      help="of a number in the states of captions (%(default)s)")  # fmt: skip
    _add_cache_flags(part, batch_size=256)

    part = command("latents", extract_latents, "--config configs/imagenet/flextok_d12_d12.yaml "
                   "--tokenizer-args alignment=null --data data/imagenet --out latents/ --passes 4")  # fmt: skip
    whose = part.add_mutually_exclusive_group(required=True)
    whose.add_argument("--config", metavar="FILE", help="YAML of the run whose tokenizer has the VAE")
    whose.add_argument("--tokenizer", metavar="DIR", help="exported tokenizer with the VAE, or its run folder")
    part.add_argument("--tokenizer-args", nargs="*", default=[], metavar="key=value",
                      help="as tokenizer.args of train.py, such as vae=DIR alignment=null")  # fmt: skip
    part.add_argument("--moments", action="store_true",
                      help="mean and deviation of training images and mirror images, to draw from")  # fmt: skip
    _add_cache_flags(part, batch_size=32)

    part = command("shapes", draw_shapes, "--out shapes_64/ --count 16 --image-size 64")
    part.add_argument("--count", type=positive_int, default=16, metavar="N", help="images (%(default)s)")
    part.add_argument(
        "--image-size", type=positive_int, default=64, metavar="PX", help="side of the images (%(default)s)"
    )
    part.add_argument("--split", choices=["train", "val"], default="train", help="part of the world (%(default)s)")
    part.add_argument("--seed", type=int, default=0, metavar="N", help="names the world (%(default)s)")
    return parser


def _add_cache_flags(part: argparse.ArgumentParser, batch_size: int) -> None:
    add_data_flags(part)
    part.add_argument("--passes", type=positive_int, default=1, metavar="N",
                      help="passes over the training split; all but the first augment (%(default)s)")  # fmt: skip
    part.add_argument(
        "--batch-size", type=positive_int, default=batch_size, metavar="N", help="images at once (%(default)s)"
    )
    part.add_argument("--seed", type=int, default=0, metavar="N", help="of the augmentations (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    part.add_argument("--device", default=device, type=usable_device, help="where to compute (%(default)s)")


if __name__ == "__main__":
    main(run)
