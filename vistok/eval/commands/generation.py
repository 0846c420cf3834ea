"""``generation``: measure a generator, or images that exist, against real images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.checkpoint import export_hash, export_info, load_text_encoder
from vistok.cli import add_data_flags, flag_for, positive_int
from vistok.config import parse_overrides
from vistok.data.datamodule import Dataset, load_images
from vistok.errors import UserError
from vistok.eval import generation
from vistok.eval.commands.flags import (
    add_features_flag,
    add_generator_flags,
    add_noise_flags,
    add_place_flags,
    adm_protocol,
    features_of,
    refuse_given,
    sample_options,
    sampling_settings,
)
from vistok.eval.commands.output import progress_bar, save
from vistok.eval.features import FeatureNetwork
from vistok.eval.fid import fid_notes
from vistok.eval.images import PixelHash, crop, open_images, uint8_batches
from vistok.eval.processes import is_first, own_share, rows_of_all
from vistok.eval.protocol import EvalProtocol
from vistok.eval.reference import (
    ImageFile,
    Reference,
    check_size,
    holds_statistics,
    load_reference,
    measure_reference,
)
from vistok.interfaces import NULL_CLASS, ClassCondition
from vistok.pictures import labelled_grid, places_by_label, rows_by_label, save_png
from vistok.pipeline import (
    Prompts,
    check_guidance,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_sample_options,
    sample_prefixes,
)

HELP = "FID, sFID, IS, KID, precision, recall, class accuracy and copies of a generator or of images that exist"
EXAMPLES = (
    "python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --count 500 --cfg-scale 2",
    "python -m vistok.eval generation --checkpoint runs/demo/generator --data digits --tokens 1,2,4,8,16",
    "python -m vistok.eval generation --images samples.npz --reference stats.npz --features inception:PATH",
)
DEFAULT_COUNT = 500
PICTURED = 1000
"""The picture shows some of the first so many samples."""
ALL_TOKENS = "all"


@dataclass
class Samples:
    """What is measured.

    Args:
        batches: of several processes, the share of this one.
        count: images of each number of tokens.
        image_size_px: their side.
        labels: words for each image of the picture.
        weights: see :class:`~vistok.eval.protocol.EvalProtocol`, as of the next two.
        settings: of sampling and decoding.
        models: hashes of the models that made them.
        train: real images to compare with; None without ``--data``.
        held_out: real images that are not among them.
    """

    batches: Iterator[generation.SampledBatch]
    count: int
    image_size_px: int
    labels: list[str]
    weights: dict[str, str]
    settings: dict[str, Any]
    models: dict[str, str]
    train: Dataset | None
    held_out: Dataset | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="run or export folder of a generator")
    source.add_argument(
        "--images",
        metavar="PATH",
        help="samples that exist: a folder, shards (.tar) or an ADM-style .npz; results go to PATH_eval",
    )
    add_data_flags(parser, required=False)
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="compare with this instead of the training split of --data: an .npz of the command reference, of ADM or "
        "with mu and sigma, or real images as --images takes them",
    )
    parser.add_argument(
        "--protocol",
        type=adm_protocol,
        metavar="admSIZE",
        help="crop and resize samples, and the images of --reference, as ADM does, e.g. adm256 (default: not at all)",
    )
    add_features_flag(parser)
    decode, _ = add_noise_flags(parser)  # the seed also says which images KID, precision and recall see
    parser.add_argument(
        "--count",
        type=positive_int,
        help="samples, of all classes or of val's captions in turn (default: 500, or all --images)",
    )
    drawing = [
        decode,
        parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale; 1 is none (default: 1)"),
        *add_generator_flags(parser),
        parser.add_argument(
            "--no-samples", dest="keep", action="store_false", help="do not write the samples to OUT/samples.npz"
        ),
    ]
    parser.set_defaults(drawing=drawing)
    parser.add_argument(
        "--no-copies",
        dest="copies",
        action="store_false",
        help="skip the share of copies (slow on big data, and all samples are in memory)",
    )
    add_place_flags(parser)


@flag_for("data.args.", "--data-args ")
@flag_for("on_long=", "--long-prompts ")
def run(args: argparse.Namespace) -> None:
    """Measure samples against real images."""
    started = time.perf_counter()
    if not (args.data or args.reference):
        raise UserError("give real images to compare with: --data NAME or --reference PATH")
    samples = _stored(args) if args.images else _generated(args)
    network = features_of(args)
    reference = _reference(args, samples, network)
    generation.check_counts(samples=samples.count, reference=reference.count)
    args.out = args.out or Path(f"{Path(args.images).with_suffix('')}_eval")
    file = ImageFile(args.out, samples.image_size_px) if args.checkpoint and args.keep else None
    copies = args.copies and samples.train is not None
    digest, held_out_pixels = PixelHash(), PixelHash()
    pictured = sorted(place for _, row in places_by_label(samples.labels[:PICTURED]) for place in row)
    shown: list[Tensor] = []
    pixels: dict[str, list[Tensor]] = {}

    def watched() -> Iterator[generation.SampledBatch]:
        for images, labels, places in samples.batches:
            *_, longest = images.values()
            digest.update(longest)
            shown.append(longest[torch.isin(places, torch.tensor(pictured))])
            if file:
                file.write(longest)
            if copies:
                for length, rows in images.items():
                    pixels.setdefault(length, []).append(rows)
            yield images, labels, places
            bar.update(len(labels))

    held_out, held_out_count = None, 0
    if samples.held_out is not None:
        held_out_count = len(samples.held_out)
        held_out = uint8_batches(samples.held_out, args.batch_size, args.workers, pixels=held_out_pixels)
        generation.check_counts(held_out=held_out_count)
    with progress_bar("sample" if args.checkpoint else "measure", samples.count) as bar:
        metrics = generation.measure_generation(
            watched(), samples.count, reference, network, held_out, held_out_count, args.seed, args.device
        )
    if copies:
        _add_copies(args, samples, {length: torch.cat(parts) for length, parts in pixels.items()}, metrics)
    data = {"name": "samples"}
    if samples.held_out is not None:
        data = samples.held_out.description | {"pixels_sha256": held_out_pixels.hexdigest()}
    protocol = EvalProtocol(
        task="generation",
        data=data,
        split="val" if samples.held_out else "none",
        count=samples.count,
        image_size_px=samples.image_size_px,
        quantised=True,
        weights=samples.weights,
        settings=samples.settings,
        seed=args.seed,
        features=network.identity,
        reference=reference.description,
        definitions=generation.DEFINITIONS,
        models=samples.models | {"samples": digest.hexdigest()},
    )
    picture = rows_of_all(torch.cat(shown))
    if file:
        file.gather()
    if not is_first():
        return
    if file:
        file.save(args.out / "samples.npz")
    labels = [samples.labels[place] for place in pictured]
    save_png(labelled_grid(*rows_by_label(picture, labels)), args.out / "generation.png")
    *_, row = metrics["tokens"].values()
    notes = fid_notes(network, samples.count, reference.count) + reference.notes()
    if generation.in_class_order(row):
        notes.append(
            "ADM-IS is much lower than IS: the images seem to be sorted by class, which it does not allow for."
        )
    save(args, started, protocol, metrics, notes)


def _generated(args: argparse.Namespace) -> Samples:
    """Samples that are made while they are measured."""
    options = sample_options(args, args.cfg_scale)
    generator, tokenizer, tokenizer_path = load_models(args.checkpoint, args.tokenizer, args.device)
    check_guidance(args.checkpoint, args.cfg_scale)
    lengths = prefix_lengths(tokenizer.spec, args.tokens or [tokenizer.spec.num_positions])
    size = args.protocol or tokenizer.spec.image_size_px
    decode = read_decode_options(tokenizer, args.decode)
    options = replace(options, extra=read_sample_options(generator, args.sampling))
    train, held_out = _real(args, size)
    if train and generator.num_classes and train.num_classes not in (0, generator.num_classes):
        raise UserError(
            f"{args.checkpoint} knows {generator.num_classes} classes, --data {args.data} has {train.num_classes}: "
            "that is not the data it was trained on"
        )
    count = args.count or DEFAULT_COUNT
    class_ids = generation.balanced_classes(count, generator.num_classes)
    names = (train.class_names if train else []) or [str(index) for index in range(generator.num_classes)]
    labels = [names[index] if index != NULL_CLASS else "" for index in class_ids.tolist()]
    condition: ClassCondition | Prompts = ClassCondition(class_ids)
    if generator.text_width:
        if held_out is None:
            raise UserError("a generator conditioned on text takes its captions from --data: give it too")
        labels = generation.captions(held_out, count)
        encoder = load_text_encoder(args.checkpoint, args.text_encoder, args.device, args.long_prompts)
        condition = Prompts(encoder, labels)

    def batches() -> Iterator[generation.SampledBatch]:
        for start in own_share(range(0, count, args.batch_size)):
            rows = slice(start, start + args.batch_size)
            made = sample_prefixes(
                generator, tokenizer, condition[rows], options, lengths, args.seed, args.batch_size, decode, first=start
            )
            if args.protocol:
                made = {length: crop(images, size) for length, images in made.items()}
            yield {str(length): images for length, images in made.items()}, class_ids[rows], torch.arange(count)[rows]

    return Samples(
        batches=batches(),
        count=count,
        image_size_px=size,
        labels=labels,
        weights={
            "generator": export_info(args.checkpoint).get("weights", "unknown"),
            "tokenizer": export_info(tokenizer_path).get("weights", "unknown"),
        },
        settings={
            "tokens": lengths,
            "sampling": sampling_settings(options),
            "decode": decode,
            "preprocessing": "adm_center_crop" if args.protocol else "none",
            **({"captions": "val in order"} if generator.text_width else {"classes": "balanced"}),
        },
        models={"generator": export_hash(args.checkpoint), "tokenizer": export_hash(tokenizer_path)},
        train=train,
        held_out=held_out,
    )


def _stored(args: argparse.Namespace) -> Samples:
    """Samples that somebody has made; how is not known."""
    refuse_given(args, args.drawing, "--images")
    images = open_images(args.images, args.protocol)
    count = args.count or len(images)
    if count > len(images):
        raise UserError(f"--count {count}: {args.images} holds {len(images)} images")
    train, held_out = _real(args, images.image_size_px)

    def batches() -> Iterator[generation.SampledBatch]:
        for rows, labels, places in uint8_batches(images, args.batch_size, args.workers, count):
            yield {ALL_TOKENS: rows}, labels, places

    return Samples(
        batches=batches(),
        count=count,
        image_size_px=images.image_size_px,
        labels=[""] * count,
        weights={"samples": "unknown"},
        settings={"sampling": "unknown", "preprocessing": images.description["preprocessing"]},
        models={},
        train=train,
        held_out=held_out,
    )


def _real(args: argparse.Namespace, size: int) -> tuple[Dataset | None, Dataset | None]:
    if not args.data:
        return None, None
    data_args = parse_overrides(args.data_args)
    return load_images(args.data, "train", size, data_args), load_images(args.data, "val", size, data_args)


def _reference(args: argparse.Namespace, samples: Samples, network: FeatureNetwork) -> Reference:
    if args.reference and holds_statistics(Path(args.reference)):
        with progress_bar("reference") as bar:
            reference = load_reference(Path(args.reference), network, args.batch_size, args.device, bar.update)
        check_size(samples.image_size_px, reference.image_size_px)
        return reference
    if args.reference:
        images = open_images(args.reference, args.protocol)
        check_size(samples.image_size_px, images.image_size_px)
    dataset = images if args.reference else samples.train
    assert dataset is not None
    with progress_bar("reference", len(dataset)) as bar:
        return measure_reference(
            dataset, network, args.seed, args.batch_size, args.workers, args.device, progress=bar.update
        )


def _add_copies(args: argparse.Namespace, samples: Samples, pixels: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """Copies of the training images, beside the other figures."""
    assert samples.train is not None and samples.held_out is not None
    held_out = torch.cat([images for images, *_ in uint8_batches(samples.held_out, args.batch_size, args.workers)])
    reference = uint8_batches(samples.train, args.batch_size, args.workers, whole=True)
    with progress_bar("copies", len(samples.train), whole=True) as bar:
        shares, threshold = generation.measure_copies(pixels, held_out, reference, args.device, bar.update)
    for length, share in shares.items():
        metrics["tokens"][length]["copies_share"] = share
    metrics["held_out"]["copies_share"] = generation.COPIES_PERCENTILE / 100
    metrics["copies_threshold_l2"] = threshold
