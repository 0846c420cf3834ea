"""What merging costs a trained classifier off the shelf, by method, at equal multiply-adds.

python benchmarks/merging_classifier.py [--seeds 0 1 2 3 4 --updates 1200 --pool token --budgets 0.7,0.5,0.35]

For each seed a small vision transformer of timm learns the shape and the colour of the object in the middle of crops
from the shapes world, whose other objects reach in from the sides; an answer is right if both are. Then it answers for
new scenes with merges, for which it was not trained. Every method keeps as many tokens in each block as a budget of
multiply-adds allows, its own matching counted.
"""

import argparse
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vistok.data.shapes import COLORS, SHAPES, Config, Shapes, render
from vistok.merging.flops import count_macs
from vistok.merging.tome import Random
from vistok.merging.vit import METHODS, Method, merge_tokens
from vistok.rng import derive_seed, seeded_generator

JITTER = 3
"""Pixels by which the object may stand off the middle, along each axis."""

Data = tuple[Float[Tensor, "N 3 H W"], Int[Tensor, "N 2"]]


def scenes(count: int, crop_px: int, seed: int) -> Data:
    """Crops around an object, wider than a classifier sees by the jitter at each side, and its shape and colour.

    They are half as wide as the scene, in which two or three different objects stand. All come from the training split,
    whose pairs of shape and colour are the same everywhere; the seed names the world.
    """
    world = Shapes(Config(train_count=10 * count, seed=seed), "train", 2 * crop_px)
    images, labels, index = [], [], 0
    while len(images) < count:
        scene = world.scene(index)
        index += 1
        if len({thing.shape for thing in scene.objects}) < 2:
            continue
        thing = scene.objects[0]
        margin = crop_px // 2 + JITTER
        padded = F.pad(render(scene, world.image_size_px), [margin] * 4, value=2 * scene.background - 1)
        left, top = (round(centre * world.image_size_px) for centre in (thing.x, thing.y))
        images.append(padded[:, top : top + 2 * margin, left : left + 2 * margin])
        labels.append((SHAPES.index(thing.shape), list(COLORS).index(thing.color)))
    return torch.stack(images), torch.tensor(labels)


def crop(images: Float[Tensor, "N 3 h w"], rng: torch.Generator) -> Float[Tensor, "N 3 H W"]:
    """As a classifier sees them, each with a jitter of its own."""
    starts = torch.randint(2 * JITTER + 1, (len(images), 2), generator=rng).tolist()
    side = images.shape[-1] - 2 * JITTER
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, starts)])


def answers(model: nn.Module, images: Float[Tensor, "N 3 H W"]) -> tuple[Float[Tensor, "N s"], Float[Tensor, "N c"]]:
    shapes, colors = model(images).split([len(SHAPES), len(COLORS)], dim=1)
    return shapes, colors


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percentage of images with both answers right."""
    right = [
        torch.stack([logits.argmax(1) for logits in answers(model, images)], 1).eq(labels).all(1)
        for images, labels in zip(*(part.split(250) for part in data))
    ]
    return 100 * torch.cat(right).float().mean().item()


def train(args: argparse.Namespace, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(derive_seed("merging classifier", seed))
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=args.image_size,
        patch_size=args.patch_size,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=args.width // 32,
        num_classes=len(SHAPES) + len(COLORS),
        class_token=args.pool == "token",
        global_pool=args.pool,
        fc_norm=False,
    )
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.updates)
    rng = seeded_generator("merging classifier", seed)
    images, labels = data
    for _ in range(args.updates):
        rows = torch.randint(len(images), (args.batch,), generator=rng)
        batch = crop(images[rows], rng)
        flipped = torch.rand(args.batch, generator=rng) < 0.5  # every shape is its own mirror image
        batch[flipped] = batch[flipped].flip(3)
        loss = sum(F.cross_entropy(logits, label) for logits, label in zip(answers(model, batch), labels[rows].T))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def ratio_within(model: nn.Module, image: Float[Tensor, "1 3 H W"], method: Method, macs: float) -> float:
    """The largest share of tokens to keep in each block, in thousandths, that costs at most ``macs``."""
    low, high = 500, 1000
    while low < high:
        middle = (low + high + 1) // 2
        with merge_tokens(model, method, ratio=middle / 1000):
            low, high = (middle, high) if count_macs(model, image) <= macs else (low, middle - 1)
    return low / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"updates": 1200, "batch": 32, "image-size": 32, "patch-size": 4, "width": 64, "depth": 4}
    for name, default in (sizes | {"train-count": 8_000, "test-count": 1_000}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pool", choices=("token", "avg"), default="token", help="what the answers are read from")
    parser.add_argument(
        "--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[0.7, 0.5, 0.35]
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    train_data, test_data = scenes(args.train_count, args.image_size, 0), scenes(args.test_count, args.image_size, 1)
    print(f"scenes drawn after {time.process_time() - started:.0f} processor seconds")
    test_data = crop(test_data[0], seeded_generator("merging classifier", "test")), test_data[1]
    image = test_data[0][:1]
    rows: dict[tuple[float, str], list[float]] = {}
    kept: dict[tuple[float, str], tuple[list[int], float]] = {}
    for seed in args.seeds:
        model = train(args, train_data, seed)
        whole = count_macs(model, image)
        rows.setdefault((1.0, "none"), []).append(accuracy(model, test_data))
        with merge_tokens(model, r=0) as merging:
            kept[1.0, "none"] = merging.lengths, 1.0
        methods = {"pitome": METHODS["pitome"], "tome": METHODS["tome"], "random": Random(seed)}
        for budget in args.budgets:
            for name, method in methods.items():
                ratio = ratio_within(model, image, method, budget * whole)
                with merge_tokens(model, method, ratio=ratio) as merging:
                    kept[budget, name] = merging.lengths, count_macs(model, image) / whole
                    rows.setdefault((budget, name), []).append(accuracy(model, test_data))
        last = ", ".join(f"{name} {values[-1]:.1f}" for (_, name), values in rows.items())
        print(f"seed {seed}: {last} after {time.process_time() - started:.0f} processor seconds", flush=True)
    print(f"unmerged: {whole / 1e6:.1f} million multiply-adds; torch {torch.__version__}; {args.test_count} scenes")
    print(f"mean and standard deviation over {len(args.seeds)} seeds; tokens behind the last block")
    print(f"{'budget':>6}  {'method':8s}  {'share':>5}  tokens  accuracy, %  lost to merging, points")
    for (budget, name), values in rows.items():
        lengths, share = kept[budget, name]
        lost = [before - after for before, after in zip(rows[1.0, "none"], values)]
        print(f"{budget:6.2f}  {name:8s}  {share:.3f}  {lengths[-1]:6d}  {over_seeds(values)}  {over_seeds(lost)}")


def over_seeds(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):5.1f} ± {spread:4.1f}"


if __name__ == "__main__":
    main()
