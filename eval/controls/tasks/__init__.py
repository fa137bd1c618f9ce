"""The tasks by name."""

from __future__ import annotations

from typing import Any

from ...errors import EvalError
from ..episodes import Task
from .distance import Induction, Needle
from .recall import KeyValueRecall, MultiQueryRecall
from .style import Style

TASKS = {
    "kv_recall": KeyValueRecall,
    "mqar": MultiQueryRecall,
    "needle": Needle,
    "style": Style,
    "induction": Induction,
}


def make_task(name: str, options: dict[str, Any]) -> Task:
    """A task with its options. Raises EvalError for an option that it does not have."""
    try:
        task: Task = TASKS[name](**options)
    except TypeError as error:
        raise EvalError(f"task_options of {name}: {error}; see eval/controls/tasks for what there is.") from error
    return task
