"""The whole path, small: corpus, memory, comparison, evaluation, report. Run by `make demo`.

    python -m launch.demo [--base FOLDER_OR_HUB_ID|scratch] [--steps N] [--samples N] [--out DIR]

Needs no network, no GPU and no model hub: the base is the small pretrained hybrid that comes with this project, the
corpus is the Python packages installed in this environment, without those that the base was trained on, split by
package, and the evaluation is on packages first released in 2026. Done stages are skipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.demo_stages import ROOT, SCRATCH, Machine, base_of, find_machine, make_stages, trained_on
from launch.show import print_comparison
from launch.stages import run_stages
from launch.verdict import completion_table, findings, last_evaluation, sentence
from titans_ds.errors import TitansError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse(arguments)
    console = Console(highlight=False)
    try:
        run(options, console)
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on with the stage that was under way", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--base",
        help=f"pretrained causal LM, a folder or hub id; `{SCRATCH}`: a tiny one is trained here from random weights "
        "(default: the small hybrid that comes with this project)",
    )
    add("--out", type=Path, default=Path(".demo"), help="folder of everything made (default %(default)s)")
    add("--steps", type=int, default=120, help="of the memory's training (default %(default)s)")
    add("--base-steps", type=int, default=500, help=f"of the tiny base's, with --base {SCRATCH} (default %(default)s)")
    add("--packages", type=int, help="greatest number of packages in the corpus (default: all)")
    add("--samples", type=int, default=24, help="completions a mode; 0: no evaluation (default %(default)s)")
    add("--ranks", type=int, help="processes (default: one a GPU; 2 on CPU)")
    options = parser.parse_args(arguments)
    least = {"steps": 1, "base_steps": 1, "packages": 1, "samples": 0, "ranks": 1}
    for name, value in ((name, getattr(options, name)) for name in least):
        if value is not None and value < least[name]:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be {least[name]} or more")
    return options


def run(options: argparse.Namespace, console: Console) -> None:
    """All stages, and what came of them. Raises TitansError where one fails."""
    start, machine = time.perf_counter(), find_machine(options.ranks)
    where = f"{machine.ranks} GPU(s)" if machine.gpu else f"CPU, {machine.ranks} processes"
    console.print(f"titans-ds demo on {where}; everything goes to {options.out}/")
    run_stages(make_stages(options, machine), options.out / "stamps", ROOT, environment(machine), console.print)
    report(options, console)
    console.print(f"made in {time.perf_counter() - start:.0f} s, set-up apart; run folder: {options.out / 'memory'}")
    if options.samples:
        console.print(f"report: {options.out / 'evaluation' / 'report.html'}", soft_wrap=True)


def environment(machine: Machine) -> dict[str, str]:
    """Less talk from the libraries, and no search for accelerators where there are none."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return quiet if machine.gpu else quiet | {"DS_ACCELERATOR": "cpu"}


def report(options: argparse.Namespace, console: Console) -> None:
    """The comparison on held-out packages, the completions, and what they mean."""
    evaluation = last_evaluation(options.out / "memory")
    print_comparison(console, evaluation)
    console.print(sentence(evaluation), soft_wrap=True)
    if options.samples:
        console.print(completion_table(options.out / "evaluation"))
        for line in findings(options.out / "evaluation"):
            console.print(line, soft_wrap=True, markup=False)
    console.print(closing(options), soft_wrap=True)


def closing(options: argparse.Namespace) -> str:
    """What these figures can and cannot say."""
    if options.base == SCRATCH:
        return "This is a tiny base trained for minutes: it shows that the parts work together, no more."
    if trained_on(base_of(options)) is None:
        return "What this base was trained on is not known here: it may have seen the held-out packages."
    few = f" {options.samples} completions show large effects only." if options.samples else ""
    if options.base is None:
        return (
            "A pretrained base of 12 million parameters, a memory trained for minutes on packages that the base "
            f"was not trained on: real figures of a small model, which need not hold for large ones.{few}"
        )
    return f"The memory was trained for minutes only.{few}"


if __name__ == "__main__":
    sys.exit(main())
