"""Images a second that a generator samples, its tokenizer's decoding included, by number of tokens.

python benchmarks/sampling_speed.py --checkpoint runs/demo/generator --tokens 1,2,4,8,16

From a class or a caption to uint8 pixels, keys and values cached; the median of some rounds after one that does not
count. Models are loaded before.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from vistok import cli
from vistok.checkpoint import load_text_encoder
from vistok.data.datamodule import load_images
from vistok.eval import generation
from vistok.files import write_text
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.pipeline import Prompts, load_models, prefix_lengths, read_sample_options, sample_images


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokens", type=cli.token_counts, help="default: powers of two, or whole scales, up to all")
    parser.add_argument("--data", default="shapes", help="whose captions a generator of texts is asked for")
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--count", type=cli.positive_int, default=100, help="images of a round, all in one batch")
    parser.add_argument("--rounds", type=cli.positive_int, default=3)
    parser.add_argument("--device", type=cli.usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also as JSON")
    args = parser.parse_args()
    generator, tokenizer, _ = load_models(args.checkpoint, device=args.device)
    condition = ClassCondition(generation.balanced_classes(args.count, generator.num_classes))
    if generator.text_width:
        captions = generation.captions(load_images(args.data, "val", tokenizer.spec.image_size_px), args.count)
        condition = Prompts(load_text_encoder(args.checkpoint, None, args.device), captions)
    options = SampleOptions(cfg_scale=args.cfg_scale, extra=read_sample_options(generator, []))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, batch {args.count}")
    speeds = {}
    for length in prefix_lengths(tokenizer.spec, args.tokens):
        seconds = []
        for seed in range(1 + args.rounds):
            started = time.perf_counter()
            sample_images(generator, tokenizer, condition, replace(options, num_tokens=length), seed, args.count)
            seconds.append(time.perf_counter() - started)
        speeds[length] = {"images_per_s": args.count / statistics.median(seconds[1:])}
        print(f"{length} tokens: {speeds[length]['images_per_s']:.4g} images/s")
    if args.out:
        write_text(args.out, json.dumps({"tokens": speeds, "batch_size": args.count}, indent=2) + "\n")


if __name__ == "__main__":
    cli.main(main)
