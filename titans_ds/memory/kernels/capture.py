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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_ALIGNED = 256  # bytes
_pass = threading.local()
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
        """Whether it lies here."""
        return bool(tensor.untyped_storage()._cdata == self.memory.untyped_storage()._cdata)


def _nothing(_: Tensor) -> bool:
    return False


@contextlib.contextmanager
def used_up(kept: Callable[[Tensor], bool] = _nothing) -> Iterator[None]:
    """Inside runs a graph's only backward pass, in this thread: what nobody else looks at may be overwritten.

    Args:
        kept: whether a tensor is not to be touched all the same.
    """
    before, _pass.kept = getattr(_pass, "kept", None), kept
    try:
        yield
    finally:
        _pass.kept = before


def is_used_up(tensor: Tensor) -> bool:
    """Whether this backward pass is one of these, and the tensor none of those that are kept."""
    kept = getattr(_pass, "kept", None)
    return kept is not None and not kept(tensor)


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


def aside(function: Callable[[], None], stream: Any) -> None:
    """Run on the side stream where captures are made: kernels compile, libraries take their workspaces."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)


def captured(function: Callable[[], None], stream: Any, pool: Any) -> Any:
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
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
    def turn(self) -> Iterator[None]:
        """The time in which buffers and pool belong to one call."""
        with self._lock:
            yield

    def apart(self, function: Callable[[], _T]) -> _T:
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
                "memories can't be captured as CUDA graphs, and run one kernel at a time: %s", reason_of(error)
            )
        self.failed = True


class CudaCapture(Capture):
    """Captures on a side stream; replays on the caller's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._first: Any = None  # the pool lives as long as one of its graphs
        self._last: Any = None  # the stream of the call before

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Also in the order of streams, where calls come from several."""
        with super().turn():
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            yield

    def apart(self, function: Callable[[], _T]) -> _T:
        """In a thread of its own, on the caller's device and stream."""
        stream = torch.cuda.current_stream(self.device)

        def there() -> _T:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                return function()

        return super().apart(there)

    def warm_up(self, function: Callable[[], None]) -> None:
        """On the side stream."""
        aside(function, self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph's replay."""
        graph = captured(function, self._stream, self._pool)
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
