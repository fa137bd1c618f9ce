"""The whole path, small: corpus, memory, comparison, picture, example. Run by `make demo`.

    python -m launch.demo [--base FOLDER_OR_HUB_ID|scratch] [--steps N] [--samples N] [--out DIR]

Needs no network, no GPU and no model hub: the base is the small pretrained hybrid that comes with this project, the
corpus is the Python packages installed in this environment, without those that the base was trained on, split by
package. It ends with the held-out losses with a package's own memory, another's, an empty one and none, a picture of
them, and one example. Done stages are skipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.show import print_comparison
from launch.stages.chain import CHAIN, run_stages
from launch.stages.demo import ROOT, SCRATCH, Machine, base_of, find_machine, make_stages, trained_on
from launch.verdict import draw_losses, example_text, last_evaluation, sentence
from titans_ds.files import check_folder
from titans_ds.program import plain_console, program, some_text, whole_number


@program("the same command goes on with the stage that was under way")
def main(arguments: list[str]) -> None:
    """Run the program; returns its exit code."""
    run(parse(arguments), plain_console())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--base",
        type=some_text,
        help=f"pretrained causal LM, a folder or hub id; `{SCRATCH}`: a tiny one is trained here from random weights "
        "(default: the small hybrid that comes with this project)",
    )
    add("--out", type=Path, default=Path(".demo"), help="folder of everything made (default %(default)s)")
    many = whole_number(1, 10**9)
    add("--steps", type=many, default=60, help="of the memory's training (default %(default)s)")
    add("--base-steps", type=many, default=500, help=f"of the tiny base's, with --base {SCRATCH} (default %(default)s)")
    add("--packages", type=many, help="greatest number of packages in the corpus (default: all)")
    add(
        "--samples",
        type=whole_number(0, 10**9),
        default=24,
        help="places to choose the example from; 0: none (default %(default)s)",
    )
    add("--ranks", type=many, help="processes (default: one a GPU; 2 on CPU)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """All stages, and what came of them. Raises TitansError where one fails."""
    start, machine = time.perf_counter(), find_machine(options.ranks)
    where = f"{machine.ranks} GPU(s)" if machine.gpu else f"CPU, {machine.ranks} processes"
    console.print(f"titans-ds demo on {where}; everything goes to {options.out}/")
    check_folder(options.out, CHAIN)
    run_stages(make_stages(options, machine), options.out / "stamps", ROOT, environment(machine), console.print)
    report(options, console)
    console.print(f"made in {time.perf_counter() - start:.0f} s, set-up apart; run folder: {options.out / 'memory'}")


def environment(machine: Machine) -> dict[str, str]:
    """Less talk from the libraries, and no search for accelerators where there are none."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return quiet if machine.gpu else quiet | {"DS_ACCELERATOR": "cpu"}


def report(options: argparse.Namespace, console: Console) -> None:
    """The comparison on held-out packages, a picture of it, an example, and what they mean."""
    evaluation = last_evaluation(options.out / "memory")
    print_comparison(console, evaluation)
    picture = options.out / "losses.svg"
    draw_losses(evaluation, picture)
    if options.samples:
        console.print(example_text(options.out / "example.json"), soft_wrap=True, markup=False)
    console.print(sentence(evaluation), soft_wrap=True)
    console.print(f"picture: {picture}", soft_wrap=True, markup=False)
    console.print(closing(options), soft_wrap=True)


def closing(options: argparse.Namespace) -> str:
    """What these figures can and cannot say."""
    if options.base == SCRATCH:
        return "This is a tiny base trained for minutes: it shows that the parts work together, no more."
    if trained_on(base_of(options)) is None:
        return "What this base was trained on is not known here: it may have seen the held-out packages."
    if options.base is None:
        return (
            "A pretrained base of 12 million parameters, a memory trained for minutes on packages that the base "
            "was not trained on: real figures of a small model, which need not hold for large ones."
        )
    return "The memory was trained for minutes only."


if __name__ == "__main__":
    sys.exit(main())
