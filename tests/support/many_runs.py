"""Several runs of launch/train.py in one launch, since starting one takes far longer than such a run.

    deepspeed --num_accelerators 2 tests/support/many_runs.py RUNS.json

RUNS.json holds a list of argument lists. Each is a whole run, through the program's own main; the first argument says
whether the disk of rank 1 is full: its files end at a limit that a checkpoint's do not fit. CODES.json beside it gets
the exit codes.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch import train
from titans_ds.training import ranks
from titans_ds.zero.leaving import leave

LIMIT = 4096  # bytes


def run(full: bool, arguments: list[str]) -> int:
    """One run; its exit code."""
    if full and ranks.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    try:
        return train.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    """Run all of them."""
    runs = Path(sys.argv[-1])
    logging.captureWarnings(False)
    stop_ranks, train.stop_ranks = train.stop_ranks, lambda: None  # the ranks stay for the next run
    codes = [run(bool(full), arguments) for full, *arguments in json.loads(runs.read_text())]
    if ranks.rank() == 0:
        runs.with_name("CODES.json").write_text(json.dumps(codes))
    stop_ranks()


if __name__ == "__main__":
    main()
    leave(0)
