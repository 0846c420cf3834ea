"""Turn a released checkpoint into an export folder that every command line takes.

python -m vistok.published flextok EPFL-VILAB/flextok_d12_d12_in1k --out weights/flextok_d12_d12
"""

from __future__ import annotations

from pathlib import Path

from vistok import cli
from vistok.checkpoint import export
from vistok.config import Component, component_module, to_plain
from vistok.errors import UserError


def main() -> None:
    """Parse the command line and convert."""
    parser = cli.ArgumentParser(prog="python -m vistok.published", description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", help="name of the model, such as flextok")
    parser.add_argument("source", help="folder or file of the release, or a repository of the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="export folder to write")
    args = parser.parse_args()
    module = component_module("tokenizers", args.tokenizer)
    if not hasattr(module, "from_published"):
        raise UserError(f"{args.tokenizer} has no released checkpoints that can be read")
    if args.out.exists():
        raise UserError(f"{args.out} exists: give another --out")
    model = module.from_published(args.source)
    component = Component(args.tokenizer, to_plain(model.config))
    extra = {"weights": "published", "source": args.source}
    export(args.out, "tokenizer", component, model.spec, model.state_dict(), extra, model.frozen_helpers)
    print(f"{args.out}: {args.tokenizer}, {model.spec.image_size_px} px, {model.spec.num_positions} tokens")


if __name__ == "__main__":
    cli.main(main)
