"""Functions replayed as CUDA graphs: a plain one, and one that autograd sees as one node of two graphs.

`Graphs`, for functions with gradients:

Forward copies the inputs into buffers, replays the function's graph (without autograd) and copies the outputs out of
buffers. Backward copies inputs and output gradients, and replays a second graph: the function once more, with autograd,
and its gradients. Nothing is kept between the two but the inputs: calls may come in any order before they go back.

Parameters are read where they lie. Where one has moved since, the function is captured again, and, where they keep
moving, no more; a backward pass that finds them elsewhere computes without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from titans_ds.cuda_graphs.buffers import Gathered, Slots, row_slice
from titans_ds.cuda_graphs.capture import Capture, addresses, num_bytes
from titans_ds.errors import ConfigError

_LOG = logging.getLogger(__name__)
MOST_PAIRS = 24  # captured pairs of one owner, with gradients and without; calls of further shapes run without a graph
MOST_MOVES = 3  # times that parameters may move

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What a function returns.

    Args:
        outputs: by name.
        intermediates: tensors inside the function, whose gradients are handed out in the backward pass, too.
        totals: outputs that are sums over all rows.
    """

    outputs: Tensors
    intermediates: list[Tensor] = field(default_factory=list)
    totals: frozenset[str] = frozenset()


# (inputs, parameters) -> Result: without randomness, without a wait for the device; what it branches on is in its key.
Function = Callable[[Tensors, Tensors], Result]


@dataclass(frozen=True)
class Slices:
    """How a call's rows (samples) are cut, where they have nothing to do with one another.

    Args:
        count: number of slices, of equally many rows: dimension 0 of every input, of every output that is no total, and
            of intermediates.
        shared: inputs that have no rows, and go whole into every slice.
    """

    count: int = 1
    shared: frozenset[str] = frozenset()

    def first(self, given: Tensors) -> Tensors:
        """What the function is captured for."""
        if self.count == 1:
            return given
        return {n: t if n in self.shared else t.detach()[: t.shape[0] // self.count] for n, t in given.items()}


class CapturedPair:
    """A function at fixed shapes: those of a slice, of which a call may have any number. Not made in a backward pass.

    Results lie where inputs lay: a replay takes its inputs first, and leaves results last.

    Args:
        function: see there.
        given, held: its inputs, and its parameters, which stay where they are.
        needs: names of those that need a gradient.
        where: captures.
    """

    def __init__(
        self, function: Function, given: Tensors, held: Tensors, needs: frozenset[str], where: Capture
    ) -> None:
        self._where, self._names, self._held, self._needs = where, list(given), list(held), needs
        self.addresses = addresses(held.values())
        self.connected: set[str] = set()  # of inputs and parameters: those that get a gradient
        given = {n: t.detach().clone() for n, t in given.items()}
        fixed = {n: t.detach() for n, t in held.items()}
        self._measure(function, given, fixed)
        self._record(function, given, fixed)

    def _measure(self, function: Function, given: Tensors, fixed: Tensors) -> None:
        """Outputs, and buffers for inputs, outputs and gradients."""
        found: list[Result] = []

        def run() -> None:
            with torch.set_grad_enabled(bool(self._needs)):
                found.append(function(*_leaves(given, fixed, self._needs)))

        self._where.warm_up(run)
        outputs, intermediates = found[0].outputs, found[0].intermediates
        self.outputs, self.totals = list(outputs), found[0].totals
        self.differentiable = [n for n, t in outputs.items() if t.requires_grad]
        gradients = [t for n, t in (given | fixed).items() if n in self._needs]
        gradients = gradients + intermediates if self.differentiable else []
        self._make_buffers(list(given.values()), outputs, gradients)

    def _make_buffers(self, given: list[Tensor], outputs: Tensors, gradients: list[Tensor]) -> None:
        made, asked = list(outputs.values()), [outputs[n] for n in self.differentiable]
        behind = num_bytes(given)
        arena = self._where.arena(max(behind + num_bytes(asked), num_bytes(made), num_bytes(gradients)))
        self._given, self._d_outputs = Slots(arena, 0, given), Slots(arena, behind, asked)
        self._made, self._gradients = Slots(arena, 0, made), Slots(arena, 0, gradients)

    def _record(self, function: Function, given: Tensors, fixed: Tensors) -> None:
        static = dict(zip(given, self._given.buffers, strict=True))

        def forward() -> None:
            with torch.no_grad():
                self._made.store(list(function(static, fixed).outputs.values()))

        def backward() -> None:
            # In this thread: another one has a workspace of its own in cuBLAS, 32 MiB on an H100.
            with torch.autograd.set_multithreading_enabled(False):
                found = self._differentiate(function, static, fixed, self._d_outputs.buffers)
            self.connected = {n for n, t in zip(self._asked, found, strict=False) if t is not None}
            self._gradients.store(found)

        with torch.no_grad():
            self._forward = self._capture(forward, given)
            if self.differentiable:
                self._backward = self._capture(backward, given)

    def _capture(self, function: Callable[[], None], given: Tensors) -> Callable[[], None]:
        self._given.fill(list(given.values()))
        self._where.warm_up(function)
        return self._where.record(function)

    def forward(self, flat: Sequence[Tensor], function: Function, slices: Slices) -> tuple[Tensor, ...]:
        """The outputs, from inputs and parameters in one flat list; replayed where no parameter has moved."""
        given, held = self._split(flat)
        if addresses(held.values()) != self.addresses:
            with torch.no_grad():
                return tuple(t.clone() for t in function(given, held).outputs.values())
        with self._where.exclusive():
            found = Gathered(self._made, [n not in self.totals for n in self.outputs], slices.count)
            for index in range(slices.count):
                self._fill(given, index)
                self._forward()
                found.collect(index)
            return tuple(found.tensors)

    def backward(
        self, flat: Sequence[Tensor], d_outputs: Sequence[Tensor | None], function: Function, slices: Slices
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients in inputs and parameters (None where there is none), and those of intermediates."""
        given, held = self._split(flat)
        found: list[Tensor | None]
        if addresses(held.values()) == self.addresses:
            found = list(self._replay_backward(given, d_outputs, slices))
        else:
            found = self._differentiate(function, given, held, d_outputs)
        by_name = {n: t for n, t in zip(self._asked, found, strict=False) if n in self.connected}
        return [by_name.get(n) for n in (*self._names, *self._held)], found[len(self._asked) :]

    def _replay_backward(self, given: Tensors, d_outputs: Sequence[Tensor | None], slices: Slices) -> list[Tensor]:
        by_row = [n in given and n not in slices.shared for n in self._asked]
        by_row += [True] * (len(self._gradients.buffers) - len(by_row))
        with self._where.exclusive():
            found = Gathered(self._gradients, by_row, slices.count)
            for index in range(slices.count):
                self._fill(given, index)
                buffers = zip(d_outputs, self._d_outputs.buffers, strict=True)
                self._d_outputs.fill([None if d is None else row_slice(d, index, b) for d, b in buffers])
                self._backward()
                found.collect(index)
        return found.tensors

    def _fill(self, given: Tensors, index: int) -> None:
        self._given.fill([row_slice(t, index, b) for t, b in zip(given.values(), self._given.buffers, strict=True)])

    @property
    def _asked(self) -> list[str]:
        return [n for n in (*self._names, *self._held) if n in self._needs]

    def _differentiate(
        self, function: Function, given: Tensors, held: Tensors, d_outputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        with torch.enable_grad():
            given, held = _leaves(given, held, self._needs)
            result = function(given, held)
        outputs, intermediates = [result.outputs[n] for n in self.differentiable], result.intermediates
        known = [torch.zeros_like(t) if d is None else d for t, d in zip(outputs, d_outputs, strict=True)]
        edges: list[Any] = [t if t.grad_fn is None else get_gradient_edge(t) for t in outputs]
        del result, outputs  # whose memory nobody needs on the way back
        leaves = [t for n, t in (given | held).items() if n in self._needs]
        return list(torch.autograd.grad(edges, [*leaves, *intermediates], known, allow_unused=True))

    def _split(self, flat: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        count = len(self._names)
        return dict(zip(self._names, flat[:count], strict=True)), dict(zip(self._held, flat[count:], strict=True))


def _leaves(given: Tensors, held: Tensors, needs: frozenset[str]) -> tuple[Tensors, Tensors]:
    """The same memory, as tensors that autograd starts from."""
    first, second = ({n: t.detach().requires_grad_(n in needs) for n, t in ts.items()} for ts in (given, held))
    return first, second


@dataclass(frozen=True)
class _Call:
    captured: CapturedPair
    function: Function
    slices: Slices
    on_gradient: Callable[[Tensor], None] | None
    known: Tensors


class _Replayed(torch.autograd.Function):
    """(call, inputs, parameters) -> outputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        captured = call.captured
        if call.known.keys() >= set(captured.outputs):
            outputs = tuple(call.known[n].detach() for n in captured.outputs)
        else:
            outputs = captured.forward(flat, call.function, call.slices)
        named = zip(captured.outputs, outputs, strict=True)
        ctx.mark_non_differentiable(*(t for n, t in named if n not in captured.differentiable))
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            raise ConfigError(
                "create_graph: a memory replayed as CUDA graphs has no second derivatives; "
                "set training.memory_graphs to 'off' (in code: use_memory_graphs('off'))"
            )
        known = [d for n, d in zip(call.captured.outputs, d_outputs, strict=True) if n in call.captured.differentiable]
        found, inner = call.captured.backward(ctx.saved_tensors, known, call.function, call.slices)
        for gradient in inner:
            if call.on_gradient is not None and gradient is not None:
                call.on_gradient(gradient)
        return (None, *found)


class Graphs:
    """The captured functions of one owner: a pair for every key, shape, dtype and set of gradients, first come."""

    def __init__(self) -> None:
        self._pairs: dict[Hashable, CapturedPair] = {}
        self._seen: set[Hashable] = set()
        self._moves = 0

    def call(
        self,
        where: Capture,
        key: Hashable,
        function: Function,
        given: Tensors,
        held: Tensors,
        on_gradient: Callable[[Tensor], None] | None = None,
        slices: Slices = Slices(),
        known: Tensors | None = None,
    ) -> Tensors | None:
        """The function's outputs; None where it has to be called without a graph.

        Args:
            where: captures.
            key: everything that the function depends on beside its tensors' values, shapes and dtypes.
            function: see there; may be called now or in the backward pass.
            given, held: its inputs, its parameters.
            on_gradient: takes the gradients of the function's intermediates.
            slices: replay the graphs of a part of the rows, one part after the other.
            known: outputs of the same call, made before: where all of them are here, only the way back is replayed.
        """
        needs = frozenset(n for n, t in (given | held).items() if t.requires_grad and torch.is_grad_enabled())
        if on_gradient is not None and not needs:
            return None
        first = slices.first(given)
        shapes = tuple((n, t.shape, t.dtype) for n, t in first.items())
        captured = self._find((key, needs, shapes, slices.shared), function, first, held, needs, where)
        if captured is None:
            return None
        # What gets no gradient must not look as if it did: an engine's hooks would wait for it, or meet none.
        flat = [t if n in captured.connected else t.detach() for n, t in (given | held).items()]
        if captured.differentiable:
            outputs = _Replayed.apply(  # type: ignore[no-untyped-call]
                _Call(captured, function, slices, on_gradient, known or {}), *flat
            )
        else:
            with torch.no_grad():
                outputs = captured.forward(flat, function, slices)
        return dict(zip(captured.outputs, outputs, strict=True))

    def _find(
        self, key: Hashable, function: Function, given: Tensors, held: Tensors, needs: frozenset[str], where: Capture
    ) -> CapturedPair | None:
        found = self._pairs.get(key)
        # A recomputation (activation checkpointing) has to do what its call did: no pair comes or goes in a backward.
        if torch._C._current_graph_task_id() != -1:
            return found
        if self._moves > MOST_MOVES:
            return None
        if found is not None:
            if addresses(held.values()) == found.addresses:
                return found
            self._note_move()
        elif not self._worth(key, needs):
            return None
        return self._capture(key, function, given, held, needs, where)

    def _worth(self, key: Hashable, needs: frozenset[str]) -> bool:
        """At once in training, whose shapes stay; without gradients from the second time on: texts differ in length."""
        if sum(bool(pair.differentiable) == bool(needs) for pair in self._pairs.values()) >= MOST_PAIRS:
            return False
        known = bool(needs) or key in self._seen
        if len(self._seen) < 64 * MOST_PAIRS:
            self._seen.add(key)
        return known

    def _note_move(self) -> None:
        self._moves += 1
        if self._moves > MOST_MOVES:
            _LOG.warning("a memory's parameters keep moving: it isn't replayed as CUDA graphs any more")
            self._pairs.clear()

    def _capture(
        self, key: Hashable, function: Function, given: Tensors, held: Tensors, needs: frozenset[str], where: Capture
    ) -> CapturedPair | None:
        self._pairs.pop(key, None)
        if where.failed or self._moves > MOST_MOVES:
            return None
        try:
            with where.exclusive():
                made = where.in_own_thread(lambda: CapturedPair(function, given, held, needs, where))
        except ConfigError:
            raise
        except RuntimeError as error:
            where.give_up(error)
            return None
        self._pairs[key] = made
        return made


class StaticFunction:
    """A function of fixed shapes, without gradients, that runs as one CUDA graph from its third call on.

    The first call runs it on a side stream: kernels compile, libraries take their workspaces. The second captures it
    and replays the capture, as later ones do. A graph's temporary tensors may lie where another's do: results must be
    copied to tensors from outside of the graphs.

    Args:
        function: reads and writes tensors that stay where they are; must not wait for the device.
        capture: shared by all functions that run by turns; None where there are no graphs.
    """

    def __init__(self, function: Callable[[], None], capture: Capture | None) -> None:
        self._function, self._capture = function, capture
        self._replay: Callable[[], None] | None = None
        self._warm = False

    @property
    def is_captured(self) -> bool:
        """Whether calls are replays by now."""
        return self._replay is not None

    def __call__(self) -> None:
        """Run the function, one way or the other. Raises OutOfMemoryError where a capture takes too much."""
        if self._replay is None and self._capture is not None and not self._capture.failed:
            if not self._warm:
                self._capture.warm_up(self._function)
                self._warm = True
                return
            self._replay = self._record(self._capture)
        (self._replay or self._function)()

    def _record(self, capture: Capture) -> Callable[[], None] | None:
        try:
            return capture.record(self._function)
        except RuntimeError as error:
            cause = error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            capture.give_up(error)
            return None
