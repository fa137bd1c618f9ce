"""Sweeps: many training runs over a space of settings, on any number of machines. docs/sweeps.md

python launch/sweep.py --space launch/spaces/tiny.yaml --study DIR [--section.key value …]   # start, join, go on
python launch/sweep.py status --study DIR
python launch/sweep.py report --study DIR
python launch/sweep.py best --study DIR --export best.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only its own folder is on the path

from launch.sweeping.command import run_command
from titans_ds.errors import TitansError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for an error that the user can mend, 143 after SIGTERM or Ctrl-C."""
    try:
        return run_command(sys.argv[1:] if argv is None else argv)
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
