"""The command line of `run`: arguments to options, a progress bar, and the report at the end."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from titans_ds.files import check_folder, locked
from titans_ds.program import plain_console, real_number, some_text, whole_number

from .data.benchmark import SUBSETS
from .data.retrieval import METHODS
from .options import COMPILE, DECODE_GRAPHS, STOPS, RunOptions
from .run_folder import RUN
from .runner import RunPlan, plan_run, run


def add_run_arguments(parser: argparse.ArgumentParser, modes: Mapping[str, str]) -> None:
    """Add every option of `run`; modes are listed after the help."""
    listed = "\n".join(f"  {name:24} {description}" for name, description in modes.items())
    parser.epilog = f"modes:\n{listed}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--base", type=some_text, required=True, help="base model: folder or hub id")
    add("--adapter", type=some_text, help="adapter folder; not needed for vanilla modes")
    add("--data", type=some_text, required=True, help="CrossCodeEval jsonl file")
    add("--modes", required=True, help="comma-separated, see below")
    add("--out", type=Path, required=True, help="run folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--boundary", default="heal", help="heal (default), plain or both: how the prompt's last token is treated")
    add("--language", help="where the file names in the data do not tell")
    _add_subset(parser)
    _add_lengths(parser)
    _add_generation(parser)
    _add_retrieval(parser)
    _add_machine(parser)


def _add_subset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rows")
    group.add_argument("--limit", type=int, help="evaluate this many rows")
    group.add_argument("--subset", choices=SUBSETS, default="first", help="which: the first, or random ones by --seed")
    group.add_argument(
        "--seed", type=whole_number(0, 2**62), default=0, help="of random subsets, sampling and memory_wrong"
    )


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    group, tokens = parser.add_argument_group("lengths in tokens"), whole_number(0, 2**31)
    group.add_argument("--max-length", type=tokens, default=2048, help="whole input and new tokens; cut on the left")
    group.add_argument("--context-tokens", type=tokens, default=512, help="context before the prompt; cut on the right")
    group.add_argument("--right-tokens", type=tokens, default=512, help="right context in fill-in-the-middle")
    group.add_argument("--max-new-tokens", type=whole_number(1, 2**31), default=50)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--batch-size",
        type=whole_number(1, 2**20),
        default=8,
        help="rows decoded together; changes no result in float32",
    )
    group.add_argument("--stop", choices=STOPS, default="statement", help="end a row where scoring no longer changes")
    group.add_argument("--temperature", type=real_number(0, 1000), default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=real_number(0, 1, above=True), default=1.0)


def _add_retrieval(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("retrieval")
    group.add_argument("--retrieval", choices=METHODS, default="given", help="context as in the file, or rebuilt")
    group.add_argument("--num-chunks", type=whole_number(0, 10**6), help="chunks to keep where it is rebuilt")
    group.add_argument("--embedder", help="encoder folder for --retrieval embedding")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    group.add_argument(
        "--decode-graphs",
        choices=DECODE_GRAPHS,
        default="auto",
        help="on: decode in steps of fixed shapes, which a GPU replays as CUDA graphs; auto (default): on a GPU, off "
        "on a CPU; changes no result in float32",
    )
    group.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="mlp: fuse the base model's norms and MLPs by torch.compile, and DeltaNet's convolution; auto (default): "
        "on a GPU, for models whose layers are known; changes results by rounding",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument("--no-report", action="store_true", help="generate only")


def run_command(options: argparse.Namespace) -> None:
    """Run, then write scores, comparison and report into the run folder."""
    settings = RunOptions(**{field.name: getattr(options, field.name) for field in fields(RunOptions)})
    busy = f"another process writes to {options.out}; wait for it, or give another --out"
    check_folder(options.out, RUN)
    with locked(options.out, busy):
        _generate(plan_run(settings, options.out, options.resume))
        if not options.no_report:
            from .reporting.command import write_report

            write_report(options.out, options.postprocess, options.es_backend)


def _generate(plan: RunPlan) -> None:
    """Make what is missing, with a bar of progress."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=plain_console(stderr=True),
    )
    with bar:
        tasks = {mode.name: bar.add_task(mode.name, start=False, total=None, rate="") for mode in plan.modes}

        def show(mode: str, made: int, total: int) -> None:
            bar.start_task(tasks[mode])
            elapsed = bar.tasks[tasks[mode]].elapsed or 0
            rate = f"{made / elapsed:.2f}/s" if elapsed else ""
            bar.update(tasks[mode], completed=made, total=total, rate=rate)

        counts = run(plan, show)
    print(f"{counts['generated']} completions in {plan.folder}; {counts}")
