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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from titans_ds.errors import TitansError

from .controls.comparison import compare
from .controls.report import merge
from .controls.run import run_control
from .controls.settings import load_control
from .controls.tasks import TASKS
from .errors import EvalError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one control; return 0, or 2 after printing what the user can mend."""
    options = _parser().parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    try:
        _run(options)
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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
    add("--seeds", type=int, default=1, help="how many (default 1); seeds 0, 1, …")
    add("--first-seed", type=int, default=0)
    add("--minutes", type=float, help="training of each model and seed")
    add("--steps", type=int, help="the same in optimizer steps")
    add("--order", choices=("first", "second"), help="of the memory's training")
    add("--first-order-parts", action="store_true", help="train no more than this at second order")
    add("--memory", choices=sorted(_MEMORIES), default="mlp", help="the network of the memory (default mlp)")
    add("--dim", type=int, help="of the memory")
    add("--pairs", help="levels of the curriculum, such as 4,8,16,32")
    add("--measure", help="levels that are measured, such as 8,16,32,64")
    add("--full-context", action=argparse.BooleanOptionalAction, default=True, help="train that model as well")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--threads", type=int, help="of the processor")
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
        changes[name] = yaml.safe_load(value)
    return changes


def _levels(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise EvalError(f"levels {text!r}: expected numbers above 0 and commas, such as 4,8,16,32.")
    return [int(part) for part in parts]


def _run(options: argparse.Namespace) -> None:
    out = options.out or Path("runs") / "positive_control" / f"{options.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if options.merge:
        merge(options.merge, out)
        return
    if options.compare:
        compare(options.compare, out)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    files = sorted(options.config or [None], key=lambda path: "" if path is None else path.stem)  # X before X-linear
    configs = [load_control(options.task, changes_of(options), path) for path in files]  # wrong ones end it here
    folders = [out if path is None or len(files) == 1 else out / path.stem for path in files]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    for config, folder in zip(configs, folders, strict=True):
        run_control(config, seeds, _device(options.device), folder, options.full_context)
    if len(folders) > 1:
        compare(folders, out)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EvalError(f"--device {name}: expected cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EvalError(f"--device {name}: this torch sees no CUDA device; use --device cpu.")
    return device


if __name__ == "__main__":
    sys.exit(main())
