"""The rows to evaluate: loaded through data_prep, checked, and cut to a subset that can be named again."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EvalError
from .grammars import check_language

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

SUBSETS = ("first", "random")


def data_prep_module(name: str) -> Any:
    """Return the module `data_prep.NAME`, which lies beside this package in a checkout as in an installed wheel."""
    root = (__package__ or "").removesuffix("eval.data").rstrip(".")
    return import_module(f"{root}.data_prep.{name}" if root else f"data_prep.{name}")


def load_benchmark(path: str | Path, language: str | None = None) -> dict[str, CrossCodeEvalRow]:
    """Return {task_id: row} in the file's order.

    DataError for a malformed row; EvalError for a task id that is there twice, and for a target that is empty, which no
    metric can score. All name file and line.
    """
    rows = data_prep_module("crosscodeeval").load_rows(path, language)
    by_task: dict[str, CrossCodeEvalRow] = {}
    for index, row in enumerate(rows):
        check_language(row.language)
        if not row.groundtruth:
            raise EvalError(
                f"{path}, line {_line_number(Path(path), index)}: groundtruth is empty, so that nothing can be scored; "
                "expected the text that follows the prompt. Take the row out."
            )
        if row.task_id in by_task:
            raise EvalError(
                f"{path}, line {_line_number(Path(path), index)}: task id {row.task_id!r} is there twice. Expected "
                "every task once; give one benchmark file at a time, and never a file joined from several."
            )
        by_task[row.task_id] = row
    return by_task


def _line_number(path: Path, index: int) -> int:
    lines = path.read_bytes().split(b"\n")
    return [number for number, line in enumerate(lines, start=1) if line.strip()][index]


def select_rows(
    rows: dict[str, CrossCodeEvalRow], limit: int | None, subset: str = "first", seed: int = 0
) -> dict[str, CrossCodeEvalRow]:
    """Return the first `limit` rows, or a random `limit` of them by `seed`, in the file's order; all without a limit.

    The first rows of the benchmark come from few repositories, so that a random subset says more at the same cost.
    """
    if subset not in SUBSETS:
        raise EvalError(f"Unknown subset {subset!r}. Expected one of {', '.join(SUBSETS)}.")
    if limit is not None and limit < 1:
        raise EvalError(f"--limit is {limit}; expected at least 1.")
    if limit is None or limit >= len(rows):
        return rows
    names = list(rows)
    chosen = set(names[:limit] if subset == "first" else random.Random(seed).sample(names, limit))
    return {name: rows[name] for name in names if name in chosen}
