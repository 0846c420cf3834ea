"""Flags that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistok.cli import add_data_flags, add_sampling_flags, positive_int, sampling_flags, token_counts, usable_device
from vistok.errors import UserError
from vistok.eval.features import SMALL_NETWORKS, FeatureNetwork, load_features
from vistok.eval.processes import own_device
from vistok.interfaces import SampleOptions


def add_measuring_flags(parser: argparse.ArgumentParser, more_features: tuple[str, ...] = ()) -> None:
    """What is measured, where, through which features and with which noise."""
    add_source_flags(parser)
    add_features_flag(parser, more_features)
    add_noise_flags(parser)


def add_features_flag(parser: argparse.ArgumentParser, more_features: tuple[str, ...] = ()) -> None:
    """``--features``, with more names than those of networks if a command has them."""
    parser.add_argument(
        "--features",
        metavar="NAME",
        help=f"feature network: {', '.join((*SMALL_NETWORKS, 'inception:PATH', *more_features))} "
        "(default: that of --data)",
    )


def adm_protocol(text: str) -> int:
    """The size in pixels of a protocol such as adm256, as a ``type`` for argparse."""
    if not (found := re.fullmatch(r"adm([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"must be adm and a size in pixels, such as adm256, got {text!r}")
    return int(found[1])


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, the data and the place, for commands that take a trained model and real images."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="run or export folder")
    add_data_flags(parser)
    add_place_flags(parser)


def add_generator_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """How to sample, for commands that take a generator."""
    add = parser.add_argument
    encoder_help = "its text encoder (default: the one it was trained with)"
    long_help = "those with more tokens than the text encoder reads (default: as in its training)"
    sampling_help = "of this kind of generator, such as steps=64"
    tokens_help = "prefixes to decode, each with its own metrics (default: all tokens only)"
    return [
        add("--tokenizer", type=Path, metavar="DIR", help="its tokenizer (default: the one it was trained on)"),
        add("--text-encoder", type=Path, metavar="DIR", help=encoder_help),
        add("--long-prompts", choices=("cut", "refuse"), help=long_help),
        *add_sampling_flags(parser),
        add("--sampling", nargs="*", default=[], metavar="key=value", help=sampling_help),
        add("--tokens", type=token_counts, metavar="K,K,...", help=tokens_help),
    ]


def add_noise_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """How to decode."""
    add = parser.add_argument
    return [
        add("--decode", nargs="*", default=[], metavar="key=value", help="decode options, such as steps=8"),
        add("--seed", type=int, default=0, help="names all noise (default: 0)"),
    ]


def refuse_given(args: argparse.Namespace, actions: Iterable[argparse.Action], source: str) -> None:
    """Raise UserError if one of the flags ``actions`` was given, which change nothing about a ``source`` that exists.

    Args:
        args: the command line.
        actions: of argparse, as the functions above return them.
        source: a flag, such as ``--images``.
    """
    for action in actions:
        if getattr(args, action.dest) != action.default:
            raise UserError(f"{action.option_strings[0]} changes nothing about {source}, which exist already")


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """``--out``, ``--batch-size`` and ``--device``."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: CHECKPOINT/eval)")
    add_batch_flags(parser)


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """``--batch-size`` and ``--device``."""
    parser.add_argument("--batch-size", type=positive_int, default=100, help="images at a time (default: 100)")
    parser.add_argument("--device", default=own_device(), type=usable_device, help="default: %(default)s")


def features_of(args: argparse.Namespace) -> FeatureNetwork:
    """The feature network that the command line names."""
    if not args.features and args.data not in SMALL_NETWORKS:
        needed = "give --features inception:PATH (reconstruction also takes none)"
        whose = f"--data {args.data}" if args.data else "a reference"
        raise UserError(f"no feature network comes with {whose}: {needed}")
    return load_features(args.features or args.data, args.device)


def identity(network: FeatureNetwork | None) -> dict[str, str]:
    """A network as :class:`~vistok.eval.protocol.EvalProtocol` names it."""
    return {} if network is None else network.identity


def sample_options(args: argparse.Namespace, cfg_scale: float) -> SampleOptions:
    """What the command line says about sampling."""
    return SampleOptions(cfg_scale=cfg_scale, **sampling_flags(args))


def sampling_settings(options: SampleOptions) -> dict[str, Any]:
    """The options that change samples, without the number of tokens."""
    how = ("num_tokens", "use_cache", "compile")
    values = {name: value for name, value in asdict(options).items() if name not in how}
    return values | values.pop("extra")
