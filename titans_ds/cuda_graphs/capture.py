"""Where CUDA graphs of a device are captured, and the memory that they share.

Nothing of a graph's own memory outlives a replay: inputs are copied into buffers first, results out of buffers last.
So all graphs share one pool, and their buffers one place, and take turns.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_ALIGNED = 256  # bytes
_captures: weakref.WeakValueDictionary[torch.device, Capture] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Arena:
    """Bytes that buffers lie in; they live as long as someone holds it."""

    memory: Tensor

    def views(self, start: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Buffers one after the other, from byte `start` on."""
        found = []
        for t in like:
            found.append(self.memory[start : start + t.nbytes].view(t.dtype).view(t.shape))
            start += num_bytes([t])
        return found

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory lies in this arena."""
        return bool(tensor.untyped_storage()._cdata == self.memory.untyped_storage()._cdata)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python collects no cycles: an older graph in one would be destroyed, and break the capture under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_on_side_stream(function: Callable[[], None], stream: Any) -> None:
    """Run on the side stream where captures are made: kernels compile, libraries take their workspaces."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)


def capture_graph(function: Callable[[], None], stream: Any, pool: Any) -> Any:
    """The function's CUDA graph, from this side stream. Raises RuntimeError where it can't be captured."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    try:
        # thread_local: other threads (of a data loader, of NCCL) may do meanwhile what a capture forbids.
        with (
            no_collection(),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            function()
    except RuntimeError:
        torch.cuda.set_stream(current)  # which a capture that ends badly doesn't
        raise
    return graph


def reason_of(error: BaseException) -> str:
    """What made a capture fail, in one line: the error under the one that its end raises."""
    return str(error.__context__ or error).strip().partition("\n")[0]


def num_bytes(like: Sequence[Tensor]) -> int:
    """What buffers of these take in an arena."""
    return sum(-(-t.nbytes // _ALIGNED) * _ALIGNED for t in like)


class Capture:
    """What captured functions of one device share. This class knows no graphs: `CudaCapture` does.

    Args:
        device: where the functions run.
        what: the functions, for the warning where they can't be captured.
    """

    def __init__(self, device: torch.device, what: str = "memories") -> None:
        self.device = device
        self._what = what
        self.failed = False
        self._lock = threading.Lock()
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()

    def arena(self, size: int) -> Arena:
        """At least so many bytes; the same for all functions, as long as none needs a larger one."""
        for arena in self._arenas:
            if arena.memory.numel() >= size:
                return arena
        made = Arena(torch.zeros(size, dtype=torch.uint8, device=self.device))
        self._arenas.add(made)
        return made

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """The time in which buffers and pool belong to one call."""
        with self._lock:
            yield

    def in_own_thread(self, function: Callable[[], _T]) -> _T:
        """Run in a thread of its own, where no caller's mode holds: hooks on what autograd saves, inference mode."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(function).result()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run once, so that kernels compile and libraries take their workspaces."""
        raise NotImplementedError

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does the function's work again, on the same memory. Raises RuntimeError where it can't be captured."""
        raise NotImplementedError

    def give_up(self, error: BaseException) -> None:
        """Capture nothing more, and say so once."""
        if not self.failed:
            _LOG.warning(
                "%s can't be captured as CUDA graphs, and run one kernel at a time: %s", self._what, reason_of(error)
            )
        self.failed = True


class CudaCapture(Capture):
    """Captures on a side stream; replays on the caller's."""

    def __init__(self, device: torch.device, what: str = "memories") -> None:
        super().__init__(device, what)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._first: Any = None  # the pool lives as long as one of its graphs
        self._last: Any = None  # the stream of the call before

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Also in the order of streams, where calls come from several."""
        with super().exclusive():
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def in_own_thread(self, function: Callable[[], _T]) -> _T:
        """In a thread of its own, on the caller's device and stream."""
        stream = torch.cuda.current_stream(self.device)

        def there() -> _T:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                return function()

        return super().in_own_thread(there)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function on the side stream, where kernels compile and libraries take their workspaces."""
        run_on_side_stream(function, self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function as a CUDA graph; returns what replays it."""
        graph = capture_graph(function, self._stream, self._pool)
        self._first = self._first or graph
        replay: Callable[[], None] = graph.replay
        return replay


def capture_of(device: torch.device) -> Capture | None:
    """The device's, which lives as long as someone holds it; None where there are no CUDA graphs."""
    if device.type != "cuda":
        return None
    if device not in _captures:
        made = CudaCapture(device)
        _captures[device] = made
        return made
    return _captures[device]


def addresses(tensors: Iterable[Tensor]) -> list[tuple[int, torch.dtype]]:
    """Where tensors lie: a graph reads parameters at the address that they had when it was captured."""
    return [(t.data_ptr(), t.dtype) for t in tensors]
