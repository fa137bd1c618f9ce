"""Sweeps: many training runs over a space of settings, on any number of machines. docs/sweeps.md

python launch/sweep.py --space launch/spaces/tiny.yaml --study DIR [--section.key value …]   # start, join, go on
python launch/sweep.py status --study DIR
python launch/sweep.py report --study DIR
python launch/sweep.py best --study DIR --export best.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from titans_ds.errors import ConfigError
from titans_ds.program import plain_console, program, real_number, some_text, whole_number
from titans_ds.yaml_files import option_value

_COMMANDS = ("run", "status", "report", "best")


@program("the same command goes on with it")
def main(words: list[str]) -> int:
    """Run the program; returns its exit code: 0, 2 for an error that the user can mend, 143 after SIGTERM or Ctrl-C."""
    if not words or (words[0] not in _COMMANDS and words[0] not in ("-h", "--help")):
        words.insert(0, "run")
    options, rest = make_parser().parse_known_args(words)
    if rest and options.command != "run":
        raise ConfigError(f"unknown option {rest[0]}; see launch/sweep.py {options.command} --help")
    for name in ("optuna", "submitit", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"sweeps need {name}: pip install 'titans-ds[sweep]'")
    if options.command == "run":
        return _run(options, _settings(rest))
    _look(options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Options of all commands."""
    what = "Search settings of launch/train.py over many runs. docs/sweeps.md"
    parser = argparse.ArgumentParser(prog="launch/sweep.py", description=what, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--study", type=Path, required=True, help="the study's folder")
        url = os.environ.get("OPTUNA_STORAGE")
        made.add_argument("--storage", metavar="URL", default=url, help="database (default: SQLite in the folder)")
        return made

    run = command("run", "start a study, join it, or go on with it: always the same command")
    run.epilog = "Options --section.key VALUE set a setting of launch/train.py in every trial."
    add = run.add_argument
    add("--space", type=Path, help="YAML file of what to search; may be left out to join a study that is there")
    add("--executor", choices=("local", "ssh", "slurm"), default="local", help="where trials run (default: local)")
    add("--slots", type=whole_number(1, 1000), help="trials at a time on a machine (one a GPU, or 1); slurm: tasks (4)")
    add("--ranks", type=whole_number(1, 10_000), help="processes of a trial (1; slurm: one a GPU of the task)")
    add("--launcher", type=_command, help="runs launch/train.py: 'torchrun --nproc_per_node 2 --master_port {port}'")
    add("--hostfile", type=Path, help="ssh: hosts, a line each")
    add("--slurm", nargs="+", metavar="NAME=VALUE", help="slurm: options of submitit: partition=gpu …")
    add("--lease", type=whole_number(4, 10**6), default=120, help="seconds of silence that mean death (%(default)s)")
    add("--grace", type=real_number(0, 10**6), default=120.0, help="seconds that a stopped trial has to save itself")
    command("status", "a table of all trials")
    report = command("report", "one HTML page: curves, slices, parallel coordinates, importance")
    report.add_argument("--out", type=Path, help="file (default STUDY/report.html)")
    best = command("best", "the best trial, and its configuration")
    best.add_argument("--export", type=Path, help="write its configuration for launch/train.py to this file")
    return parser


def _command(text: str) -> list[str]:
    try:
        return shlex.split(some_text(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _settings(rest: Sequence[str]) -> dict[str, Any]:
    """Settings for every trial from --a.b=c or --a.b c."""
    settings, words = {}, list(rest)
    while words:
        word = words.pop(0)
        name, joined, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            raise ConfigError(f"unknown option {word}; see launch/sweep.py run --help, or give --section.key VALUE")
        if not joined and not words:
            raise ConfigError(f"option {word} has no value")
        settings[name] = option_value(text if joined else words.pop(0))
    return settings


def _run(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    from launch.sweeping import cluster
    from launch.sweeping.report import totals
    from launch.sweeping.study import open_study, read_json
    from launch.sweeping.worker import Worker, local_slots

    console = plain_console(soft_wrap=True)

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone must not end what it started
            console.print(line)

    # Everything that can be refused is, before anything is made.
    for name, executor in (("hostfile", "ssh"), ("slurm", "slurm")):
        if getattr(options, name) is not None and options.executor != executor:
            raise ConfigError(f"--{name} is for --executor {executor}; leave it out, or change the executor")
    pasted = any(word.split("=")[0] in ("--hostfile", "-H") for word in options.launcher or ())
    for place in (options.study.resolve(), Path.cwd()):
        if pasted and re.search(r"[^\w/.,:=@+-]", str(place)):
            raise ConfigError(
                f"{place}: the deepspeed launcher puts this path into shells of the hosts as it is; choose a folder "
                "whose path has letters, digits, and no other signs than / . , : = @ + - _"
            )
    hosts = cluster.read_hosts(options.hostfile) if options.executor == "ssh" else []
    if options.executor == "local":
        slots = local_slots(options.slots, options.ranks or 1, options.launcher)
    else:
        cluster.check_storage(options.storage, read_json(options.study / "study.json").get("storage"))
    study = open_study(options.study, options.space, settings, options.storage, options.lease)
    study.requeue(failed=True)
    say(f"{study.path}: {totals(study)}")
    if options.executor == "slurm":
        code = cluster.run_on_slurm(study, options, say)
    elif options.executor == "ssh":
        code = cluster.run_over_ssh(study, hosts, options, say)
    else:
        code = Worker(study, slots, options.grace, say).run()
    say(totals(study))
    where = shlex.quote(str(options.study))
    say("stopped; the same command goes on with it" if code else f"python launch/sweep.py report --study {where}")
    return code


def _look(options: argparse.Namespace) -> None:
    """The commands status, report and best."""
    from launch.sweeping import report
    from launch.sweeping.study import Study, shown

    study = Study(options.study, options.storage)
    if options.command == "status":
        console = plain_console()
        console.print(report.status_table(study))
        console.print(report.totals(study), soft_wrap=True)
    elif options.command == "report":
        path = options.out or study.path / "report.html"
        report.write_report(study, path)
        print(f"wrote {path}; to look around in: optuna-dashboard {shlex.quote(shown(study.url))}")
    else:
        print(report.export_best(study, options.export))
        if options.export is not None:
            print(f"wrote {options.export}: python launch/train.py --config {shlex.quote(str(options.export))}")


if __name__ == "__main__":
    sys.exit(main())
