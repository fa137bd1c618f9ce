"""Call: what one forward pass of the base model does with the memories, as one keyword argument.

The call travels through the base model's keyword arguments to every layer. Activation checkpointing keeps keyword
arguments, so a recomputation in the backward pass meets the same given state, whatever has been committed since.
`generate()` refuses keyword arguments that it does not know: there a pre-hook of the base model binds the active call.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from titans_ds.memory import Access, LayerState, MemoryState, Tape

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
        follows: queries see the tokens before them (convolution): reads need the padding mask, and a generation's next
            step reads with the state that the step before moved on.
        new: by layer, the state it would write; filled by the forward pass (and again by a recomputation).
        stats: by layer, what the write reports.
        tape: takes what a second phase needs (titans_ds.memory.replay); None without one.
    """

    given: dict[int, LayerState] | None = None
    reset: Tensor | None = None
    mask: Tensor | None = None
    access: Access = field(default_factory=Access)
    follows: bool = False
    new: dict[int, LayerState] = field(default_factory=dict)
    stats: dict[int, LayerState] = field(default_factory=dict)
    tape: Tape | None = None

    def access_of(self, index: int, hidden: Tensor) -> Access:
        """What layer `index` does with these hidden states."""
        return self.access if self.tape is None else replace(self.access, record=self.tape.record(index, hidden))

    def state_of(self, index: int) -> LayerState | None:
        """The state that layer `index` reads, in a dict of its own: ZeRO-3 changes the dicts it meets, in place."""
        if self.follows and not self.access.write and index in self.new:
            return dict(self.new[index])
        return None if self.given is None else dict(self.given[index])

    def moved(self, memory: MemoryState | None) -> MemoryState | None:
        """The memory after a pass that read it: moved on by the pass's tokens, where queries see those before them."""
        return MemoryState(dict(self.new)) if self.follows and self.new else memory


@dataclass(frozen=True)
class MemoryOutput:
    """What one segment gives: hidden states [B, T, H], the state after it by layer, and stats [B] by layer."""

    last_hidden: Tensor
    state: dict[int, LayerState]
    stats: dict[int, LayerState]


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
        kwargs = {**kwargs, KEYWORD: _with_mask(call, args, kwargs) if call.follows else call}
    return args, kwargs


def _with_mask(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call with the padding mask of this forward's own tokens: a cached step's mask covers those before too."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(ids, Tensor):
        return call
    return replace(call, mask=mask[:, -ids.shape[1] :])
