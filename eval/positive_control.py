"""Positive controls: does the memory work where it should? Trained from scratch and measured in minutes.

python -m eval.positive_control kv_recall --seeds 3 --minutes 8 --out runs/kv_recall
python -m eval.positive_control kv_recall --order first --steps 2000 --device cuda
python -m eval.positive_control mqar|needle|induction|style
python -m eval.positive_control mqar --config launch/configs/controls/mqar-titans*.yaml --seeds 3    # side by side

Every control is a file in launch/configs/controls; --set changes any of its settings. A model with a memory and one
that has the whole context in its window are trained for as long, on the same fresh episodes; eval/controls/measure.py
says what is compared. Results are saved as it goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from titans_ds.files import Kind, check_file, check_folder
from titans_ds.program import program, real_number, whole_number
from titans_ds.yaml_files import parse_yaml

from .controls.comparison import compare
from .controls.report import merge
from .controls.run import run_control
from .controls.settings import load_control
from .controls.tasks import TASKS
from .devices import device_named
from .errors import EvalError

_RESULTS = Kind("results of this program", "results.json", rb'\A\{\s*"task"')
_MEMORIES: dict[str, dict[str, Any]] = {
    "mlp": {},
    "linear": {
        "graft.memory.depth": 1,
        "graft.memory.hidden_dim": None,
        "graft.memory.hidden_scale": 1.0,
        "graft.memory.initial_stds": None,
        "graft.memory.initial_scale": 0.0,
        "graft.memory.rule.step_sizes": [0.1],
    },
}


@program("the seeds that were measured are in the results; run the others with --first-seed, and put them together")
def main(arguments: list[str]) -> None:
    """Run one control; return 0, or 2 after printing what the user can mend."""
    options = _parser().parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.positive_control",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", choices=sorted(TASKS))
    add("--config", type=Path, nargs="+", help="other files than launch/configs/controls/TASK.yaml; several: compared")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as graft.memory.heads=4")
    add("--seeds", type=whole_number(1, 10_000), default=1, help="how many (default 1); seeds 0, 1, …")
    add("--first-seed", type=whole_number(0, 2**62), default=0)
    add("--minutes", type=real_number(0, 10**6, above=True), help="training of each model and seed")
    add("--steps", type=whole_number(1, 10**9), help="the same in optimizer steps")
    add("--order", choices=("first", "second"), help="of the memory's training")
    add("--first-order-parts", action="store_true", help="train no more than this at second order")
    add("--memory", choices=sorted(_MEMORIES), default="mlp", help="the network of the memory (default mlp)")
    add("--dim", type=whole_number(1, 2**20), help="of the memory")
    add("--pairs", help="levels of the curriculum, such as 4,8,16,32")
    add("--measure", help="levels that are measured, such as 8,16,32,64")
    add("--full-context", action=argparse.BooleanOptionalAction, default=True, help="train that model as well")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--threads", type=whole_number(1, 4096), help="of the processor")
    add("--merge", type=Path, nargs="+", metavar="DIR", help="train nothing: one table of runs that differ in seeds")
    add("--compare", type=Path, nargs="+", metavar="DIR", help="train nothing: one table of runs of other settings")
    add("--out", type=Path, help="results (JSON and Markdown); runs/positive_control/TASK… where not given")
    return parser


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes, by dotted name.

    Raises:
        EvalError: not NAME=VALUE, or levels that are no numbers.
    """
    changes = dict(_MEMORIES[options.memory])
    if options.minutes is not None and options.steps is not None:
        raise EvalError("give --minutes or --steps, not both.")
    if options.minutes is not None or options.steps is not None:
        changes |= {"minutes": options.minutes, "steps": options.steps}
    if options.order is not None:
        changes["order"] = options.order
    if options.first_order_parts:
        changes["first_order_parts"] = True
    if options.dim is not None:
        changes["graft.memory.dim"] = options.dim
    for name, text in (("curriculum.levels", options.pairs), ("measure.levels", options.measure)):
        if text is not None:
            changes[name] = _levels(text)
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise EvalError(f"--set {text}: expected NAME=VALUE, such as graft.memory.dim=64.")
        try:
            changes[name] = parse_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise EvalError(f"--set {text[:60]}: the value is not YAML ({str(error).splitlines()[0]}).") from error
    return changes


def _levels(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    # isdigit alone takes "²", which int does not.
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**6 for part in parts):
        raise EvalError(f"levels {text!r}: expected numbers above 0 and commas, such as 4,8,16,32.")
    return [int(part) for part in parts]


def _run(options: argparse.Namespace) -> None:
    out = options.out or Path("runs") / "positive_control" / f"{options.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    files = sorted(options.config or [None], key=lambda path: "" if path is None else path.stem)  # X before X-linear
    folders = [out if path is None or len(files) == 1 else out / path.stem for path in files]
    if options.compare or len(files) > 1:
        check_file(out / "comparison.json", rb'\A\{\s*"task"')
        check_file(out / "comparison.md", rb"\A\| ")
    for folder in () if options.compare else folders:
        check_folder(folder, _RESULTS)
    if options.merge:
        merge(options.merge, out)
        return
    if options.compare:
        compare(options.compare, out)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    device = device_named(options.device)
    configs = [load_control(options.task, changes_of(options), path) for path in files]  # wrong ones end it here
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for config, folder in zip(configs, folders, strict=True):
        run_control(config, seeds, device, folder, options.full_context)
    if len(folders) > 1:
        compare(folders, out)


if __name__ == "__main__":
    sys.exit(main())
