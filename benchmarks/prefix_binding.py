"""Does semantic binding on the text prefix help a trained generator to give each object its colour?

python benchmarks/prefix_binding.py --checkpoint runs/shapes/gpt_text [--cfg-scale 4 --per-prompt 4 --prompts 100]

GenEval's colour attribution on shapes (two objects with a colour each, held-out pairs), the same prompts and the same
noise for the plain states of the texts, composite states with three pairs of weights, and words read alone; the edits
act on the states of the text encoder, then on what the generator's own blocks make of these.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vistok.checkpoint import load_text_encoder
from vistok.data.datamodule import load_images
from vistok.eval import geneval
from vistok.eval.detectors import WorldDetector
from vistok.geneval_rules import Entry, spread
from vistok.interfaces import SampleOptions, TextCondition, TextEncoder
from vistok.merging.entities import Entity
from vistok.merging.text_states import composite, reading_apart, uncontextualised
from vistok.pipeline import Prompts, load_models

TASK = "color_attr"
Edit = Callable[[TextEncoder, list[str], list[list[Entity]]], TextCondition]


class EditedPrompts(Prompts):
    def __init__(self, encoder: TextEncoder, entries: list[Entry], edit: Edit | None) -> None:
        super().__init__(encoder, [entry["prompt"] for entry in entries])
        self.entities = [[Entity(part["class"], (part["color"],)) for part in entry["include"]] for entry in entries]
        self.edit = edit

    def __getitem__(self, rows: slice) -> TextCondition:
        if self.edit is None:
            return super().__getitem__(rows)
        return self.edit(self.encoder, self.texts[rows], self.entities[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()

    generator, tokenizer, _ = load_models(args.checkpoint, args.tokenizer)
    encoder = load_text_encoder(args.checkpoint)
    world = load_images("shapes", "val", tokenizer.spec.image_size_px)
    entries = spread(world.geneval_prompts()[TASK], args.prompts)
    detector = WorldDetector(world, {})
    edits: dict[str, Edit] = {
        "composite, 1.1 noun + 1.2 attribute": composite,
        "composite, plain sum": partial(composite, noun_weight=1.0, attribute_weight=1.0),
        "composite, mean": partial(composite, noun_weight=0.5, attribute_weight=0.5),
        "words read alone": uncontextualised,
    }
    print(f"{TASK}: {len(entries)} prompts x {args.per_prompt}, cfg-scale {args.cfg_scale:g}")

    def measure(name: str, encoder: TextEncoder, edit: Edit | None) -> None:
        prompts = EditedPrompts(encoder, [entry for entry in entries for _ in range(args.per_prompt)], edit)
        length = tokenizer.spec.num_positions
        options, seed, batch_size = SampleOptions(cfg_scale=args.cfg_scale), 0, 100
        samples = geneval.generated_samples(
            generator, tokenizer, prompts, args.per_prompt, options, [length], seed, batch_size, {}
        )
        records, _ = geneval.measure_geneval(detector, dict(enumerate(entries)), samples)
        rights = torch.tensor([float(record["correct"]) for record in records[str(length)]])
        print(f"{name:60} {rights.mean():.3f} ± {rights.std() / len(rights) ** 0.5:.3f}", flush=True)

    measure("plain", encoder, None)
    for name, edit in edits.items():
        measure(name, encoder, edit)
    with reading_apart(generator, encoder) as reader:
        for name, edit in edits.items():
            measure(f"{name}, in what text_depth blocks read", reader, edit)


if __name__ == "__main__":
    main()
