"""CUDA graphs without CUDA: a capture whose replay calls the function again, on the same buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from titans_ds.cuda_graphs.capture import Capture
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.memory.mlp import MLPMemory


class EagerCapture(Capture):
    """Buffers hold nothing between calls: whatever a call leaves there is destroyed."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.fail = fail
        self.recorded = self.replays = 0

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with super().exclusive():
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


def graphed(memory: MLPMemory, fail: bool = False) -> EagerCapture:
    """Give a memory graphs on the CPU."""
    capture = EagerCapture(fail)
    memory.graphs = MemoryGraphs("on", lambda device: capture)
    return capture


class StaticCallables:
    """torch.cuda.make_graphed_callables without CUDA: what it makes has one place for each input, output and gradient.

    A function's activations last until it is called again, so that a backward pass that comes later is wrong, or fails.
    """

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail
        self.captures = self.forwards = self.backwards = 0

    def __call__(
        self, functions: tuple[Callable[[Tensor], Tensor], ...], samples: tuple[tuple[Tensor], ...], pool: object
    ) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The functions, each in buffers of its own."""
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captures += 1
        return tuple(self._static(function, sample) for function, (sample,) in zip(functions, samples, strict=True))

    def _static(self, function: Callable[[Tensor], Tensor], place: Tensor) -> Callable[[Tensor], Tensor]:
        counts, made = self, {}
        warm = function(place)  # forward and backward, as PyTorch's own does
        out, d_out, d_place = warm.detach().clone(), torch.zeros_like(warm), torch.empty_like(place)
        if place.requires_grad:
            torch.autograd.grad(warm, place, d_out)

        class Replayed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, hidden: Tensor) -> Tensor:
                counts.forwards += 1
                made.clear()
                with torch.no_grad():
                    place.copy_(hidden)
                with torch.enable_grad():
                    made["out"] = function(place)
                out.copy_(made["out"].detach())
                return out.detach()

            @staticmethod
            def backward(ctx: Any, d_hidden: Tensor) -> Tensor:
                counts.backwards += 1
                d_out.copy_(d_hidden)
                (found,) = torch.autograd.grad(made.pop("out"), place, d_out)
                return d_place.copy_(found).detach()

        return Replayed.apply
