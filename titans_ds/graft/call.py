"""Call: what one forward pass of the base model does with the memories, as one keyword argument.

The call travels through the base model's keyword arguments to every layer. Activation checkpointing keeps keyword
arguments, so a recomputation in the backward pass meets the same given state, whatever has been committed since.
`generate()` refuses keyword arguments that it does not know, and other code knows nothing of them: there a pre-hook of
the base model, and of its decoder, binds the call that is active for this model.
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from titans_ds.errors import ConfigError, StateError
from titans_ds.memory import READ, LayerState, MemoryState, Pass, SegmentTrace

KEYWORD = "titans_call"
if TYPE_CHECKING:
    from titans_ds.graft.titans_model import TitansModel

# By the id of a base model, how to get its call: several grafted models may be at work at once.
_NOBODY: Mapping[int, Callable[[], Call]] = types.MappingProxyType({})
_ACTIVE: contextvars.ContextVar[Mapping[int, Callable[[], Call]]] = contextvars.ContextVar(
    "titans_call", default=_NOBODY
)


@dataclass
class Call:
    """One forward pass.

    Args:
        given: states by layer, never changed; None starts every sample from W_0.
        reset: [B], true where a sample starts from W_0 whatever `given` says.
        mask: [B, T], true where a token may be written.
        plan: read only, or read and write.
        follows: queries see the tokens before them (convolution): reads need the padding mask, and a generation's next
            step reads with the state that the step before moved on.
        continues: `given` has moved on by the tokens of the cache that the first pass comes with.
        new: by layer, the state it would write; filled by the forward pass (and again by a recomputation).
        stats: by layer, what the write reports.
        trace: takes what a second phase needs (titans_ds.memory.interface); None without one.
    """

    given: dict[int, LayerState] | None = None
    reset: Tensor | None = None
    mask: Tensor | None = None
    plan: Pass = READ
    follows: bool = False
    continues: bool = False
    new: dict[int, LayerState] = field(default_factory=dict)
    stats: dict[int, LayerState] = field(default_factory=dict)
    trace: SegmentTrace | None = None
    bound: bool = False  # a pass was given it
    _followed: tuple[Any, int] | None = None  # the cache of the pass before, and how many tokens were in it then
    _copies: dict[int, dict[int, LayerState]] = field(default_factory=dict)  # `given`, every sample so many times

    def moved(self, memory: MemoryState | None) -> MemoryState | None:
        """The memory after a pass that read it: moved on by the pass's tokens, where queries see those before them."""
        return MemoryState(dict(self.new)) if self.follows and self.new else memory

    def rows(self) -> int | None:
        """How many samples it has states of; None where all start from W_0."""
        return None if self.given is None else MemoryState(self.given).batch_size

    def repeated(self, times: int) -> Call:
        """With every sample `times` times, next to each other: how generate() lays out hypotheses."""
        if self.given is not None and times not in self._copies:
            self._copies[times] = MemoryState(self.given).repeat(times).layers
        return replace(self, given=self._copies.get(times))

    def follow(self, cache: Any, num_tokens: int) -> None:
        """Before a pass of `num_tokens` tokens behind those of `cache`: is the state at hand the one after these?

        Raises:
            ConfigError: the cache holds tokens that the memory's queries would have to see, and has not.
        """
        length = 0 if cache is None else cache.get_seq_length()
        if isinstance(length, Tensor) and length.dim():
            return  # a length a row, on the device: a decoder that hands on the state itself, see TitansModel.read
        length = int(length)
        if length == 0:  # a text's start, also where every step begins anew without a cache
            self.new.clear()
        elif self._followed is None and self.continues:
            pass
        elif self._followed is None or self._followed[0] is not cache or self._followed[1] != length:
            raise ConfigError(
                f"this memory's queries are convolved with the tokens before them, and past_key_values holds {length} "
                "tokens that it has not followed; leave past_key_values out, or go on from the memory that "
                "TitansModel.read returns, or train with memory.features.convolve_queries false"
            )
        self._followed = (cache, length + num_tokens)


@dataclass(frozen=True)
class MemoryOutput:
    """What one segment gives: hidden states [B, T, H], the state after it by layer, and stats [B] by layer."""

    last_hidden: Tensor
    state: dict[int, LayerState]
    stats: dict[int, LayerState]


@contextlib.contextmanager
def active(base_model: nn.Module, call: Callable[[], Call]) -> Iterator[None]:
    """Forward passes of this grafted base model inside the context carry what `call` returns."""
    token = _ACTIVE.set({**_ACTIVE.get(), id(base_model): call})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def current(base_model: nn.Module) -> Call | None:
    """The call that is active for this base model."""
    call = _ACTIVE.get().get(id(base_model))
    return None if call is None else call()


def bind(owner: TitansModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of the base model or its decoder, with the active call as a keyword argument."""
    call = current(owner.base_model)
    if call is None:
        owner.warn_of_no_memory()
        return args, kwargs
    ids = kwargs.get("input_ids", args[0] if args else None)
    given = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
    return args, {**kwargs, KEYWORD: call if given is None else _of_pass(call, given, kwargs)}


def _of_pass(call: Call, given: Tensor, kwargs: dict[str, Any]) -> Call:
    """The call for the rows of this pass and, where queries follow the text, with the mask of its own tokens.

    Args:
        given: token ids or embeddings [B, T, …].
        kwargs: of the pass.
    """
    batch, num_tokens = given.shape[:2]
    original = call
    if call.follows:
        call.follow(kwargs.get("past_key_values"), num_tokens)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:  # a cached step's mask covers the tokens before, too
            call = replace(call, mask=mask[:, -num_tokens:])
    rows = call.rows() or batch
    if batch % rows:
        raise StateError(
            f"the memory holds {rows} samples, but the input has {batch}; open a session with memory_session({batch}), "
            "or select() the samples you want"
        )
    original.bound = True
    return call if batch == rows else call.repeated(batch // rows)
