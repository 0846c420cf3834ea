"""HiPrune in a LLaVA: what the choice costs next to the vision tower, and what it saves in the prompt's pass.

python benchmarks/hiprune.py [--tower-depth 12 --depth 8 --width 1024 --repeats 3]

Random weights: the tower is CLIP-L/14 at 336 px (576 tokens) with fewer layers, the language model a LLaMA; one thread.
Everything is timed in turn in one process (its own CPU time) and stated as medians of ratios.
"""

import argparse
import platform
import time
from statistics import median

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vistok.merging.hiprune import HiPrune

IMAGE = 31


def model_of(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    vision |= {"num_hidden_layers": args.tower_depth, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    text = {"model_type": "llama", "vocab_size": 32, "hidden_size": args.width, "intermediate_size": 4 * args.width}
    text |= {"num_hidden_layers": args.depth, "num_attention_heads": args.width // 64}
    text |= {"num_key_value_heads": args.width // 64}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()


def seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tower-depth", 12), ("depth", 8), ("width", 1024), ("words", 40), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(args)
    pixels = torch.randn(1, 3, 336, 336)
    ids = torch.tensor([[1] * (args.words // 2) + [IMAGE] * 576 + [2] * (args.words - args.words // 2)])
    tower, pruned_tower, savings = [], [], {budget: [] for budget in args.budgets}
    features = model.model.get_image_features(pixels)
    for _ in range(args.repeats):
        tower.append(seconds(lambda: model.model.get_image_features(pixels)))
        with HiPrune(model, args.budgets[0]):
            pruned_tower.append(seconds(lambda: model.model.get_image_features(pixels)))
        plain = seconds(lambda: model(input_ids=ids, mm_encoder_outputs={"image": features}))
        for budget, ratios in savings.items():
            with HiPrune(model, budget):
                model.model.get_image_features(pixels)
                ratios.append(plain / seconds(lambda: model(input_ids=ids, mm_encoder_outputs={"image": features})))
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread; tower {median(tower):.2f} s")
    share = median(slow / fast for slow, fast in zip(pruned_tower, tower)) - 1
    print(f"choosing tokens: {share:+.1%} of the tower's time")
    for budget, ratios in savings.items():
        tokens = f"{args.words + 576} -> {args.words + budget} tokens"
        print(f"budget {budget:4d}: {tokens}, prompt {median(ratios):.2f}x as fast")


if __name__ == "__main__":
    main()
