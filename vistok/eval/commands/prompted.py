"""What the benchmarks of text-to-image generators share: prompts become images under each guidance scale."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vistok.checkpoint import export_hash, export_info, load_text_encoder
from vistok.cli import positive_int
from vistok.errors import UserError
from vistok.eval.commands.flags import (
    add_generator_flags,
    add_noise_flags,
    add_place_flags,
    sample_options,
    sampling_settings,
)
from vistok.eval.commands.output import console, new_table, progress_bar, show
from vistok.eval.geneval import Sample, generated_samples
from vistok.eval.processes import of_all
from vistok.eval.protocol import EvalProtocol, number, table_by_tokens
from vistok.interfaces import SampleOptions
from vistok.pipeline import (
    Prompts,
    check_guidance,
    load_models,
    prefix_lengths,
    read_decode_options,
    read_sample_options,
)


def add_prompted_flags(parser: argparse.ArgumentParser, per_prompt: int, layout: str) -> list[argparse.Action]:
    """How many images are sampled, how and where to.

    Args:
        parser: of the command.
        per_prompt: how many images of each prompt by default.
        layout: how saved images lie in OUT.

    Returns:
        Those that change nothing about images that exist.
    """
    add = parser.add_argument
    count_help, scale_help = f"images (default: {per_prompt})", "guidance scales; 1 is none (default: 1)"
    add_place_flags(parser)
    return [
        add("--count-per-prompt", type=positive_int, default=per_prompt, metavar="N", help=count_help),
        add("--cfg-scale", type=scales, default=[1.0], metavar="S[,S...]", help=scale_help),
        *add_generator_flags(parser),
        *add_noise_flags(parser),
        add("--save-images", action="store_true", help=f"also as OUT/{layout}"),
    ]


class PromptedGenerator:
    """The generator that the command line names, and how it samples.

    Args:
        args: the command line.
        task: of the command: names the folder of saved images.

    Attributes:
        parts: folders of the models.
        runs: options, place of the results and folder of the saved images, if any, for each guidance scale.
        image_size_px: side of the images.

    Raises:
        UserError: if it does not read text, a flag does not suit it, or images would be overwritten.
    """

    def __init__(self, args: argparse.Namespace, task: str) -> None:
        # Refuses bad values before anything is loaded.
        options = [sample_options(args, scale) for scale in args.cfg_scale]
        self.args = args
        self.generator, self.tokenizer, tokenizer_path = load_models(args.checkpoint, args.tokenizer, args.device)
        self.parts = {"generator": args.checkpoint, "tokenizer": tokenizer_path}
        if not self.generator.text_width:
            raise UserError(f"the generator in {args.checkpoint} is conditioned on classes: {task} asks in words")
        check_guidance(args.checkpoint, *args.cfg_scale)
        spec = self.tokenizer.spec
        self.lengths = prefix_lengths(spec, args.tokens or [spec.num_positions])
        self.image_size_px, self.decode = spec.image_size_px, read_decode_options(self.tokenizer, args.decode)
        extra = read_sample_options(self.generator, args.sampling)
        outs = [args.out / f"cfg_{scale:g}" if len(options) > 1 else args.out for scale in args.cfg_scale]
        folders = [out / f"{task}_images" if args.save_images else None for out in outs]
        if there := [folder for folder in folders if folder and folder.exists()]:
            raise UserError(f"{there[0]} exists: remove it or give another --out")
        of_all(None)  # no process writes images before all have seen that there are none
        self.runs = [(replace(option, extra=extra), out, folder) for option, out, folder in zip(options, outs, folders)]

    def read(self, texts: list[str]) -> Prompts:
        """The prompts, each as often as it is sampled."""
        args = self.args
        encoder = load_text_encoder(args.checkpoint, args.text_encoder, args.device, args.long_prompts)
        return Prompts(encoder, [text for text in texts for _ in range(args.count_per_prompt)])

    def samples(
        self, prompts: Prompts, options: SampleOptions, numbers: Sequence[int] | None = None
    ) -> Iterator[Sample]:
        """An image of each of ``prompts``; see :func:`~vistok.eval.geneval.generated_samples`."""
        more = (self.lengths, self.args.seed, self.args.batch_size, self.decode, numbers)
        return generated_samples(self.generator, self.tokenizer, prompts, self.args.count_per_prompt, options, *more)

    def settings(self, options: SampleOptions) -> dict[str, Any]:
        """What changes the samples, for the protocol."""
        settings = {"tokens": self.lengths, "sampling": sampling_settings(options), "decode": self.decode}
        return settings | {"count_per_prompt": self.args.count_per_prompt}


def prompted_protocol(
    args: argparse.Namespace,
    task: str,
    data: dict[str, Any],
    count: int,
    image_size_px: int,
    judge: dict[str, str],
    definitions: dict[str, Any],
    settings: dict[str, Any],
    parts: dict[str, Path],
) -> EvalProtocol:
    """The conditions of a benchmark that a ``judge`` decides; no ``settings`` and ``parts`` for images that exist."""
    return EvalProtocol(
        task=task,
        data=data,
        split=data.get("split", "all"),
        count=count,
        image_size_px=image_size_px,
        quantised=True,
        weights={name: export_info(path).get("weights", "unknown") for name, path in parts.items()},
        settings=settings,
        seed=args.seed,
        features=judge,
        reference={},
        definitions=definitions,
        models={name: export_hash(path) for name, path in parts.items()},
    )


def only_keep(samples: Iterable[Sample], count: int, folder: Path | None, flag: str) -> None:
    """Draw samples that are written as they are drawn, and say that nobody judged them."""
    with progress_bar("sample", count) as bar:
        for _ in samples:
            bar.update()
    console.print(f"{count} samples, not judged without {flag}: {folder}", soft_wrap=True)


def show_overview(title: str, overview: dict[str, dict[str, float]]) -> None:
    """The scores of each guidance scale, where there are several."""
    if len(overview) > 1:
        columns = ["cfg-scale", *next(iter(overview.values()))]
        rows = [(scale, *map(number, row.values())) for scale, row in overview.items()]
        show(new_table(f"{title} by guidance scale", columns, rows), [])


def show_by_tokens(title: str, metrics: dict[str, Any]) -> None:
    """The scores of each number of tokens, where there are several."""
    if len(metrics["tokens"]) > 1:
        show(new_table(f"{title} by number of tokens", *table_by_tokens(metrics)), [])


def scales(text: str) -> list[float]:
    """Numbers between commas, as a ``type`` for argparse."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,2.5, got {text!r}") from None
