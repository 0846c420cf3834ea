"""The dimension-wise head against a parallel one with as many parameters: held-out nats per code, in one run.

python benchmarks/dimensionwise_head_quality.py [--tokenizer runs/digits/tokenbridge --updates 300 --seed 0]

Both sides are configs/digits/gpt_tokenbridge.yaml, with the same images and draws. A parallel head sees none of the
codes before its own in the same position. It needs no table of codes and is wider instead: of one block and of two, the
narrowest that has at least as many parameters is trained. The floor is what the frequencies of a slot's codes in
training say, whatever stands around it. Without --tokenizer one is trained first.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok import discretize
from vistok.checkpoint import load_generator, load_tokenizer
from vistok.config import build
from vistok.data.datamodule import load_data
from vistok.generators.gpt import GPT
from vistok.generators.losses import cross_entropy
from vistok.interfaces import ClassCondition, Tokenizer
from vistok.pipeline import tokenize_images
from vistok.tokens import Tokens
from vistok.training.run import train
from vistok.training.run_config import load_config

CONFIGS = Path(__file__).parents[1] / "configs" / "digits"


def make_tokenizer(folder: Path) -> Path:
    """A KL-VAE of the digits, quantized to 16 levels."""
    train(load_config(CONFIGS / "klvae.yaml", [f"output={folder / 'klvae'}"]))
    words = ("--tokenizer", folder / "klvae", "--data", "digits", "--levels", 16, "--out", folder / "tokenbridge")
    sys.argv = ["discretize", *map(str, words)]
    discretize.main()
    return folder / "tokenbridge"


def overrides(args: argparse.Namespace, parallel: tuple[int, int] | None) -> list[str]:
    """Of the config; a parallel head has a width and a depth."""
    words = [f"tokenizer={args.tokenizer}", f"seed={args.seed}", f"trainer.max_updates={args.updates}"]
    words += [f"{key}={args.updates}" for key in ("trainer.val_every_updates", "log.pictures_every_updates")]
    heads = [] if parallel is None else ["parallel=true", f"width={parallel[0]}", f"depth={parallel[1]}"]
    return words + [f"generator.args.head.{word}" for word in heads]


def head_parameters(args: argparse.Namespace, parallel: tuple[int, int] | None = None) -> int:
    """Of a fresh head."""
    config = load_config(CONFIGS / "gpt_tokenbridge.yaml", overrides(args, parallel))
    model = build("generators", config.generator, load_tokenizer(args.tokenizer).spec)
    return sum(parameter.numel() for parameter in model.adapter.parameters())


def coded(tokenizer: Tokenizer, split: str) -> tuple[Tokens, ClassCondition]:
    data = load_data("digits", split, tokenizer.spec.image_size_px)
    samples = [data.get(index) for index in range(len(data))]
    images, labels = torch.stack([sample["image"] for sample in samples]), [sample["label"] for sample in samples]
    return tokenize_images(tokenizer, images, 100), ClassCondition(torch.tensor(labels))


def unigram(known: Tokens, held_out: Tokens) -> Tensor:
    """Cross-entropy of each slot's codes under their frequencies (and one of each), nats."""
    floors = []
    for slot, size in enumerate(known.spec.vocab_sizes):
        counts = known.ids[..., slot].flatten().bincount(minlength=size) + 1.0
        floors.append(F.cross_entropy(counts.log().expand(held_out.ids[..., slot].numel(), -1),
                                      held_out.ids[..., slot].flatten()))  # fmt: skip
    return torch.stack(floors)


@torch.no_grad()
def nats(model: GPT, tokens: Tokens, condition: ClassCondition) -> Tensor:
    """Mean cross-entropy of each slot's codes."""
    return cross_entropy(model.logits(tokens.ids, condition), tokens.ids).mean(dim=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="export folder of a TokenBridge for digits")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.tokenizer = args.tokenizer or make_tokenizer(folder)
        tokenizer = load_tokenizer(args.tokenizer)
        (known, _), (held_out, condition) = coded(tokenizer, "train"), coded(tokenizer, "val")
        wanted = head_parameters(args)
        # Even widths, because the config's head has two attention heads.
        shapes = [
            next((width, depth) for width in range(32, 256, 2) if head_parameters(args, (width, depth)) >= wanted)
            for depth in (1, 2)
        ]
        rows = [("unigram", 0, 0, 0.0, unigram(known, held_out))]
        for parallel in (*shapes, None):
            side = f"parallel {parallel[0]} x {parallel[1]}" if parallel else "dimension-wise"
            words = [*overrides(args, parallel), f"output={folder / side}"]
            started = time.perf_counter()
            train(load_config(CONFIGS / "gpt_tokenbridge.yaml", words))
            seconds, model = time.perf_counter() - started, load_generator(folder / side)
            count = sum(parameter.numel() for parameter in model.parameters())
            rows.append((side, head_parameters(args, parallel), count, seconds, nats(model, held_out, condition)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"{len(held_out)} held-out digits, {args.updates} updates; nats per code of each slot, and of all")
    for side, head, count, seconds, values in rows:
        figures = "  ".join(f"{value:.3f}" for value in (*values.tolist(), float(values.mean())))
        print(f"{side:15s} head {head:8,d}  all {count:9,d} parameters  {seconds:5.0f} s   {figures}")


if __name__ == "__main__":
    main()
