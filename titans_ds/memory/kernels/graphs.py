"""A function of tensors, replayed as two CUDA graphs that autograd sees as one node.

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

from titans_ds.errors import ConfigError
from titans_ds.memory.kernels.capture import Capture

_LOG = logging.getLogger(__name__)
_MOST = 24  # captured pairs of one owner, with gradients and without; calls of further shapes run without a graph
_MOST_MOVES = 3  # times that parameters may move

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What a function returns.

    Args:
        outputs: by name.
        heard: tensors inside the function, whose gradients are handed out in the backward pass, too.
    """

    outputs: Tensors
    heard: list[Tensor] = field(default_factory=list)


# (inputs, parameters) -> Result: without randomness, without a wait for the device; what it branches on is in its key.
Function = Callable[[Tensors, Tensors], Result]


class _Slots:
    """Buffers, filled and emptied with one launch a dtype where shapes and strides allow it."""

    def __init__(self, where: Capture, role: str, like: Sequence[Tensor]) -> None:
        self._arena = where.arena(role, like)
        self.buffers = self._arena.views(like)
        dtypes = dict.fromkeys(t.dtype for t in like)
        self._groups = [[i for i, t in enumerate(like) if t.dtype == dtype] for dtype in dtypes]

    def fill(self, sources: Sequence[Tensor | None]) -> None:
        """Copy; zeros where there is nothing to copy."""
        for group in self._groups:
            given = [(self.buffers[i], t) for i in group if (t := sources[i]) is not None]
            if given:
                torch._foreach_copy_([b for b, _ in given], [t for _, t in given], non_blocking=True)
            empty = [self.buffers[i] for i in group if sources[i] is None]
            if empty:
                torch._foreach_zero_(empty)

    def copies(self) -> list[Tensor]:
        """New tensors of the same content."""
        made = [torch.empty_like(t) for t in self.buffers]
        for group in self._groups:
            torch._foreach_copy_([made[i] for i in group], [self.buffers[i] for i in group])
        return made


class Captured:
    """A function at fixed shapes. Make one with `capture`, outside of a backward pass.

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
        self.places = places(held.values())
        self._given = _Slots(where, "given", list(given.values()))
        self._given.fill([t.detach() for t in given.values()])
        self.connected: set[str] = set()  # of inputs and parameters: those that get a gradient
        static = dict(zip(given, self._given.buffers, strict=True))
        fixed = {n: t.detach() for n, t in held.items()}
        self._learn(function, static, fixed)
        self._record(function, static, fixed)

    def _learn(self, function: Function, static: Tensors, fixed: Tensors) -> None:
        """Outputs, and buffers for them and for gradients."""
        found: list[Result] = []

        def run() -> None:
            with torch.set_grad_enabled(bool(self._needs)):
                found.append(function(*_leaves(static, fixed, self._needs)))

        self._where.warm_up(run)
        outputs, heard = found[0].outputs, found[0].heard
        self.outputs = list(outputs)
        self.differentiable = [n for n, t in outputs.items() if t.requires_grad]
        self._made = _Slots(self._where, "made", list(outputs.values()))
        if self.differentiable:
            asked = [t for n, t in (static | fixed).items() if n in self._needs] + heard
            self._d_outputs = _Slots(self._where, "asked", [outputs[n] for n in self.differentiable])
            self._gradients = _Slots(self._where, "made", asked)

    def _record(self, function: Function, static: Tensors, fixed: Tensors) -> None:
        def forward() -> None:
            with torch.no_grad():
                self._made.fill(list(function(static, fixed).outputs.values()))

        def backward() -> None:
            found = self._differentiate(function, static, fixed, self._d_outputs.buffers)
            self.connected = {n for n, t in zip(self._asked, found, strict=False) if t is not None}
            self._gradients.fill(found)

        with torch.no_grad():
            self._where.warm_up(forward)
            self._forward = self._where.record(forward)
            if self.differentiable:
                self._where.warm_up(backward)
                self._backward = self._where.record(backward)

    def forward(self, flat: Sequence[Tensor], function: Function) -> tuple[Tensor, ...]:
        """The outputs, from inputs and parameters."""
        given, held = self._split(flat)
        if places(held.values()) != self.places:
            with torch.no_grad():
                return tuple(t.clone() for t in function(given, held).outputs.values())
        with self._where.turn():
            self._given.fill(list(given.values()))
            self._forward()
            return tuple(self._made.copies())

    def backward(
        self, flat: Sequence[Tensor], d_outputs: Sequence[Tensor | None], function: Function
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients in inputs and parameters (None where there is none), and those of what is heard."""
        given, held = self._split(flat)
        if places(held.values()) == self.places:
            with self._where.turn():
                self._given.fill(list(given.values()))
                self._d_outputs.fill(d_outputs)
                self._backward()
                copies = self._gradients.copies()
            found: list[Tensor | None] = list(copies)
        else:
            known = [
                torch.zeros_like(b) if d is None else d for b, d in zip(self._d_outputs.buffers, d_outputs, strict=True)
            ]
            found = self._differentiate(function, given, held, known)
        by_name = {n: t for n, t in zip(self._asked, found, strict=False) if n in self.connected}
        return [by_name.get(n) for n in (*self._names, *self._held)], found[len(self._asked) :]

    @property
    def _asked(self) -> list[str]:
        return [n for n in (*self._names, *self._held) if n in self._needs]

    def _differentiate(
        self, function: Function, given: Tensors, held: Tensors, d_outputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        with torch.enable_grad():
            given, held = _leaves(given, held, self._needs)
            result = function(given, held)
        outputs = [result.outputs[n] for n in self.differentiable]
        leaves = [t for n, t in (given | held).items() if n in self._needs]
        return list(torch.autograd.grad(outputs, [*leaves, *result.heard], d_outputs, allow_unused=True))

    def _split(self, flat: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        count = len(self._names)
        return dict(zip(self._names, flat[:count], strict=True)), dict(zip(self._held, flat[count:], strict=True))


def _leaves(given: Tensors, held: Tensors, needs: frozenset[str]) -> tuple[Tensors, Tensors]:
    """The same memory, as tensors that autograd starts from."""
    first, second = ({n: t.detach().requires_grad_(n in needs) for n, t in ts.items()} for ts in (given, held))
    return first, second


def places(tensors: Any) -> list[tuple[int, torch.dtype]]:
    """Where tensors lie."""
    return [(t.data_ptr(), t.dtype) for t in tensors]


@dataclass(frozen=True)
class _Call:
    captured: Captured
    function: Function
    hear: Callable[[Tensor], None] | None


class _Replayed(torch.autograd.Function):
    """(call, inputs, parameters) -> outputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        captured = call.captured
        outputs = captured.forward(flat, call.function)
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
        found, heard = call.captured.backward(ctx.saved_tensors, known, call.function)
        for gradient in heard:
            if call.hear is not None and gradient is not None:
                call.hear(gradient)
        return (None, *found)


class Graphs:
    """The captured functions of one owner: a pair for every key, shape, dtype and set of gradients, first come."""

    def __init__(self) -> None:
        self._pairs: dict[Hashable, Captured] = {}
        self._seen: set[Hashable] = set()
        self._moves = 0

    def call(
        self,
        where: Capture,
        key: Hashable,
        function: Function,
        given: Tensors,
        held: Tensors,
        hear: Callable[[Tensor], None] | None = None,
    ) -> Tensors | None:
        """The function's outputs; None where it has to be called without a graph.

        Args:
            where: captures.
            key: everything that the function depends on beside its tensors' values, shapes and dtypes.
            function: see there; may be called now or in the backward pass.
            given, held: its inputs, its parameters.
            hear: takes the gradients of what the function lets hear.
        """
        needs = frozenset(n for n, t in (given | held).items() if t.requires_grad and torch.is_grad_enabled())
        if hear is not None and not needs:
            return None
        shapes = tuple((n, t.shape, t.dtype) for n, t in given.items())
        captured = self._find((key, needs, shapes), function, given, held, needs, where)
        if captured is None:
            return None
        # What gets no gradient must not look as if it did: an engine's hooks would wait for it, or meet none.
        flat = [t if n in captured.connected else t.detach() for n, t in (given | held).items()]
        if captured.differentiable:
            outputs = _Replayed.apply(_Call(captured, function, hear), *flat)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                outputs = captured.forward(flat, function)
        return dict(zip(captured.outputs, outputs, strict=True))

    def _find(
        self, key: Hashable, function: Function, given: Tensors, held: Tensors, needs: frozenset[str], where: Capture
    ) -> Captured | None:
        found = self._pairs.get(key)
        # A recomputation (activation checkpointing) has to do what its call did: no pair comes or goes in a backward.
        if torch._C._current_graph_task_id() != -1:
            return found
        if self._moves > _MOST_MOVES:
            return None
        if found is not None:
            if places(held.values()) == found.places:
                return found
            self._note_move()
        elif not self._worth(key, needs):
            return None
        return self._capture(key, function, given, held, needs, where)

    def _worth(self, key: Hashable, needs: frozenset[str]) -> bool:
        """At once in training, whose shapes stay; without gradients from the second time on: texts differ in length."""
        if sum(bool(pair.differentiable) == bool(needs) for pair in self._pairs.values()) >= _MOST:
            return False
        known = bool(needs) or key in self._seen
        if len(self._seen) < 64 * _MOST:
            self._seen.add(key)
        return known

    def _note_move(self) -> None:
        self._moves += 1
        if self._moves > _MOST_MOVES:
            _LOG.warning("a memory's parameters keep moving: it isn't replayed as CUDA graphs any more")
            self._pairs.clear()

    def _capture(
        self, key: Hashable, function: Function, given: Tensors, held: Tensors, needs: frozenset[str], where: Capture
    ) -> Captured | None:
        self._pairs.pop(key, None)
        if where.failed or self._moves > _MOST_MOVES:
            return None
        try:
            with where.turn():
                made = where.apart(lambda: Captured(function, given, held, needs, where))
        except ConfigError:
            raise
        except RuntimeError as error:
            where.give_up(error)
            return None
        self._pairs[key] = made
        return made
