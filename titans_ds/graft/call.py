"""Call: what one forward pass of the base model does with the memories, as one keyword argument.

The call travels through the base model's keyword arguments to every layer. Activation checkpointing keeps keyword
arguments, so a recomputation in the backward pass meets the same given state, whatever has been committed since.
`generate()` refuses keyword arguments that it does not know: there a pre-hook of the base model binds the active call.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from titans_ds.memory import Access, LayerState

KEYWORD = "titans_call"
_ACTIVE: contextvars.ContextVar[Call | None] = contextvars.ContextVar("titans_call", default=None)


@dataclass
class Call:
    """One forward pass.

    Args:
        given: states by layer, never changed; None starts every sample from W_0.
        reset: [B], true where a sample starts from W_0 whatever `given` says.
        mask: [B, T], true where a token may be written.
        access: read only, or read and write.
        new: by layer, the state it would write; filled by the forward pass (and again by a recomputation).
        stats: by layer, what the write reports.
    """

    given: dict[int, LayerState] | None = None
    reset: Tensor | None = None
    mask: Tensor | None = None
    access: Access = field(default_factory=Access)
    new: dict[int, LayerState] = field(default_factory=dict)
    stats: dict[int, LayerState] = field(default_factory=dict)


@contextlib.contextmanager
def active(call: Call | None) -> Iterator[None]:
    """Forward passes of a grafted base model inside this context carry `call` (None: memory skipped)."""
    token = _ACTIVE.set(call)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the base model: hand the active call down as a keyword argument."""
    call = _ACTIVE.get()
    if call is not None and KEYWORD not in kwargs:
        kwargs = {**kwargs, KEYWORD: call}
    return args, kwargs
