"""What every command-line program here shares: progress on stderr, and workers."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from titans_ds.errors import OutputError
from titans_ds.program import plain_console

Item = TypeVar("Item")
Result = TypeVar("Result")

STDERR = plain_console(stderr=True)


GO_ON = "run the same command again to go on from here"


def command_line() -> str:
    """Return the command that runs now, as one would type it."""
    main_module = sys.modules["__main__"]
    spec = getattr(main_module, "__spec__", None)
    program = ["python", "-m", spec.name] if spec else [os.path.basename(sys.argv[0])]
    return shlex.join([*program, *sys.argv[1:]])


def progress_bar() -> Progress:
    """Return a progress bar on stderr. It draws nothing where stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=STDERR, disable=not STDERR.is_terminal)


def map_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int, description: str
) -> list[Result]:
    """Return `function` of every item, in the order of the items, computed by `num_workers` processes.

    `function` and the items must pickle. One worker means this process.
    """
    results: dict[int, Result] = {}
    with progress_bar() as progress:
        task = progress.add_task(description, total=len(items))
        for index, result in _computed(function, items, min(num_workers, len(items))):
            results[index] = result
            progress.advance(task)
    return [results[index] for index in range(len(items))]


def _computed(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[tuple[int, Result]]:
    if num_workers <= 1:
        yield from ((index, function(item)) for index, item in enumerate(items))
        return
    # Spawned, not forked: a fork of a process with Arrow's or DuckDB's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        try:
            yield from _in_flight(pool, function, items, 2 * num_workers)
        except BrokenProcessPool as error:
            raise OutputError(
                "A worker process died, most likely for want of memory. Run the same command again with fewer "
                "--workers: finished parts are kept."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_flight(
    pool: ProcessPoolExecutor, function: Callable[[Item], Any], items: Sequence[Item], limit: int
) -> Iterator[tuple[int, Any]]:
    """Never more than `limit` items submitted and unfinished, so that a list of a million costs no memory."""
    pending: dict[Any, int] = {}
    queue = iter(enumerate(items))
    while True:
        for index, item in queue:
            pending[pool.submit(function, item)] = index
            if len(pending) >= limit:
                break
        if not pending:
            return
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield pending.pop(future), future.result()
