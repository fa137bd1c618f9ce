"""Buffers of captured functions: filled before every replay, emptied after it, slice by slice of a call's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titans_ds.cuda_graphs.capture import Arena


class Slots:
    """Buffers, filled and emptied with one launch a dtype where shapes and strides allow it.

    Args:
        arena: where they lie.
        start: their first byte there.
        like: of these shapes and dtypes.
    """

    def __init__(self, arena: Arena, start: int, like: Sequence[Tensor]) -> None:
        self._arena = arena  # which lives as long as its buffers
        self.buffers = arena.views(start, like)
        dtypes = dict.fromkeys(t.dtype for t in like)
        self.groups = [[i for i, t in enumerate(like) if t.dtype == dtype] for dtype in dtypes]

    def fill(self, sources: Sequence[Tensor | None]) -> None:
        """Copy; zeros where there is nothing to copy."""
        for group in self.groups:
            given = [(self.buffers[i], t) for i in group if (t := sources[i]) is not None]
            if given:
                torch._foreach_copy_([b for b, _ in given], [t for _, t in given], non_blocking=True)
            empty = [self.buffers[i] for i in group if sources[i] is None]
            if empty:
                torch._foreach_zero_(empty)

    def store(self, results: Sequence[Tensor | None]) -> None:
        """`fill` at a captured function's end, when what it was given need not stay: it may lie where this goes."""
        self.fill([t.clone() if t is not None and self._arena.holds(t) else t for t in results])


class Gathered:
    """What slices leave in buffers, as new tensors of the whole call.

    Args:
        slots: the buffers of a slice.
        by_row: which of them hold the slice's rows, to lie behind those of the slice before; the others add up.
        count: number of slices.
    """

    def __init__(self, slots: Slots, by_row: Sequence[bool], count: int) -> None:
        self._slots, self._by_row = slots, by_row
        self.tensors = [
            t.new_empty(count * t.shape[0], *t.shape[1:]) if row else torch.empty_like(t)
            for t, row in zip(slots.buffers, by_row, strict=True)
        ]

    def collect(self, index: int) -> None:
        """From the buffers, after the replay of a slice."""
        for group in self._slots.groups:
            for add in (False, True):
                chosen = [i for i in group if add == (index > 0 and not self._by_row[i])]
                ours = [row_slice(self.tensors[i], index, self._slots.buffers[i]) for i in chosen]
                if ours:
                    join = torch._foreach_add_ if add else torch._foreach_copy_
                    join(ours, [self._slots.buffers[i] for i in chosen])


def row_slice(whole: Tensor, index: int, like: Tensor) -> Tensor:
    """Slice `index` of the rows, as many as `like` has; all of them where it has as many."""
    if whole.shape == like.shape:
        return whole
    return whole.narrow(0, index * like.shape[0], like.shape[0])
