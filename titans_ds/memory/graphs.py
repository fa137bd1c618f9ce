"""A layer memory's whole call, projections to output, replayed as CUDA graphs: see titans_ds.cuda_graphs.replay.

A memory launches hundreds to thousands of small kernels a call; one by one, the launching takes longer than the work.
Calls that write are replayed, in training, evaluation and priming. The others go the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from titans_ds.cuda_graphs.capture import Capture, capture_of
from titans_ds.cuda_graphs.replay import Function, Graphs, Result, Slices, Tensors
from titans_ds.errors import ConfigError
from titans_ds.memory.interface import READ, UNCHANGED, Controls, LayerTrace, Pass
from titans_ds.memory.state import LayerState

Choice = Literal["auto", "on", "off"]
CHOICES: tuple[Choice, ...] = ("auto", "on", "off")
# Tokens of a slice of a batch, above which pool and buffers stop growing. Slices of half as many take 30% to 40% less
# memory, and 20% to 30% more time (docs/cuda_graphs.md).
SLICE_TOKENS = 16384


class Answer(NamedTuple):
    """What a memory's call gives.

    Args:
        read: [B, T, H]; or [B, N, H] for N queries of MAC; or the surrogate [1] in the second phase of second order,
            whose gradient alone counts: its value is left at 0 where the state after the call is known already.
        state: after the call.
        stats: each [B], where they are asked for: inner_loss_before, inner_loss_after, write_norm.
    """

    read: Tensor
    state: LayerState
    stats: LayerState


class LayerMemory(nn.Module):
    """The memory of one layer, which every kind inherits: its call is its `compute`, replayed where it can be.

    Reads and writes go through `__call__`, where ZeRO-3 gathers parameters. The state is a value: a call returns a new
    one, and changes nothing in the one that it was given.

    Args:
        hidden_size: model width H.
        heads: memories side by side.
        width: of keys, values and queries, all heads together.
    """

    def __init__(self, hidden_size: int, heads: int, width: int) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.width = hidden_size, heads, width
        self.graphs = MemoryGraphs()

    @property
    def graph_key(self) -> Hashable:
        """Everything that `compute` depends on, beside its arguments and this module's mode and tensors."""
        return None

    @property
    def launches_many(self) -> bool:
        """Whether a call has so many launches that `auto` replays it."""
        return True

    @property
    def is_parallel(self) -> bool:
        """Whether all tokens of a call are worked on at once: half the samples then take half the time."""
        return False

    @property
    def reads_own_writes(self) -> bool:
        """Whether a token reads what tokens before it have written in the same call."""
        return True

    def keeps_little(self, plan: Pass) -> bool:
        """Whether the graph of a write is small beside its inputs."""
        return False

    def num_bytes(self) -> int:
        """Bytes of one sample's state, with hidden states in bf16."""
        like = torch.empty(1, 1, self.hidden_size, dtype=torch.bfloat16, device="meta")
        return sum(t.numel() * t.element_size() for t in self.initial_state(1, like).values())

    def forward(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None = None,
        reset_B: Tensor | None = None,
        plan: Pass = READ,
        queries_ND: Tensor | None = None,
        trace: LayerTrace | None = None,
    ) -> Answer:
        """Read every token with the given state; write the segment, if the plan says so.

        Causal: a token reads what the tokens up to it have written, never what a later one writes.

        Args:
            hidden_BTH: input of the layer that this memory is grafted on, [B, T, H]; no tokens: see `close`.
            state: None starts every sample from an unwritten memory.
            mask_BT: true (1) where a token may be written; all of them if None. Others may hold anything, NaN too.
            reset_B: true where a sample starts from an unwritten memory whatever the state says.
            plan: see Pass.
            queries_ND: read these N queries instead of the tokens', with the state from before this call (MAC).
            trace: of second order in two phases; see LayerTrace.
        """
        given = (hidden_BTH, state, mask_BT, reset_B, plan, queries_ND, trace)
        replayed = self.graphs.run(self, *given)
        return self.compute(*given) if replayed is None else replayed

    def compute(
        self,
        hidden_BTH: Tensor,
        state: LayerState | None,
        mask_BT: Tensor | None,
        reset_B: Tensor | None,
        plan: Pass,
        queries_ND: Tensor | None,
        trace: LayerTrace | None,
    ) -> Answer:
        """`forward`, kernel by kernel. Never waits for the device, so that it can be captured."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, like_BTH: Tensor) -> LayerState:
        """The state of an unwritten memory: a dict of tensors with a leading batch dimension, at least fp32.

        Args:
            batch_size: B.
            like_BTH: hidden states, for device, dtype and width.
        """
        raise NotImplementedError

    def close(self, state: LayerState, controls: Controls = UNCHANGED) -> LayerState:
        """The state at the end of a text: everything that was written can be read. A kind without chunks returns it.

        Args:
            state: after the text.
            controls: those that it was written with.
        """
        return state


class MemoryGraphs:
    """The graphs of one memory.

    Args:
        choice: `auto` replays memories with many launches on a GPU, `on` all memories (and refuses where there are no
            graphs), `off` none.
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

    def run(
        self,
        memory: LayerMemory,
        hidden: Tensor,
        state: LayerState | None,
        mask: Tensor | None,
        reset: Tensor | None,
        plan: Pass,
        queries: Tensor | None,
        trace: LayerTrace | None,
    ) -> Answer | None:
        """What `memory.compute` returns for these arguments, replayed; None where it has to be called plainly.

        Raises:
            ConfigError: `on`, and there are no graphs for this memory: no GPU, or ZeRO-3.
        """
        if self.choice == "off" or not plan.write or not hidden.shape[1]:
            return None
        held = self._held(memory)
        where = self._usable(memory, hidden, held)
        if where is None:
            return None
        # A graph's inputs are tensors by name; those of a trace that is written again are among them.
        recorded = None if trace is None or trace.again else trace
        named = {"hidden": hidden, "mask": mask, "reset": reset, "queries": queries}
        if trace is not None and trace.again:
            named |= {"asked": trace.queries, "read_gradient": trace.read_gradient}
        given = {name: t for name, t in named.items() if t is not None}
        given |= {f"state.{name}": t for name, t in (state or {}).items()}
        key: Hashable = (plan, trace is not None, recorded is not None, memory.training, memory.graph_key)
        function = _function(memory, plan, state is None, trace)
        on_gradient = None if recorded is None else recorded.set_read_gradient
        known = None
        if trace is not None and trace.again and trace.after is not None:  # the surrogate's own value is not used
            known = {"read": hidden.new_zeros(1, dtype=torch.promote_types(hidden.dtype, torch.float32))}
            known |= {f"state.{name}": t for name, t in trace.after.items()}
        slices = _slices(memory, hidden, given)
        found = self._graphs.call(where, key, function, given, held, on_gradient, slices, known)
        if found is None:
            return None
        if recorded is not None:
            recorded.queries, recorded.after = found.pop("asked"), _with_prefix(found, "state.")
        return Answer(found.pop("read"), _with_prefix(found, "state."), _with_prefix(found, "stats."))

    def _usable(self, memory: LayerMemory, hidden: Tensor, held: Tensors) -> Capture | None:
        zero3 = any(hasattr(t, "ds_id") for t in held.values())
        if self._where is None or self._where.device != hidden.device:
            self._where = self._captures(hidden.device)
        if self.choice == "on" and (zero3 or self._where is None):
            reason = "ZeRO-3 moves a memory's parameters" if zero3 else f"this memory runs on {hidden.device.type}"
            raise ConfigError(
                f"training.memory_graphs is 'on', but {reason}, where nothing can be captured as CUDA graphs; "
                "set it to 'auto' or 'off'"
            )
        wanted = self.choice == "on" or memory.launches_many
        if self._where is None or zero3 or not wanted or _watched(memory, hidden):
            return None
        return self._where

    def _held(self, memory: nn.Module) -> Tensors:
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


def _slices(memory: LayerMemory, hidden_BTH: Tensor, given: Tensors) -> Slices:
    """As many samples at a time as have SLICE_TOKENS tokens, at least one; all, where an input has no rows."""
    rows, tokens = hidden_BTH.shape[:2]
    asked = given.get("queries")
    shared = frozenset({"queries"} if asked is not None and (asked.dim() == 2 or asked.shape[0] != rows) else ())
    if rows * tokens <= SLICE_TOKENS or not memory.is_parallel:
        return Slices(shared=shared)
    if any(t.dim() == 0 or t.shape[0] % rows for n, t in given.items() if n not in shared):
        return Slices(shared=shared)
    fits = (n for n in range(1, rows) if rows % n == 0 and rows // n * tokens <= SLICE_TOKENS)
    return Slices(next(fits, rows), shared)


def _with_prefix(found: Tensors, prefix: str) -> LayerState:
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


@dataclass
class _InnerTrace(LayerTrace):
    """A trace inside a captured function, which has no hooks."""

    read: Tensor | None = None

    def trace_read(self, queries: Tensor, read: Tensor) -> Tensor:
        """The read, which is kept: its gradient is asked for."""
        self.queries = queries.detach()
        self.read = read if read.requires_grad else read.detach().requires_grad_()
        return self.read


class _Holder(nn.Module):
    """A memory whose parameters are exchanged for the time of one call."""

    def __init__(self, memory: LayerMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, given: Tensors, plan: Pass, fresh: bool, trace: LayerTrace | None) -> Result:
        state = None if fresh else _with_prefix(given, "state.")
        tensors = (given["hidden"], state, given.get("mask"), given.get("reset"))
        answer = self.memory.compute(*tensors, plan, given.get("queries"), trace)
        outputs = {"read": answer.read} | {f"state.{n}": t for n, t in answer.state.items()}
        outputs |= {f"stats.{n}": t for n, t in answer.stats.items()}
        if not isinstance(trace, _InnerTrace):
            totals = frozenset() if trace is None else frozenset({"read"})  # <f_W(q), g>, over all samples
            return Result(outputs, totals=totals)
        asked, read_inside = cast(Tensor, trace.queries), cast(Tensor, trace.read)
        return Result(outputs | {"asked": asked}, [read_inside])


def _function(memory: LayerMemory, plan: Pass, fresh: bool, trace: LayerTrace | None) -> Function:
    traced, again = trace is not None, trace is not None and trace.again

    def call(given: Tensors, held: Tensors) -> Result:
        hidden, inner = given["hidden"], None
        if again:
            inner = LayerTrace(hidden, given.get("asked"), given.get("read_gradient"), again=True)
        elif traced:
            inner = _InnerTrace(hidden.detach())
        return cast(Result, torch.func.functional_call(_Holder(memory), held, (given, plan, fresh, inner)))

    return call
