"""Command line of launch/sweep.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.sweeping.errors import SweepError
from launch.sweeping.executors import Executor, Local
from launch.sweeping.hostfiles import Hostfiles
from launch.sweeping.space import read_value
from launch.sweeping.study import Study, open_study
from launch.sweeping.worker import Worker

_COMMANDS = ("run", "status", "report", "best")


def run_command(argv: Sequence[str]) -> int:
    """Run a subcommand; `run` where none is named. Returns the exit code."""
    words = list(argv)
    if not words or (words[0] not in _COMMANDS and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    options, rest = _parser().parse_known_args(words)
    if rest and options.command != "run":
        raise SweepError(f"unknown option {rest[0]}; see launch/sweep.py {options.command} --help")
    action: Callable[[argparse.Namespace, dict[str, Any]], int] = options.action
    return action(options, _settings(rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py",
        description="Search settings of launch/train.py over many runs. docs/sweeps.md",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    status = _add(commands, "status", "a table of trials; live in a terminal", _status)
    status.add_argument("--once", action="store_true", help="print it once")
    status.add_argument("--rows", type=int, default=30, help="trials shown (default %(default)s)")
    report = _add(commands, "report", "one HTML page: parallel coordinates, importance, best runs, curves", _report)
    report.add_argument("--out", type=Path, help="file (default STUDY/report.html)")
    best = _add(commands, "best", "the best trial, and its configuration", _best)
    best.add_argument("--export", type=Path, help="write its configuration for launch/train.py to this file")
    return parser


def _add(commands: Any, name: str, text: str, action: Callable[..., int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--study", type=Path, required=True, help="the study's folder; shared by all sweep processes")
    parser.set_defaults(action=action)
    return parser


def _add_run(commands: Any) -> None:
    text = "start a study, join it, or go on with it: the same command on any number of machines"
    parser = _add(commands, "run", text, _run)
    add = parser.add_argument
    parser.epilog = "Options --section.key VALUE set a setting of launch/train.py in every trial."
    add("--space", type=Path, help="YAML file of what to search; may be left out to join a study that is there")
    add("--executor", choices=("local", "fork", "hostfile", "slurm"), default="local", help="default %(default)s")
    add("--slots", type=int, help="trials at a time (default: local one per GPU, or 1; hostfile all groups; slurm 4)")
    add("--ranks", type=int, default=1, help="local: processes of each trial, with a GPU each (default %(default)s)")
    add("--gpus", help="local: indices such as 0,2,3, or none (default: all)")
    add("--hostfile", type=Path, nargs="+", default=[], help="hostfile: a group of hosts each")
    add("--nodes-per-trial", type=int, help="hostfile: split every file into groups of this many hosts")
    add("--launcher-args", default="", help="hostfile: further options of the deepspeed launcher, as one string")
    add("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="slurm: options of submitit: partition=gpu …")
    add(
        "--lease",
        type=float,
        default=180.0,
        help="seconds of silence that mean death (default %(default)s)",
    )
    add("--grace", type=float, default=120.0, help="seconds a stopped trial has to save itself (default %(default)s)")


def _settings(rest: Sequence[str]) -> dict[str, Any]:
    """--a.b=c or --a.b c."""
    settings, words = {}, list(rest)
    while words:
        word = words.pop(0)
        name, joined, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            raise SweepError(f"unknown option {word}; see launch/sweep.py run --help, or give --section.key VALUE")
        if not joined and not words:
            raise SweepError(f"option {word} has no value")
        settings[name] = read_value(text if joined else words.pop(0))
    return settings


def _run(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    _check(options)
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    study = open_study(options.study, options.space, settings)
    search = study.space.search
    say(f"{study.path}: {study.size} trials, {search.method} search, seed {search.seed}")
    if options.executor == "slurm":
        from launch.sweeping.slurm import run_on_slurm

        code = run_on_slurm(study, options.slurm, options.slots or 4, options.lease, options.grace, say)
    else:
        code = Worker(study, _executor(options, study), say, options.lease, options.grace).run()
    _say_end(study, code, say)
    return code


def _check(options: argparse.Namespace) -> None:
    for name, least in (("slots", 1), ("ranks", 1), ("nodes_per_trial", 1), ("lease", 1), ("grace", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            text = " (no slot, no trial)" if name == "slots" else ""
            raise SweepError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more{text}")


def _executor(options: argparse.Namespace, study: Study) -> Executor:
    if options.executor == "hostfile":
        return Hostfiles(
            study, options.hostfile, options.nodes_per_trial, options.launcher_args, options.slots, options.lease
        )
    gpus = None if options.gpus is None else [g for g in options.gpus.split(",") if g not in ("", "none")]
    return Local(study, options.slots, gpus, options.ranks, inside=options.executor == "fork")


def _say_end(study: Study, code: int, say: Callable[[str], None]) -> None:
    from launch.sweeping.results import best_of, read_results

    best = best_of(read_results(study), study.space.metric)
    if best is not None:
        say(f"best so far: trial {best.trial.number}, {study.space.metric.name} {best.value:.6g}")
    if code:
        say("stopped; the same command goes on with it")
    else:
        say(f"all trials have ended. python launch/sweep.py report --study {study.path}")


def _status(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from launch.sweeping.status import show_status

    show_status(Study(options.study), Console(highlight=False), options.once or not sys.stdout.isatty(), options.rows)
    return 0


def _report(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from launch.sweeping.report import write_report

    study = Study(options.study)
    print(f"wrote {write_report(study, options.out or study.path / 'report.html')}")
    return 0


def _best(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from launch.sweeping.best import describe_best, export_best

    study = Study(options.study)
    print(describe_best(study))
    if options.export is not None:
        print(f"wrote {export_best(study, options.export)}: python launch/train.py --config {options.export}")
    return 0
