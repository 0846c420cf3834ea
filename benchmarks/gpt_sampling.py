"""GPT sampling against LlamaGen's way of doing it with the same weights: ratios, all measured in the same run.

python benchmarks/gpt_sampling.py [--ways plain,fused,ours,unpacked,short,bf16,bf16-unpacked,compiled] [--runs 2]

plain          a cache of full length, one row of a mask over all of it in every step, unfused attention (which
               LlamaGen forces), the guided batch to the end, top-k by sorting
fused          the same with fused attention
ours           GPT.generate
unpacked       without packed weights
short          guided over the first quarter of the codes only (other codes; plain cannot leave anything out)
bf16           under autocast, with packed weights
bf16-unpacked  under autocast
compiled       options.compile, without the time of the first call

Ids of two ways part at the first draw that falls so close to the edge between two codes that the rounding of float32
decides. So each way is also held against double precision: how many of its draws come out otherwise there, from the
same codes before them, and how far from the edge (a share of the probability) the farthest of them is.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vistok.generators.gpt import GPT, Config, build
from vistok.interfaces import ClassCondition, SampleOptions
from vistok.nn.rope import rotate
from vistok.rng import SampleRng
from vistok.tokens import Grid2D, TokenSpec

CFG_SCALE, TOP_K = 2.0, 2000


@torch.no_grad()
def plain(model: GPT, classes: Tensor, backend: SDPBackend) -> Tensor:
    """Ids ``(B, N)``; each draw inverts the distribution at the same number as ours, so that ids can be compared."""
    count, batch, device = model.spec.num_positions, len(classes), classes.device
    uniform = SampleRng.from_seed(0, batch).uniform(count, 1)[:, :, 0].double().to(device)
    x = model.condition.table(torch.cat([classes, torch.full_like(classes, model.num_classes)]))[:, None]
    heads, width = model.config.heads, model.config.width
    caches = torch.zeros(len(model.blocks), 2, 2 * batch, heads, count, width // heads, device=device)
    visible = torch.ones(count, count, dtype=torch.bool, device=device).tril()
    ids = torch.zeros(batch, count, dtype=torch.int64, device=device)
    with sdpa_kernel(backend):
        for position in range(count):
            here = slice(position, position + 1)
            mask = visible[here].expand(2 * batch, 1, 1, count)
            for block, cache in zip(model.blocks, caches):
                q, k, v = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (3, heads, -1)).unbind(2)
                q, k = (rotate(part.transpose(1, 2), (model._cos[here], model._sin[here])) for part in (q, k))
                cache[0, :, :, here], cache[1, :, :, here] = k, v.transpose(1, 2)
                y = F.scaled_dot_product_attention(q, cache[0], cache[1], mask)
                x = x + block.attention.out(y.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.mlp_norm(x))
            given, null = model.adapter.head(model.norm(x))[:, 0].float().chunk(2)
            logits = null + CFG_SCALE * (given - null)
            least = logits.sort(dim=-1, descending=True).values[:, TOP_K - 1 : TOP_K]
            cumulative = logits.masked_fill(logits < least, -torch.inf).double().softmax(-1).cumsum(-1)
            target = uniform[:, position, None] * cumulative[:, -1:]
            ids[:, here] = torch.searchsorted(cumulative, target, right=True)
            x = model.adapter.embedding(ids[:, here]).repeat(2, 1, 1)
    return ids


def rotate_in_double(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions; those of the model are float32 always."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*table)
    return torch.view_as_real(turned).flatten(-2)


@torch.no_grad()
def otherwise(model: GPT, classes: Tensor, ids: Tensor) -> tuple[int, float]:
    """Draws of ``ids`` that the double-precision ``model`` makes otherwise, and the largest distance from the edge."""
    condition = ClassCondition(classes)
    with patch("vistok.nn.attention.rotate", rotate_in_double):
        given, null = (model.logits(ids[:, :, None], each) for each in (condition, condition.null()))
    logits = null + CFG_SCALE * (given - null)
    least = logits.topk(TOP_K, dim=-1).values[..., -1:]
    cumulative = logits.masked_fill(logits < least, -torch.inf).softmax(-1).cumsum(-1)
    uniform = SampleRng.from_seed(0, len(classes)).uniform(ids.shape[1], 1).double().to(ids.device)
    target = uniform * cumulative[..., -1:]
    wrong = torch.searchsorted(cumulative, target, right=True)[..., 0] != ids
    edges = F.pad(cumulative, (1, 0)).gather(-1, torch.stack([ids, ids + 1], dim=-1))
    distance = (edges - target).abs().amin(-1)[wrong]
    return int(wrong.sum()), distance.max().item() if len(distance) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = Config()
    for name, default in (("width", config.width), ("depth", config.depth), ("side", 16), ("batch", 4), ("runs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head-std", type=float, default=0.2, help="of the random head: how sure the model is")
    parser.add_argument("--ways", default="plain,fused,ours,unpacked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    spec = TokenSpec(Grid2D(args.side, args.side), (16384,), 8, 16 * args.side)
    model = build(Config(width=args.width, depth=args.depth, heads=args.width // 64), spec).to(args.device).eval()
    torch.nn.init.normal_(model.adapter.head.weight, std=args.head_std)
    classes = torch.arange(args.batch, device=args.device) % model.num_classes

    def ours(**options) -> Tensor:
        options = SampleOptions(cfg_scale=CFG_SCALE, top_k=TOP_K, **options)
        return model.generate(ClassCondition(classes), options, SampleRng.from_seed(0, args.batch)).ids[:, :, 0]

    def bf16() -> Tensor:
        with torch.autocast(args.device, torch.bfloat16):
            return ours()

    all_: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain(model, classes, SDPBackend.MATH),
        "fused": lambda: plain(model, classes, [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]),
        "ours": ours,
        "unpacked": ours,
        "short": lambda: ours(guidance_interval=(0, 0.25)),
        "bf16": bf16,
        "bf16-unpacked": bf16,
        "compiled": lambda: ours(compile=True),
    }
    # Neighbours on a busy machine hardly change the seconds of a processor.
    clock = time.perf_counter if args.device == "cuda" else time.process_time

    def run(way: str) -> tuple[float, Tensor]:
        most = patch("vistok.nn.packed._LEAST_WEIGHTS", 1 << 60) if way.endswith("unpacked") else nullcontext()
        with most:
            started = clock()
            ids = all_[way]().cpu()
            return clock() - started, ids

    ways = args.ways.split(",")
    if "compiled" in ways:
        run("compiled")
    print(f"GPT {args.width} x {args.depth}, {spec.num_positions} codes, batch {args.batch}, guided, {args.device}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    results = [{way: run(way) for way in ways} for _ in range(args.runs)]
    first, ids = ways[0], results[0][ways[0]][1]
    exact = deepcopy(model).double()
    for way in ways:
        seconds = statistics.median(result[way][0] for result in results)
        ratio = statistics.median(result[first][0] / result[way][0] for result in results)
        same = (results[0][way][1] == ids).double().mean().item()
        line = f"{way:14s} {seconds:7.2f} s, {ratio:5.2f} x as fast as {first}, {same:.1%} of its ids"
        if way != "short":
            wrong, distance = otherwise(exact, classes, results[0][way][1].to(args.device))
            line += f"; {wrong} of {ids.numel()} draws not as in double precision, at most {distance:.0e} from an edge"
        print(line, flush=True)


if __name__ == "__main__":
    main()
