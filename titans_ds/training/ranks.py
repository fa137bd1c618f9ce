"""What ranks decide together. Every function is a collective: all ranks call it, or none. On one rank they are free."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor
from torch import distributed as dist

from titans_ds.errors import TitansError

T = TypeVar("T")


def distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This rank's number; the launcher's where torch.distributed has not started yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if distributed() else 1


def sum_over(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def on_rank_zero(task: Callable[[], T]) -> T:
    """Run a task on rank 0 and give its result to all; where it fails, every rank raises the same TitansError.

    For files that one rank writes: the others neither go on without them nor wait for ever.
    """
    if not distributed():
        return task()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = task()
        except Exception as error:
            box[1] = error if isinstance(error, TitansError) else TitansError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])
