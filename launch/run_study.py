"""Run a study: train its arms, evaluate each on its benchmarks, and put all results into one table.

    python launch/run_study.py --out runs/first --base qwen2.5-coder-0.5b=DIR --corpus DIR --data crosscodeeval=FILE
    python launch/run_study.py --out runs/first --arms hybrid-v2 --benchmarks packages2026      # needs nothing else
    python launch/run_study.py --study launch/studies/null_reexamined.yaml --corpus DIR --out runs/null

Everything done is skipped when the same command is repeated; a training or evaluation that was stopped goes on. An arm
whose adapter comes with this project is only evaluated, unless --retrain asks for more. Another base, of any size, or
another memory is one arm in the study file (launch/study/settings.py says what stands there).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, only its own folder is on the path

from rich.console import Console

from launch.demo import environment
from launch.stages.chain import CHAIN, Stage, run_stages
from launch.stages.demo import Machine, absolute, find_machine
from launch.stages.study import Place, evaluation, preparation, trained, training
from launch.study.results import write_results
from launch.study.settings import ROOT, Study, fill, load_study, select
from titans_ds.errors import ConfigError
from titans_ds.files import check_folder
from titans_ds.program import plain_console, program, some_text, whole_number

_FIRST = ROOT / "launch" / "studies" / "first.yaml"


@program("the same command goes on from here")
def main(arguments: list[str]) -> None:
    """Run the program; returns its exit code."""
    run(parse(arguments), plain_console())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python launch/run_study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--study", type=Path, default=_FIRST, help="settings (default: launch/studies/first.yaml)")
    add("--out", type=Path, required=True, help="folder of everything made")
    add(
        "--base",
        type=some_text,
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="folder or hub id of a base of the study",
    )
    add(
        "--data",
        type=some_text,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="rows of a benchmark of the study",
    )
    add(
        "--corpus",
        type=some_text,
        action="append",
        default=[],
        metavar="[BASE=]DIR",
        help="to train on; plain or packed",
    )
    add("--arms", help="only these, separated by commas")
    add("--benchmarks", help="only these, separated by commas; an empty text: none")
    add("--retrain", action="store_true", help="also train arms whose adapter comes with this project")
    add("--train-only", action="store_true", help="evaluate nothing yet")
    add("--ranks", type=whole_number(1, 10**6), help="processes of each training (default: one a GPU; 1 on CPU)")
    add("--batch-size", type=whole_number(1, 10**6), help="of the evaluations; changes no result in float32")
    add(
        "--jobs",
        type=whole_number(1, 1024),
        default=1,
        help="trainings, and then evaluations, side by side (default 1)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """All stages, and the results. Raises TitansError where one fails; the others are finished first."""
    start, study, machine = time.perf_counter(), study_of(options), find_machine(options.ranks)
    place = place_of(options, machine)
    stamps, variables = place.out / "stamps", environment(machine)

    def chain(folder: str, stages: Sequence[Stage]) -> Callable[[], object]:
        return lambda: run_stages(stages, stamps / folder, ROOT, variables, console.print)

    chain("prepare", preparation(study, place))()
    side_by_side([chain(f"train/{n}", [training(study, n, place)]) for n in trained(study, place)], options.jobs)
    if not options.train_only:
        work = [
            chain(f"evaluate/{arm}/{benchmark}", evaluation(study, arm, benchmark, place))
            for arm in study.arms
            for benchmark in study.benchmarks
        ]
        side_by_side(work, options.jobs)
    console.print(f"results: {write_results(study, place)}", soft_wrap=True)
    console.print(f"{time.perf_counter() - start:.0f} s")


def side_by_side(work: Sequence[Callable[[], object]], jobs: int) -> None:
    """Do all of it, `jobs` at a time; raises the first error after the rest is done."""
    with ThreadPoolExecutor(jobs) as pool:
        errors = [future.exception() for future in [pool.submit(task) for task in work]]
    for error in errors:
        if error is not None:
            raise error


def study_of(options: argparse.Namespace) -> Study:
    """The chosen part of the study, with everything given."""
    study = select(load_study(options.study), _names(options.arms), _names(options.benchmarks))
    bases, data = _pairs(options.base, "--base"), _pairs(options.data, "--data")
    return fill(study, {n: absolute(v) for n, v in bases.items()}, {n: absolute(v) for n, v in data.items()})


def place_of(options: argparse.Namespace, machine: Machine) -> Place:
    """Where, from what, and on how many ranks."""
    corpora = {}
    for text in options.corpus:
        base, equals, folder = text.partition("=")
        corpora[base if equals else ""] = Path(folder if equals else text).resolve()
    ranks = options.ranks or (machine.ranks if machine.gpu else 1)
    return Place(check_folder(options.out, CHAIN).resolve(), corpora, ranks, options.retrain, options.batch_size)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise ConfigError(f"{option} {text}: expected NAME=VALUE")
        pairs[name] = value
    return pairs


if __name__ == "__main__":
    sys.exit(main())
