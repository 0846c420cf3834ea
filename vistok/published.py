"""Turn a released checkpoint into an export folder that every command line takes.

examples:
  python -m vistok.published flextok EPFL-VILAB/flextok_d12_d12_in1k --out weights/flextok_d12_d12
  python -m vistok.published vqgan FoundationVision/LlamaGen/vq_ds16_c2i.pt --out weights/vq16
  python -m vistok.published masked tokenbridge_large --tokenizer weights/tokenbridge_kl16 \\
      --out weights/tokenbridge_large
  python -m vistok.published gpt t2i_XL_stage1_256.pt --tokenizer weights/vq16_t2i \\
      --text-encoder weights/flan-t5-xl --out weights/llamagen_t2i
"""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import Any

from vistok import cli
from vistok.checkpoint import export, export_hash, export_info, load_tokenizer, seen_from
from vistok.config import Component, available, component_config, component_module, to_plain
from vistok.errors import UserError
from vistok.files import new_folder
from vistok.tokens import TokenSpec


def main() -> None:
    """Parse the command line and convert."""
    parser = cli.ArgumentParser(
        prog="python -m vistok.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"tokenizer or generator that has a release: {', '.join(released_models())}")
    parser.add_argument("source", help="folder or file of the release, or a repository of the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="export folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="of a generator: export of the tokenizer whose tokens it models"
    )
    parser.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="of a generator conditioned on text: folder or hub repository of what reads it (default: as released)",
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
    with new_folder(args.out) as out:
        model = module.from_published(args.source, **options)
        component = Component(args.model, to_plain(model.config))
        extra = {"weights": "published", "source": args.source}
        if kind == "generator":
            extra |= modelled(args.tokenizer, model.spec, args.out)
            model.adopt(load_tokenizer(args.tokenizer))
        if kind == "generator" and model.text_width:
            released, given = module.PUBLISHED_TEXT_ENCODER, {"path": args.text_encoder} if args.text_encoder else {}
            where = {"path": args.source, **released.args, **given, "max_length": model.text_positions}
            extra |= read_by(Component(released.name, where), args.out)
        elif args.text_encoder is not None:
            raise UserError(f"--text-encoder is for generators conditioned on text, {args.source} is not")
        helpers = model.frozen_helpers if kind == "tokenizer" else None
        export(out, kind, component, model.spec, model.state_dict(), extra, helpers)
    scale = f", scaling_factor {component.args['scaling_factor']}" if "scaling_factor" in component.args else ""
    print(f"{args.out}: {args.model}, {model.spec.image_size_px} px, {model.spec.num_positions} tokens{scale}")


def released_models() -> list[str]:
    """Names of the models that read a released checkpoint."""
    kinds = ("tokenizers", "generators")
    names = ((kind, name) for kind in kinds for name in available(kind))
    return [name for kind, name in names if hasattr(component_module(kind, name), "from_published")]


def modelled(tokenizer: Path, spec: TokenSpec, out: Path) -> dict[str, Any]:
    """What an export in ``out`` says about the tokenizer whose tokens a generator models.

    Raises:
        UserError: if its tokens are of another shape than ``spec``.
    """
    found = export_info(tokenizer)["spec"]
    if found != spec:
        raise UserError(f"{tokenizer} makes tokens of {found}, the generator models {spec}")
    return {"tokenizer": os.path.relpath(tokenizer, out), "tokenizer_hash": export_hash(tokenizer)}


def read_by(text_encoder: Component, out: Path) -> dict[str, Any]:
    """What an export in ``out`` says about the text encoder in front of a generator, all its defaults written out."""
    args = to_plain(component_config("text_encoders", text_encoder))
    return {"text_encoder": to_plain(seen_from(out, Component(text_encoder.name, args)))}


if __name__ == "__main__":
    cli.main(main)
