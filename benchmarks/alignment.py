"""FlexTok with and without alignment to a frozen teacher (REPA): held-out loss and PSNR after the same updates.

python benchmarks/alignment.py [--updates 2800 --seeds 0 1 --weight 1 --layer 0]

The teacher is a small vision transformer of timm that learns here to tell the digits apart, on their training split
(as python -m vistok.eval train-teacher, with larger patches).
Both sides are configs/digits/flextok.yaml, with the same initial weights, images and draws.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch

from vistok.checkpoint import load_tokenizer
from vistok.data.datamodule import load_data
from vistok.eval.reconstruction import measure_reconstruction
from vistok.eval.train_teacher import NAME, TEACHERS, train_teacher
from vistok.interfaces import Tokenizer
from vistok.pipeline import prefix_lengths
from vistok.rng import seeded_generator
from vistok.training.run import train
from vistok.training.run_config import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "digits" / "flextok.yaml"
# The patches of the decoder, at twice the size.
TEACHER_ARGS = {**TEACHERS["digits"], "img_size": 32, "patch_size": 8}
VAL_DRAWS = 16


def split(name: str, size_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data("digits", name, size_px)
    samples = [data.get(index) for index in range(len(data))]
    return torch.stack([sample["image"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])


@torch.no_grad()
def velocity_loss(tokenizer: Tokenizer, images: torch.Tensor) -> float:
    """Mean over draws; an export has no teacher, so its loss is that of the velocity alone."""
    losses = [tokenizer.training_loss(images, seeded_generator("val", draw)).total for draw in range(VAL_DRAWS)]
    return float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("updates", 2800), ("teacher-epochs", 80), ("layer", 0), ("projector-width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.safetensors"
        accuracy = train_teacher("digits", weights, TEACHER_ARGS, args.teacher_epochs)
        alignment = {
            "teacher": NAME,
            "teacher_weights": str(weights),
            "weight": args.weight,
            "layer": args.layer,
            "projector_width": args.projector_width,
            **{f"teacher_args.{name}": value for name, value in TEACHER_ARGS.items()},
        }
        sides = {"off": [], "on": [f"tokenizer.args.alignment.{name}={value}" for name, value in alignment.items()]}
        for seed in args.seeds:
            for side, overrides in sides.items():
                output = Path(folder) / f"{side}_{seed}"
                run = [f"output={output}", f"seed={seed}", f"trainer.max_updates={args.updates}", *overrides]
                started = time.perf_counter()
                train(load_config(CONFIG, run))
                seconds = time.perf_counter() - started
                tokenizer = load_tokenizer(output)
                images, labels = split("val", tokenizer.spec.image_size_px)
                batch = [{"image": images, "label": labels, "position": torch.arange(len(images))}]
                result = measure_reconstruction(tokenizer, batch, None, prefix_lengths(tokenizer.spec))
                rows.append((seed, side, seconds, velocity_loss(tokenizer, images), result["tokens"]))
    print(f"\nteacher {TEACHER_ARGS['embed_dim']} x {TEACHER_ARGS['depth']}, {accuracy:.1%} of held-out digits right")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    print(f"{args.updates} updates, alignment weight {args.weight}, behind block {args.layer}")
    print(f"seed  alignment  seconds  velocity  PSNR, dB, from {', '.join(rows[0][-1])} tokens")
    for seed, side, seconds, loss, tokens in rows:
        quality = "  ".join(f"{value['psnr_db']:5.2f}" for value in tokens.values())
        print(f"{seed:4d}  {side:9s}  {seconds:7.1f}  {loss:8.4f}  {quality}")


if __name__ == "__main__":
    main()
