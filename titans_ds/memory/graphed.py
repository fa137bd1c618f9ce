"""A memory's whole call, projections to output, replayed as CUDA graphs: see titans_ds.memory.kernels.graphs.

A chunked memory launches hundreds to thousands of small kernels a call; one by one, the launching takes longer than
the work. Calls that write are replayed, in training, evaluation and priming. The others go the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError
from titans_ds.memory import kernels
from titans_ds.memory.kernels.capture import Capture, capture_of
from titans_ds.memory.kernels.graphs import Function, Graphs, Result, Slices, Tensors
from titans_ds.memory.replay import Record
from titans_ds.memory.state import LayerState

if TYPE_CHECKING:
    from titans_ds.memory.neural_memory import Access, NeuralMemory

Choice = Literal["auto", "on", "off"]
CHOICES: tuple[Choice, ...] = ("auto", "on", "off")
Answer = tuple[Tensor, LayerState, LayerState]  # of NeuralMemory.forward
# Tokens of a slice of a batch, above which pool and buffers stop growing. Slices of half as many take 30% to 40% less
# memory, and 20% to 30% more time (docs/kernels.md).
SLICE_TOKENS = 16384


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call of a memory, as NeuralMemory.forward takes them."""

    hidden: Tensor
    state: LayerState | None
    mask: Tensor | None
    reset: Tensor | None
    queries: Tensor | None

    def flatten(self, access: Access) -> Tensors:
        """By name, with a record's own."""
        record = access.replay
        named = {
            "hidden": self.hidden,
            "mask": self.mask,
            "reset": self.reset,
            "queries": self.queries,
            "asked": None if record is None else record.queries,
            "read_gradient": None if record is None else record.read_gradient,
        }
        state = {f"state.{name}": t for name, t in (self.state or {}).items()}
        return {name: t for name, t in named.items() if t is not None} | state


class MemoryGraphs:
    """The graphs of one memory.

    Args:
        choice: `auto` replays chunked memories on a GPU, `on` all memories (and refuses where there are no graphs),
            `off` none.
        captures: by device; None where nothing can be captured.
    """

    def __init__(self, choice: Choice = "off", captures: Callable[[torch.device], Capture | None] = capture_of) -> None:
        if choice not in CHOICES:
            raise ConfigError(f"memory graphs: {choice!r} is none of the choices; expected one of {', '.join(CHOICES)}")
        self.choice = choice
        self._captures = captures
        self._where: Capture | None = None
        self._graphs = Graphs()
        self._slots: list[tuple[str, dict[str, Any], str]] = []

    def __reduce__(self) -> tuple[type[MemoryGraphs], tuple[Choice]]:
        return MemoryGraphs, (self.choice,)  # a copy of the memory captures its own

    def answer(self, memory: NeuralMemory, inputs: Inputs, access: Access) -> Answer | None:
        """What the memory answers; None where it has to be called plainly.

        Raises:
            ConfigError: `on`, and there are no graphs for this memory: no GPU, or ZeRO-3.
        """
        if self.choice == "off" or not access.write:
            return None
        held = self._held(memory)
        where = self._usable(memory, inputs.hidden, held)
        if where is None:
            return None
        plain = replace(access, record=None, replay=None)
        given, recorded, replayed = inputs.flatten(access), access.record is not None, access.replay is not None
        key: Hashable = (
            *(access.graph, access.stats, access.controls, access.through_base, access.derived, recorded, replayed),
            *(memory.training, kernels.chosen()),
        )
        function = _function(memory, plain, recorded, replayed, inputs.state is None)
        hear = None if access.record is None else access.record.hear
        slices = _slices(memory, inputs.hidden, given)
        found = self._graphs.call(where, key, function, given, held, hear, slices)
        if found is None:
            return None
        if access.record is not None:
            access.record.queries = found.pop("asked")
        return found.pop("read"), _part(found, "state."), _part(found, "stats.")

    def _usable(self, memory: NeuralMemory, hidden: Tensor, held: Tensors) -> Capture | None:
        zero3 = any(hasattr(t, "ds_id") for t in held.values())
        if self._where is None or self._where.device != hidden.device:
            self._where = self._captures(hidden.device)
        if self.choice == "on" and (zero3 or self._where is None):
            reason = "ZeRO-3 moves a memory's parameters" if zero3 else f"this memory runs on {hidden.device.type}"
            raise ConfigError(
                f"training.memory_graphs is 'on', but {reason}, where nothing can be captured as CUDA graphs; "
                "set it to 'auto' or 'off'"
            )
        chunked = self.choice == "on" or memory.config.rule.chunk_size is not None
        if self._where is None or zero3 or not chunked or _watched(memory, hidden):
            return None
        return self._where

    def _held(self, memory: NeuralMemory) -> Tensors:
        """Parameters and buffers, as they are now."""
        if not self._slots:
            for prefix, module in memory.named_modules():
                for name in (*module._parameters, *module._buffers):
                    tensors = cast(
                        dict[str, Any], module._parameters if name in module._parameters else module._buffers
                    )
                    if tensors[name] is not None:
                        self._slots.append((f"memory.{prefix}{'.' if prefix else ''}{name}", tensors, name))
        return {name: tensors[key] for name, tensors, key in self._slots}


def _watched(memory: nn.Module, hidden: Tensor) -> bool:
    """Whether a replay would do less than a call: hooks, other types of tensors, autocast, a capture around this."""
    hooks = (
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in memory.modules()
        if m is not memory
    )
    return (
        type(hidden) not in (Tensor, nn.Parameter)
        or torch.is_autocast_enabled(hidden.device.type)
        or torch.compiler.is_compiling()
        or (hidden.is_cuda and torch.cuda.is_current_stream_capturing())
        or any(hooks)
    )


def _slices(memory: NeuralMemory, hidden_BTH: Tensor, given: Tensors) -> Slices:
    """As many samples at a time as have SLICE_TOKENS tokens, at least one; all, where an input has no rows."""
    rows, tokens = hidden_BTH.shape[:2]
    asked = given.get("queries")
    shared = frozenset({"queries"} if asked is not None and (asked.dim() == 2 or asked.shape[0] != rows) else ())
    if rows * tokens <= SLICE_TOKENS or not _parallel(memory):
        return Slices(shared=shared)
    if any(t.dim() == 0 or t.shape[0] % rows for n, t in given.items() if n not in shared):
        return Slices(shared=shared)
    fits = (n for n in range(1, rows) if rows % n == 0 and rows // n * tokens <= SLICE_TOKENS)
    return Slices(next(fits, rows), shared)


def _parallel(memory: NeuralMemory) -> bool:
    """Whether all tokens are worked on at once. Where chunk follows chunk, half the samples take as long as all."""
    rule = memory.config.rule
    linear = rule.optimizer in ("sgd", "momentum") and memory.fan is None and kernels.chosen() != "loop"
    return rule.chunk_size is None or (rule.chunk_semantics == "span" and linear)


def _part(found: Tensors, prefix: str) -> LayerState:
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


@dataclass
class _Heard(Record):
    """A record inside a captured function, which has no hooks."""

    read: Tensor | None = None

    def listen(self, queries: Tensor, read: Tensor) -> Tensor:
        """The read, which is kept: its gradient is asked for."""
        self.queries = queries.detach()
        self.read = read if read.requires_grad else read.detach().requires_grad_()
        return self.read


class _Whole(nn.Module):
    """A memory whose parameters are exchanged for the time of one call."""

    def __init__(self, memory: NeuralMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, given: Tensors, access: Access, fresh: bool) -> Result:
        state = None if fresh else _part(given, "state.")
        tensors = (given["hidden"], state, given.get("mask"), given.get("reset"), access, given.get("queries"))
        read, new, stats = cast(Any, self.memory).compute(*tensors)
        outputs = (
            {"read": read} | {f"state.{n}": t for n, t in new.items()} | {f"stats.{n}": t for n, t in stats.items()}
        )
        totals = frozenset() if access.replay is None else frozenset({"read"})  # <f_W(q), g>, over all samples
        if not isinstance(access.record, _Heard):
            return Result(outputs, totals=totals)
        asked, heard = cast(Tensor, access.record.queries), cast(Tensor, access.record.read)
        return Result(outputs | {"asked": asked}, [heard])


def _function(memory: NeuralMemory, access: Access, recorded: bool, replayed: bool, fresh: bool) -> Function:
    def call(given: Tensors, held: Tensors) -> Result:
        hidden = given["hidden"]
        full = access
        if recorded:
            full = replace(full, record=_Heard(hidden.detach()))
        if replayed:
            full = replace(full, replay=Record(hidden, given.get("asked"), given.get("read_gradient")))
        whole = _Whole(memory)
        return cast(Result, torch.func.functional_call(whole, held, (given, full, fresh)))

    return call
