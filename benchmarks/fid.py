"""FID of two folders of images against torch-fidelity, with the same weights; and the memory of generation metrics.

python benchmarks/fid.py [--count 64 --size 64 --batch-size 16 --runs 2]
python benchmarks/fid.py --memory 2000 10000 50000

Without --weights the Inception has random weights in the published layout. Our side computes all that generation
metrics need (FID, sFID and both Inception scores; the pool features are kept), torch-fidelity's the FID alone. --memory
measures so many digits through their small feature network, each number of images in a fresh process.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch_fidelity
from memory import in_fresh_process, peak_bytes
from random_inception import write_random_inception

from vistok.data.datamodule import load_data
from vistok.eval import features
from vistok.eval.features import load_features
from vistok.eval.fid import frechet_distance
from vistok.eval.image_statistics import ImageStatistics
from vistok.eval.images import open_images, uint8_batches
from vistok.eval.reference import MOST_IMAGES
from vistok.pictures import save_png, to_pil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 64), ("size", 64), ("batch-size", 16), ("runs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weights", type=Path, help="the published file (default: random weights)")
    parser.add_argument("--memory", type=int, nargs="*", help="numbers of images")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if args.memory:
        for count in args.memory:
            before, after = in_fresh_process(peaks, count)
            grown = (after - before) / 1e6
            print(f"{count} images: peak {after / 1e6:.0f} MB, {grown:.1f} MB above that of the first 100")
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    for name, blur in (("real", 5), ("fake", 9)):
        noise = torch.rand(args.count, 3, args.size + blur - 1, args.size + blur - 1)
        smooth = F.avg_pool2d(noise, blur, 1)
        images = ((smooth - smooth.mean()) / smooth.std() * 50 + 128).clamp(0, 255).to(torch.uint8)
        for index, image in enumerate(images):
            save_png(to_pil(image), folder / name / f"{index:05d}.png")
    weights = args.weights or write_random_inception(folder / "weights.pth", images[:8])
    with patch.object(features, "INCEPTION_SHA256_PREFIX", features.INCEPTION_SHA256_PREFIX if args.weights else ""):
        network = load_features(f"inception:{weights}")

    def ours() -> float:
        gaussians = []
        for name in ("real", "fake"):
            statistics = ImageStatistics(network, args.count, MOST_IMAGES)
            for batch in uint8_batches(open_images(str(folder / name)), args.batch_size):
                statistics.update(*batch)
            gaussians.append(statistics.gaussians()["pool"])
        return frechet_distance(*gaussians).item()

    def theirs() -> float:
        found = torch_fidelity.calculate_metrics(
            input1=str(folder / "real"),
            input2=str(folder / "fake"),
            fid=True,
            cuda=False,
            cache=False,
            verbose=False,
            save_cpu_ram=True,  # no loader processes, whose time would not be counted
            batch_size=args.batch_size,
            feature_extractor_weights_path=str(weights),
        )
        return found["frechet_inception_distance"]

    print(f"2 x {args.count} images of {args.size} px, batch {args.batch_size}, best of {args.runs}")
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.runs):
        for name, run in (("torch-fidelity", theirs), ("vistok", ours)):
            seconds, value = timed(run)
            best[name] = min(best.get(name, (seconds, value)), (seconds, value))
    for name, (seconds, value) in best.items():
        rate = 2 * args.count / seconds
        print(f"{name}: FID-{args.count} {value:.6f}, {seconds:.1f} processor seconds, {rate:.2f} images/s")
    (theirs_s, theirs_fid), (ours_s, ours_fid) = best["torch-fidelity"], best["vistok"]
    print(f"ratio {theirs_s / ours_s:.2f}, relative difference of the values {abs(ours_fid / theirs_fid - 1):.1e}")


def timed(run: Callable[[], float]) -> tuple[float, float]:
    """Processor seconds, which other work on the machine disturbs least, and the value."""
    started = time.process_time()
    value = run()
    return time.process_time() - started, value


def peaks(count: int) -> tuple[int, int]:
    """Peak memory after 100 and after ``count`` digits, as often as there must be."""
    network = load_features("digits")
    dataset = load_data("digits", "train", 16)
    batches = list(uint8_batches(dataset, 100))
    statistics = ImageStatistics(network, count, MOST_IMAGES)
    statistics.update(*batches[0])
    before = peak_bytes("cpu")
    for index in range(1, count // 100):
        images, labels, _ = batches[index % len(batches)]
        statistics.update(images, labels, torch.arange(100 * index, 100 * index + len(images)))
    statistics.gaussians()
    statistics.inception_scores()
    return before, peak_bytes("cpu")


if __name__ == "__main__":
    main()
