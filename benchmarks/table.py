"""Every tokenizer and its generator, trained at equal budget and measured alike: one table and one picture.

python benchmarks/table.py [--systems benchmarks/table.yaml --out runs/table --budget 1 --jobs 2] --table FILE.md

Runs the commands that a user would type (train.py, vistok.discretize, vistok.eval), each with a log in OUT/logs.
Finished ones are not run again, interrupted ones go on; one that fails is reported in a line and the others go on. The
budget is equal in images seen, not in seconds: so a run can be repeated to the bit, on any machine, busy or not, and
learning rates know where they end; what an image costs stands beside the quality. --budget 0.1 trains on a tenth of
them.
"""

import argparse
import math
import os
import shlex
import signal
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING
from stages import Stage, Stages
from table_page import Outcome, page, plot, read_outcome

from vistok import cli
from vistok.config import read_yaml, typed
from vistok.errors import UserError
from vistok.files import write_text


@dataclass
class System:
    """A tokenizer and, unless it is continuous, the generator on its tokens.

    Args:
        title: its name in the table.
        tokenizer: config that trains it, and overrides; or empty with ``of``.
        of: the system whose continuous tokenizer is made discrete.
        discretize: flags of that.
        generator: config that trains it, and overrides; empty without one.
        tokens: numbers of tokens to sample, K,K,...; empty for all tokens only.
    """

    title: str = MISSING
    tokenizer: str = ""
    of: str = ""
    discretize: str = ""
    generator: str = ""
    tokens: str = ""


@dataclass
class Group:
    """The systems of one data set, with one budget and one protocol.

    Args:
        tokenizer_images: that each tokenizer is trained on.
        generator_images: that each generator is trained on.
        reconstruction: flags of ``vistok.eval reconstruction``.
        generation: flags of ``vistok.eval generation``.
        speed: flags of ``sampling_speed.py``.
        geneval: flags of ``vistok.eval geneval``; empty for none.
        teacher: data of ``vistok.eval train-teacher``; empty for none.
        teacher_epochs: of that.
        systems: by the name of their folder.
    """

    tokenizer_images: int = MISSING
    generator_images: int = MISSING
    reconstruction: str = MISSING
    generation: str = MISSING
    speed: str = MISSING
    geneval: str = ""
    teacher: str = ""
    teacher_epochs: int = 80
    systems: dict[str, System] = field(default_factory=dict)


def stages_of(group: Group, out: Path, budget: float) -> list[Stage]:
    """The commands of one data set, whose results go to the folder ``out``."""
    stages = []
    if group.teacher:
        weights, epochs = out / "teacher.safetensors", math.ceil(group.teacher_epochs * budget)
        command = ("-m", "vistok.eval", "train-teacher", group.teacher, "--out", str(weights), "--epochs", str(epochs))
        stages.append(Stage(f"{out.name}/teacher", command, weights))
    for key in group.systems:
        stages += system_stages(group, key, out, budget)
    return stages


def system_stages(group: Group, key: str, out: Path, budget: float) -> list[Stage]:
    """Make the tokens, train the generator, measure."""
    system, folder = group.systems[key], out / key
    tokenizer, generator = (f"{out.name}/{key}/{part}" for part in ("tokenizer", "generator"))
    tokens = ("--tokens", system.tokens) if system.tokens else ()

    def training(part: str, words: str, images: int, *more: str, needs: tuple[str, ...]) -> Stage:
        config, *overrides = shlex.split(words.format(out=out))
        length = ("trainer.max_updates=null", f"trainer.max_images={math.ceil(images * budget)}", "resume=auto")
        command = ("train.py", "--config", config, *overrides, *more, f"output={folder / part}", *length)
        return Stage(f"{out.name}/{key}/{part}", command, folder / part / "spec.json", needs, resumes=True)

    def measuring(task: str, flags: str, part: str, *more: str) -> Stage:
        command = ("-m", "vistok.eval", task, "--checkpoint", str(folder / part), *shlex.split(flags), *more)
        needs, makes = (f"{out.name}/{key}/{part}",), folder / f"{task}.json"
        return Stage(f"{out.name}/{key}/{task}", (*command, "--out", str(folder)), makes, needs)

    if system.of:
        base, made = out / system.of / "tokenizer", folder / "tokenizer"
        command = ("-m", "vistok.discretize", "--tokenizer", str(base), *shlex.split(system.discretize))
        needs = (f"{out.name}/{system.of}/tokenizer",)
        stages = [Stage(tokenizer, (*command, "--out", str(made)), made / "spec.json", needs, clears=made)]
    else:
        needs = (f"{out.name}/teacher",) if "teacher" in system.tokenizer else ()
        stages = [training("tokenizer", system.tokenizer, group.tokenizer_images, needs=needs)]
    if system.generator:
        under = f"tokenizer={folder / 'tokenizer'}"
        stages.append(training("generator", system.generator, group.generator_images, under, needs=(tokenizer,)))
        stages.append(measuring("generation", group.generation, "generator", *tokens))
        if group.geneval:
            stages.append(measuring("geneval", group.geneval, "generator"))
        command = ("benchmarks/sampling_speed.py", "--checkpoint", str(folder / "generator"))
        words = (*shlex.split(group.speed), *tokens, "--out", str(folder / "speed.json"))
        name = f"{out.name}/{key}/speed"
        stages.append(Stage(name, (*command, *words), folder / "speed.json", (generator,), alone=True))
    return [*stages, measuring("reconstruction", group.reconstruction, "tokenizer")]


def outcomes_of(group: Group, out: Path, failed: dict[str, str]) -> list[Outcome]:
    """What the stages of one data set have left, but for those that failed."""
    found = []
    for key, system in group.systems.items():
        names = [stage.name for stage in system_stages(group, key, out, 1.0) if stage.name not in failed]
        trained = {"tokenizer": out / (system.of or key) / "tokenizer", "generator": out / key / "generator"}
        found.append(read_outcome(system.title, out / key, trained, {name.rpartition("/")[2] for name in names}))
    return found


def budget_of(group: Group, budget: float) -> str:
    """In words."""
    images = [f"{math.ceil(number * budget):,}" for number in (group.tokenizer_images, group.generator_images)]
    words = f"Every tokenizer was trained on {images[0]} images, every generator on {images[1]}."
    if group.teacher:
        epochs = math.ceil(group.teacher_epochs * budget)
        words += f" The teacher of those that distil one was trained for {epochs} epochs of the same images besides."
    return words


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = Path(__file__).parent
    add("--systems", type=Path, default=here / "table.yaml", metavar="FILE", help="default: %(default)s")
    add("--out", type=Path, default=Path("runs/table"), metavar="DIR", help="runs and logs (default: %(default)s)")
    add("--table", type=Path, metavar="FILE.md", help="page, with a picture beside it (default: OUT/table.md)")
    add("--budget", type=share, default=1.0, metavar="SHARE", help="of the images of training (default: 1)")
    add("--jobs", type=cli.positive_int, default=cores(), help="stages at a time (default: the cores, %(default)s)")
    add("--threads", type=cli.positive_int, default=1, help="of each stage (default: %(default)s)")
    args = parser.parse_args()
    args.table = args.table or args.out / "table.md"
    groups = {name: typed(Group, group, f"{args.systems}: {name}") for name, group in read_yaml(args.systems).items()}
    # The last data set begins: with the longest chains there, none of them is left alone at the end.
    planned = [stage for name in reversed(groups) for stage in stages_of(groups[name], args.out / name, args.budget)]
    stages = Stages(planned, args.out, args.jobs, args.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = stages.run()
    found = {name: outcomes_of(group, args.out / name, failed) for name, group in groups.items()}
    budgets = {name: budget_of(group, args.budget) for name, group in groups.items()}
    picture = args.table.with_suffix(".png")
    plot(found, picture)
    how = f"up to {args.jobs} stages at a time, {args.threads} thread{'s' * (args.threads > 1)} each"
    write_text(args.table, page(found, budgets, stages, picture.name, f"{how}, {cores()} cores"))
    print(f"table: {args.table}, {picture}")
    if failed:
        raise UserError(f"{len(failed)} of {len(planned)} stages are not finished; the same command tries them again")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(text: str) -> float:
    """A number above 0, as a ``type`` for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    cli.main(main)
