"""Turn a released checkpoint into an export folder that every command line takes.

python -m vistok.published flextok EPFL-VILAB/flextok_d12_d12_in1k --out weights/flextok_d12_d12
python -m vistok.published vqgan FoundationVision/LlamaGen/vq_ds16_c2i.pt --out weights/vq16
python -m vistok.published masked tokenbridge_large --tokenizer weights/tokenbridge_kl16 --out weights/tokenbridge_large
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from vistok import cli
from vistok.checkpoint import export, export_hash, export_info, load_tokenizer
from vistok.config import Component, available, component_module, to_plain
from vistok.errors import UserError
from vistok.tokens import TokenSpec


def main() -> None:
    """Parse the command line and convert."""
    parser = cli.ArgumentParser(prog="python -m vistok.published", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name of the tokenizer or generator, such as flextok")
    parser.add_argument("source", help="folder or file of the release, or a repository of the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="export folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="of a generator: export of the tokenizer whose tokens it models"
    )
    parser.add_argument(
        "--image-size", type=cli.positive_int, metavar="PX", help="of a model for any size (default: as released)"
    )
    args = parser.parse_args()
    kind = "generator" if args.model in available("generators") else "tokenizer"
    module = component_module(f"{kind}s", args.model)
    if not hasattr(module, "from_published"):
        raise UserError(f"{args.model} has no released checkpoints that can be read")
    if (kind == "generator") != (args.tokenizer is not None):
        raise UserError(f"{args.model} is a {kind}: --tokenizer is for generators, which need it")
    options = {} if args.image_size is None else {"image_size": args.image_size}
    if options.keys() - inspect.signature(module.from_published).parameters.keys():
        raise UserError(f"{args.model} has the image size of its release: leave out --image-size")
    if args.out.exists():
        raise UserError(f"{args.out} exists: give another --out")
    model = module.from_published(args.source, **options)
    component = Component(args.model, to_plain(model.config))
    extra = {"weights": "published", "source": args.source}
    if kind == "generator":
        extra |= modelled(args.tokenizer, model.spec, args.out)
        model.adopt(load_tokenizer(args.tokenizer))
    helpers = model.frozen_helpers if kind == "tokenizer" else None
    scale = f", scaling_factor {component.args['scaling_factor']}" if "scaling_factor" in component.args else ""
    export(args.out, kind, component, model.spec, model.state_dict(), extra, helpers)
    print(f"{args.out}: {args.model}, {model.spec.image_size_px} px, {model.spec.num_positions} tokens{scale}")


def modelled(tokenizer: Path, spec: TokenSpec, out: Path) -> dict[str, Any]:
    """What an export in ``out`` says about the tokenizer whose tokens a generator models.

    Raises:
        UserError: if its tokens are of another shape than ``spec``.
    """
    found = export_info(tokenizer)["spec"]
    if found != spec:
        raise UserError(f"{tokenizer} makes tokens of {found}, the generator models {spec}")
    return {"tokenizer": os.path.relpath(tokenizer, out), "tokenizer_hash": export_hash(tokenizer)}


if __name__ == "__main__":
    cli.main(main)
