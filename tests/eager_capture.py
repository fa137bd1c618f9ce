"""CUDA graphs without CUDA: a capture whose replay calls the function again, on the same buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from titans_ds.memory import NeuralMemory
from titans_ds.memory.graphed import MemoryGraphs
from titans_ds.memory.kernels.capture import Capture


class EagerCapture(Capture):
    """Buffers hold nothing between calls: whatever a call leaves there is destroyed."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.fail = fail
        self.recorded = self.replays = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with super().turn():
            yield
            for arena in list(self._arenas):
                arena.memory.fill_(255)  # not a number, in any precision

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            function()

        return replay


def graphed(memory: NeuralMemory, fail: bool = False) -> EagerCapture:
    """Give a memory graphs on the CPU."""
    capture = EagerCapture(fail)
    memory.graphs = MemoryGraphs("on", lambda device: capture)
    return capture
