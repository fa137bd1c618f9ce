"""What the benchmark programs share: measure, print a table, save the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from titans_ds.errors import TitansError


def run(
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    options: argparse.Namespace,
) -> int:
    """Measure and print; returns the exit code, 2 for an error that the user can mend."""
    try:
        report = measure(options)
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(report))
    save(report, options.out)
    return 0


def save(report: Any, path: Path | None) -> None:
    """Write a report as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(report, indent=2) + "\n")
        part.replace(path)
