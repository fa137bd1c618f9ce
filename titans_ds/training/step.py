"""One optimizer step: segments through the model, states handed on, gradients of the right scale.

The loss of a step is the sum of its token losses over the number of its target tokens, on all ranks and in all
accumulation steps together. Targets are counted before the forward passes. Engines average gradients over ranks, hence
the factor of world_size.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from titans_ds.memory import WRITE, MemoryState, Pass, SegmentTrace
from titans_ds.training.data.lanes import Step
from titans_ds.training.engine import Engine
from titans_ds.training.module import Outputs, States, Window, detach, run_segment
from titans_ds.training.settings import ONE_GRAPH, TrainingSettings
from titans_ds.training.speed.offload import OffloadActivations


class Source(Protocol):
    """Where segments come from: Lanes, or anything that gives batches like theirs."""

    def next(self) -> Step:
        """The next segment of every lane."""


@dataclass
class Carried:
    """What goes from one optimizer step to the next, beside parameters: this rank's lane states.

    Args:
        state: fast weights of this rank's lanes; None before the first step.
        restart: bool [lanes of this rank], true where a lane's next segment starts from W_0 whatever the data says
            (its state was not finite).
    """

    state: States | None = None
    restart: Tensor | None = None


@dataclass
class Passes:
    """What the forward and backward passes of a step gave on this rank.

    Args:
        loss_sum: of its token losses.
        targets: target tokens over all ranks.
        state: after the last segment, detached.
        stats: by segment, by layer.
        written: by segment: rows that held a token, bool [B].
    """

    loss_sum: Tensor
    targets: int
    state: States | None
    stats: list[States] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)


def run_passes(
    engine: Engine,
    lanes: Source,
    carried: Carried,
    settings: TrainingSettings,
    world_size: int,
    plan: Pass = WRITE,
) -> Passes:
    """Forward and backward of one optimizer step; gradients are left in the engine.

    Args:
        engine: runs the module.
        lanes: give the segments.
        carried: states from the step before; see `commit`.
        settings: order, window, accumulation.
        world_size: number of ranks.
        plan: of every forward pass; the settings decide about the graph of the writes.
    """
    windows = [[lanes.next() for _ in range(settings.window)] for _ in range(settings.accumulation)]
    _restart_rows(windows[0][0], carried)
    targets = sum(step.total_targets for window in windows for step in window)
    return run_windows(engine, windows, carried, settings, world_size, targets, plan)


def run_windows(
    engine: Engine,
    windows: list[list[Step]],
    carried: Carried,
    settings: TrainingSettings,
    world_size: int,
    targets: int,
    plan: Pass = WRITE,
) -> Passes:
    """`run_passes` of segments that are at hand.

    Args:
        engine: runs the module.
        windows: of segments, in order.
        carried: states from the step before.
        settings: order.
        world_size: number of ranks.
        targets: target tokens of the whole optimizer step, over all ranks.
        plan: as of `run_passes`.
    """
    scheme = settings.scheme
    plan = dataclasses.replace(
        plan,
        graph=scheme in ONE_GRAPH,
        through_base=scheme == "through_base",
        derived=settings.write_backward == "derived",
    )
    passes = Passes(torch.zeros((), device=engine.device), targets, carried.state)
    for number, window in enumerate(windows):
        last = number == len(windows) - 1
        part = _Part(engine, window, passes, world_size / targets, last, plan, settings.offload_activations)
        _WINDOWS[scheme](part)
    return passes


def commit(passes: Passes, carried: Carried) -> bool:
    """Hand the states on; a lane whose state is not finite starts anew. Returns whether all of them are finite."""
    carried.state, carried.restart = passes.state, None
    if not passes.state:
        return True
    state, finite_B = MemoryState(passes.state).mended()
    if finite_B is None:
        return True
    carried.state, carried.restart = state.layers, ~finite_B
    return False


def _restart_rows(step: Step, carried: Carried) -> None:
    if carried.restart is not None:
        step.batch.reset[:] |= carried.restart.cpu().numpy()


@dataclass(frozen=True)
class _Part:
    """One window of an optimizer step, and what its passes are like."""

    engine: Engine
    window: list[Step]
    passes: Passes
    scale: float
    last: bool
    plan: Pass
    offload: bool

    def keeping(self) -> contextlib.AbstractContextManager[object]:
        """The context of forward passes: where the graph keeps its tensors."""
        return OffloadActivations(self.engine.module) if self.offload else contextlib.nullcontext()

    def forward(self, step: Step, trace: SegmentTrace | None = None) -> Outputs:
        """One segment, from the state so far to the next."""
        with self.keeping():
            outputs = run_segment(self.engine, step.batch, self.passes.state, self.plan, trace)
        _note(self.passes, step, outputs)
        self.passes.state = outputs.state
        return outputs


def _first_order(part: _Part) -> None:
    for number, step in enumerate(part.window):
        loss_sum = part.forward(step).loss_sum
        part.engine.backward(loss_sum * part.scale, last=part.last and number == len(part.window) - 1)
        part.passes.state = detach(part.passes.state or {})


def _one_graph(part: _Part) -> None:
    """Second order, one backward pass through the window; with plan.through_base through the base model, too."""
    loss = torch.zeros((), device=part.engine.device)
    for step in part.window:
        loss = loss + part.forward(step).loss_sum
    part.engine.backward(loss * part.scale, last=part.last)
    part.passes.state = detach(part.passes.state or {})


def _two_phase(part: _Part) -> None:
    """Second order, one backward pass a segment and one through the writes: see titans_ds.memory.interface."""
    start, traces = part.passes.state, [SegmentTrace() for _ in part.window]
    for step, trace in zip(part.window, traces, strict=True):
        part.engine.backward(part.forward(step, trace).loss_sum * part.scale, last=False)
        part.passes.state = detach(part.passes.state or {})
        if part.offload:
            trace.to_host()
    with part.keeping():
        through_writes = part.engine(Window(traces, start, part.plan))
    part.engine.backward(through_writes, last=part.last)


_WINDOWS = {"first": _first_order, "two_phase": _two_phase, "window": _one_graph, "through_base": _one_graph}


def _note(passes: Passes, step: Step, outputs: Outputs) -> None:
    passes.loss_sum = passes.loss_sum + outputs.loss_sum.detach()
    if outputs.stats:
        passes.stats.append(outputs.stats)
        passes.written.append(torch.from_numpy(step.batch.mask.any(axis=1)))
