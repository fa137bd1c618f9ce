"""Look whether all nodes are fit for a run, before it starts: one table, one verdict.

    deepspeed --hostfile HOSTFILE launch/preflight.py --config FILE [options of launch/train.py]

The same under mpirun, srun and torchrun: whatever will start launch/train.py, with the same arguments. Own options:

    --min_bandwidth GB/S    of an all-reduce over all ranks; slower is a failure (0: only shown)
    --max_skew SECONDS      between the clocks of two nodes (5)
    --min_free GIB          on the file system of the run folder, beside what checkpoints take (1)
    --mib MIB               size of the tensor in the all-reduce (64)
    --wait SECONDS          for all ranks to come (180)
    --min_accelerator SHARE of a GPU's memory that must be free (0.9)

Exit code 0: ready. 1: not ready. 2: a mistake in the arguments, or the ranks did not find one another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

import transformers
from rich.console import Console
from rich.table import Table

from launch.nodes.checks import Check, judge
from launch.nodes.facts import collect
from titans_ds.program import program, real_number, whole_number
from titans_ds.training import ranks
from titans_ds.zero.engine import local_device, start_ranks
from titans_ds.zero.leaving import leave, stop_ranks

_COLORS = {"ok": "green", "note": "yellow", "FAILED": "red"}


@program("nothing was changed")
def main(given: list[str]) -> int:
    """Run the program; returns its exit code, the same on all ranks."""
    transformers.utils.logging.set_verbosity_error()
    if any(a in ("-h", "--help") for a in given):
        print(__doc__)
        return 0
    options, arguments = own_options(given)
    start_ranks(timedelta(seconds=options.wait))
    device = local_device()
    facts = collect(arguments, device, options.mib)
    checks = ranks.on_rank_zero(lambda: judge(facts, options))
    if ranks.rank() == 0:
        show(Console(width=None if sys.stdout.isatty() else 150), checks, facts)
    stop_ranks()
    return int(any(check.verdict == "FAILED" for check in checks))


def own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's options, and the training program's arguments."""
    parser = argparse.ArgumentParser(prog="launch/preflight.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--min_bandwidth", type=real_number(0, 10**6), default=0.0)
    parser.add_argument("--max_skew", type=real_number(0, 10**6), default=5.0)
    parser.add_argument("--min_free", type=real_number(0, 10**9), default=1.0)
    parser.add_argument("--mib", type=whole_number(1, 10**6), default=64)
    parser.add_argument("--wait", type=real_number(0, 10**6, above=True), default=180.0)
    parser.add_argument("--min_accelerator", type=real_number(0, 1), default=0.9)
    return parser.parse_known_args(list(argv))


def show(console: Console, checks: list[Check], facts: list[dict[str, object]]) -> None:
    """The table, and the verdict below it."""
    table = Table("check", "verdict", "found", title="Preflight")
    for check in checks:
        table.add_row(check.name, f"[{_COLORS[check.verdict]}]{check.verdict}", check.found.replace("[", "\\["))
    console.print(table)
    failed, hosts = [c.name for c in checks if c.verdict == "FAILED"], len({f["host"] for f in facts})
    where = f"{len(facts)} ranks on {hosts} nodes" if hosts > 1 else f"{len(facts)} ranks on one node"
    verdict = f"NOT READY: {', '.join(failed)}" if failed else "READY"
    console.print(f"{verdict} ({where})", style="red" if failed else "green", highlight=False)


if __name__ == "__main__":
    leave(main())
