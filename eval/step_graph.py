"""A function of fixed shapes that runs as one CUDA graph from its third call on.

The first call runs the function on a side stream: kernels compile, libraries take their workspaces. The second captures
it and replays the capture, as all later ones do. A decode step has some thousand kernels of a few microseconds each;
launched one by one, the launching takes most of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from titans_ds.memory.kernels.capture import aside, captured, reason_of

_LOG = logging.getLogger(__name__)


class Capture:
    """Whether functions are captured, and the memory that their graphs share.

    A graph's temporary tensors may lie where another's do: results must be copied to tensors from outside the graphs.
    The first failure turns capturing off for good, with one warning.

    Args:
        device: where the functions run; only CUDA has graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.enabled else None
        self._pool: Any = torch.cuda.graph_pool_handle() if self.enabled else None

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run on the side stream, where captures are made."""
        aside(function, self._stream)

    def record(self, function: Callable[[], None]) -> Any:
        """The function's graph; None, and a warning, where it cannot be captured."""
        try:
            return captured(function, self._stream, self._pool)
        except RuntimeError as error:
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.enabled = False
            _LOG.warning(
                "Decode steps cannot be captured as CUDA graphs, and run one kernel at a time: %s", reason_of(error)
            )
            return None


class CapturedFunction:
    """See the module's text.

    Args:
        function: reads and writes tensors that stay where they are; must not wait for the device.
        capture: shared by all functions that run by turns.
    """

    def __init__(self, function: Callable[[], None], capture: Capture) -> None:
        self._function = function
        self._capture = capture
        self._graph: Any = None
        self._warm = False

    def __call__(self) -> None:
        """Run the function, one way or the other."""
        if self._graph is None and self._warm and self._capture.enabled:
            self._graph = self._capture.record(self._function)
        if self._graph is not None:
            self._graph.replay()
        elif self._capture.enabled and not self._warm:
            self._capture.warm_up(self._function)
        else:
            self._function()
        self._warm = True
