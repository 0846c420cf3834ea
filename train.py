"""Train a tokenizer, or a generator on the tokens of one."""

from __future__ import annotations

import argparse

from vistok import cli
from vistok.config import available, to_yaml

EPILOG = """\
examples:
  python train.py --config configs/digits/flextok.yaml
  python train.py --config configs/digits/gpt.yaml tokenizer=runs/digits/flextok trainer.max_updates=500
  python train.py --config configs/digits/flextok.yaml output=runs/digits/flextok resume=auto

components ({{name: NAME, args: {{...}}}}; a dotted name reaches a module outside vistok):
  tokenizer     {tokenizers}
  generator     {generators}
  text_encoder  {text_encoders}
  data          {data}
"""


def main() -> None:
    """Parse the command line and train."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("tokenizers", "generators", "text_encoders", "data")
    parser.epilog = EPILOG.format(**{kind: ", ".join(available(kind)) for kind in kinds})
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run (see configs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the file")
    parser.add_argument("--print-config", action="store_true", help="print the whole resolved config and exit")
    args = parser.parse_intermixed_args()

    from vistok.training.run import train  # slow to import
    from vistok.training.run_config import load_config

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
    else:
        train(config)


if __name__ == "__main__":
    cli.main(main)
