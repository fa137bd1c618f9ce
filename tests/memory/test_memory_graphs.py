"""A memory replayed as CUDA graphs is the memory: values, gradients, and every way out of it.

Without a GPU the graphs are those of tests/support/eager_capture.py: copying, keys, order and fall-backs are tested
here, CUDA's own capture where there is a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.support.eager_capture import EagerCapture, graphed
from tests.support.kernel_memories import CASES, H, memory, run
from titans_ds.cuda_graphs.replay import MOST_MOVES, MOST_PAIRS
from titans_ds.errors import ConfigError
from titans_ds.memory import LayerTrace, Pass
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.memory.mlp import MLPMemory

WRITE = Pass(graph=True)
MASK = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.7


def tokens(count: int = 11, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, H, generator=generator, dtype=torch.float64)


def titans(chunk_size: int | None = 4) -> MLPMemory:
    return memory(*CASES["titans"], chunk_size, 2, 5)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def gradients(made: MLPMemory, h: torch.Tensor, plan: Pass = WRITE) -> list[torch.Tensor]:
    """Of one call, everything."""
    h = h.clone().requires_grad_()
    read, state, _ = made(h, None, None, None, plan)
    total = read.square().sum() + sum(t.square().sum() for t in state.values() if t.requires_grad)
    total.backward()
    found = [read.detach(), h.grad, *(p.grad for p in made.parameters() if p.grad is not None)]
    made.zero_grad()
    return found


@pytest.mark.parametrize("graph", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("name", CASES)
def test_every_rule_is_the_same(name: str, graph: bool) -> None:
    """Two calls, the second from the first's state, before either goes back."""
    made = memory(*CASES[name], 4, 2, 5)
    for mask in (None, MASK):
        made.graphs = MemoryGraphs()
        expected = run(made, tokens(), mask, "auto", graph)
        capture = graphed(made)
        same(run(made, tokens(), mask, "auto", graph), expected)
        assert capture.recorded == 4  # two calls, there and back
        same(run(made, tokens(), mask, "auto", graph), expected)
        assert (capture.recorded, capture.replays) == (4, 8)


_LOOPS = {
    "adamw": ({"optimizer": "adamw"}, {"step_size": 0.01}),
    "muon": ({"optimizer": "muon"}, {"step_size": 0.01, "learn_step_size": False}),
}


@pytest.mark.parametrize("name", _LOOPS)
def test_what_stays_with_the_loop_is_replayed_too(name: str) -> None:
    made = memory(*_LOOPS[name], 4, 2, 5)
    expected = run(made, tokens(), MASK, "auto", True)
    capture = graphed(made)
    same(run(made, tokens(), MASK, "auto", True), expected)
    assert capture.replays == 4


class _NoHost(TorchDispatchMode):
    """Refuses tensors of the host. (What asks for a value, or for a shape by values, fails on the device `meta`.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{func} on a tensor of the host"
        return out


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed step sizes"])
@pytest.mark.parametrize("name", [*CASES, *_LOOPS])
def test_a_call_never_waits_for_the_device(name: str, learned: bool) -> None:
    """Forward and backward, in every kind of call: nothing else can be captured."""
    rule, settings = CASES[name] if name in CASES else _LOOPS[name]
    own = {} if learned else {"learn_step_size": False}
    steps = {} if learned else {"step_sizes": [0.1 + level for level in range(settings.get("depth", 2))]}
    made = memory(rule | steps, settings | own, 4, 2, 5).to("meta")
    h = tokens().to("meta").requires_grad_()
    mask, reset = MASK.to("meta"), MASK[:, 0].to("meta")
    with _NoHost():
        first = Pass(graph=True, stats=True)
        read, state, _ = made.compute(h, None, None, None, first, None, None)
        for plan in (first, Pass(), replace(first, through_base=True)):
            given = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in state.items()}
            read, state, _ = made.compute(h, given, mask, reset, plan, None, None)
            leaves = [h, *given.values(), *made.parameters()]
            outputs = [t for t in (read, *state.values()) if t.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
        trace = LayerTrace(h.detach())
        made.compute(h, given, mask, reset, first, None, trace)[0].sum().backward()
        assert trace.read_gradient is not None
        made.compute(trace.hidden, given, mask, reset, first, None, trace.rewriting())[0].sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_a_replay_of_full_chunks_is_captured(name: str) -> None:
    """What is asked again lies in a graph's own buffers, which derivatives leave alone."""
    made, found = memory(*CASES[name], 4, 1, 5), []
    for captured in (False, True):
        made.graphs = MemoryGraphs()
        capture = graphed(made) if captured else None
        trace = LayerTrace(tokens(12))
        made(trace.hidden, None, None, None, WRITE, trace=trace)[0].square().sum().backward()
        made(trace.hidden, None, None, None, WRITE, trace=trace.rewriting())[0].sum().backward()
        assert capture is None or not capture.failed
        found.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
        made.zero_grad()
    same(*found)


def test_a_whole_segment_resets_and_stats() -> None:
    made = titans(chunk_size=None)
    reset = torch.tensor([True, False])
    plan = Pass(graph=True, stats=True)

    def call() -> list[torch.Tensor]:
        h = tokens().requires_grad_()
        _, state, _ = made(h, None, MASK, None, WRITE)
        read, state, stats = made(h, state, MASK, reset, plan)
        (read.sum() + state["w0"].square().sum()).backward()
        return [read, *state.values(), *stats.values(), h.grad]

    expected = call()
    capture = graphed(made)
    same(call(), expected)
    assert capture.recorded == 4


@pytest.mark.parametrize("through_base", [True, False])
def test_what_has_no_gradient_has_none(through_base: bool) -> None:
    made = titans()
    for plan in (Pass(), Pass(graph=True, through_base=through_base)):
        made.graphs = MemoryGraphs()
        plain = made(tokens().requires_grad_(), None, None, None, plan)
        graphed(made)
        found = made(tokens().requires_grad_(), None, None, None, plan)
        assert found[0].requires_grad == plain[0].requires_grad
        assert {n: t.requires_grad for n, t in found[1].items()} == {n: t.requires_grad for n, t in plain[1].items()}
        assert {n: (t.shape, t.dtype) for n, t in found[1].items()} == {
            n: (t.shape, t.dtype) for n, t in plain[1].items()
        }


def test_memories_take_turns_on_shared_buffers() -> None:
    """Calls of two memories, and their backward passes in the order that they were made."""
    first, second = titans(), memory(*CASES["titans"], 4, 2, 6)

    def call() -> list[torch.Tensor]:
        leaves = [tokens(seed=seed).requires_grad_() for seed in range(4)]
        reads = [m(h, None, None, None, WRITE)[0] for m, h in zip((first, second, first, second), leaves, strict=True)]
        for read in reads:
            read.square().sum().backward()
        found = [h.grad for h in leaves] + [p.grad for m in (first, second) for p in m.parameters()]
        for m in (first, second):
            m.zero_grad()
        return [t for t in found if t is not None]

    expected = call()
    capture = EagerCapture()
    first.graphs, second.graphs = (MemoryGraphs("on", lambda device: capture) for _ in range(2))
    same(call(), expected)
    assert capture.recorded == 4


def test_inputs_alone_are_kept() -> None:
    made = titans()
    graphed(made)
    h, state = tokens().requires_grad_(), made(tokens(), None, None, None, WRITE)[1]
    given = [h, MASK, *state.values(), *made.parameters(), *made.buffers()]
    own, kept = {t.untyped_storage().data_ptr() for t in given}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(h, state, MASK, None, WRITE)
    assert kept
    assert {t.untyped_storage().data_ptr() for t in kept} <= own


def test_gradients_add_up_and_a_graph_may_be_kept() -> None:
    made, h = titans(), tokens().requires_grad_()
    graphed(made)
    read = made(h, None, None, None, WRITE)[0]
    read.sum().backward(retain_graph=True)
    once = [h.grad.clone(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]
    read.sum().backward()
    twice = [h.grad, *(p.grad for p in made.parameters() if p.grad is not None)]
    same(twice, [2 * t for t in once])


@pytest.mark.parametrize("grad", [True, False])
def test_checkpointing(grad: bool) -> None:
    """The first call captures inside activation checkpointing, which counts what is kept."""
    made = titans()
    made.requires_grad_(grad)

    def call() -> list[torch.Tensor]:
        h = tokens().requires_grad_()
        reads = [
            checkpoint(lambda x: made(x * 1.5, None, MASK, None, WRITE)[0], h * scale, use_reentrant=False)
            for scale in (1.0, 2.0)
        ]
        sum(read.square().sum() for read in reads).backward()
        found = [*reads, h.grad, *(p.grad for p in made.parameters() if p.grad is not None)]
        made.zero_grad()
        return found

    expected = call()
    capture = graphed(made)
    same(call(), expected)
    assert (capture.recorded, capture.replays) == (2, 6)


def test_without_gradients_from_the_second_time_on() -> None:
    made = titans()
    expected = made(tokens(), None, MASK, None, Pass())
    capture = graphed(made)
    for context, replays in ((torch.no_grad(), 0), (torch.inference_mode(), 1), (torch.no_grad(), 2)):
        with context:
            found = made(tokens(), None, MASK, None, Pass())
        assert capture.replays == replays
        same([found[0], *found[1].values()], [expected[0], *expected[1].values()])
    assert capture.recorded == 1
    same(gradients(made, tokens()), gradients(titans(), tokens()))


def test_reads_alone_are_not_replayed() -> None:
    made = titans()
    capture = graphed(made)
    for _ in range(3):
        made(tokens().requires_grad_(), None)
    assert capture.recorded == 0


def test_parameters_are_read_where_they_lie() -> None:
    made, h = titans(), tokens()
    capture = graphed(made)
    gradients(made, h)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.9)
    other = copy.deepcopy(made)
    other.graphs = MemoryGraphs()
    same(gradients(made, h), gradients(other, h))
    assert capture.recorded == 2


def test_parameters_that_move_are_found(caplog) -> None:
    made, h = titans(), tokens()
    capture = graphed(made)
    gradients(made, tokens(5))
    capture.recorded = 0
    with caplog.at_level(logging.WARNING):
        for number in range(MOST_MOVES + 3):
            made.key_projection.weight.data = made.key_projection.weight.data * 0.9
            other = copy.deepcopy(made)
            other.graphs = MemoryGraphs()
            same(gradients(made, h), gradients(other, h))
            assert capture.recorded == 2 * min(number + 1, MOST_MOVES + 1)
    assert [r.message for r in caplog.records if "keep moving" in r.message][1:] == []
    assert any("keep moving" in r.message for r in caplog.records)
    recomputed = checkpoint(made, tokens(5).requires_grad_(), None, None, None, WRITE, use_reentrant=False)[0]
    recomputed.sum().backward()
    assert not made.graphs._graphs._pairs


def test_parameters_that_move_before_the_backward() -> None:
    made = titans()
    expected = gradients(made, tokens())
    graphed(made)
    h = tokens().requires_grad_()
    read, state, _ = made(h, None, None, None, WRITE)
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    total = read.square().sum() + sum(t.square().sum() for t in state.values() if t.requires_grad)
    total.backward()
    same([read, h.grad, *(p.grad for p in made.parameters() if p.grad is not None)], expected)


def test_a_parameter_changed_before_the_backward_is_an_error() -> None:
    made = titans()
    graphed(made)
    read = made(tokens().requires_grad_(), None, None, None, WRITE)[0]
    with torch.no_grad():
        made.key_projection.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_further_shapes_go_the_plain_way() -> None:
    made = titans()
    capture = graphed(made)
    for count in range(1, MOST_PAIRS + 3):
        made.graphs, graphs = MemoryGraphs(), made.graphs
        expected = gradients(made, tokens(count))
        made.graphs = graphs
        same(gradients(made, tokens(count)), expected)
    assert capture.recorded == 2 * MOST_PAIRS
    same(gradients(made, tokens(1)), gradients(titans(), tokens(1)))
    assert capture.recorded == 2 * MOST_PAIRS
    with torch.no_grad():
        for _ in range(2):
            made(tokens(), None, None, None, WRITE)
    assert capture.recorded == 2 * MOST_PAIRS + 1


def test_a_shorter_text_takes_a_longer_ones_buffers() -> None:
    made = titans()
    capture = graphed(made)
    for count in (11, 7, 13):
        expected = gradients(titans(), tokens(count))
        same(gradients(made, tokens(count)), expected)
    slots = [pair._given for pair in made.graphs._graphs._pairs.values()]
    assert slots[0]._arena is slots[1]._arena
    assert slots[2]._arena is not slots[0]._arena
    assert all(b.data_ptr() % 16 == 0 for s in slots for b in s.buffers)
    assert capture.recorded == 6


def test_a_capture_that_fails_is_said_once(caplog) -> None:
    made = titans()
    expected = gradients(made, tokens())
    graphed(made, fail=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            same(gradients(made, tokens()), expected)
    assert [r.message for r in caplog.records] == [
        "memories can't be captured as CUDA graphs, and run one kernel at a time: "
        "operation not permitted when stream is capturing"
    ]


def test_second_derivatives_are_refused() -> None:
    made, h = titans(), tokens().requires_grad_()
    graphed(made)
    read = made(h, None, None, None, WRITE)[0]
    with pytest.raises(ConfigError, match="use_memory_graphs"):
        torch.autograd.grad(read.sum(), h, create_graph=True)


@pytest.mark.parametrize("how", ["hook", "autocast"])
def test_what_a_replay_would_leave_out(how: str) -> None:
    made = titans().float()
    capture, seen = graphed(made), []
    context = contextlib.nullcontext()
    if how == "hook":
        made.key_projection.register_forward_hook(lambda *_: seen.append(1))
    else:
        context = torch.autocast("cpu", torch.bfloat16)
    with context:
        for _ in range(2):
            made(tokens().float().requires_grad_(), None, None, None, WRITE)
    assert capture.recorded == 0
    assert how == "autocast" or seen


def test_where_there_are_no_graphs() -> None:
    made, h = titans(), tokens()
    expected = gradients(made, h)
    made.graphs = MemoryGraphs("auto")
    same(gradients(made, h), expected)
    made.graphs = MemoryGraphs("on")
    with pytest.raises(ConfigError, match="runs on cpu"):
        made(h, None, None, None, WRITE)
    made(h, None)
    capture = graphed(made)
    made.key_projection.weight.ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO-3"):
        made(h, None, None, None, WRITE)
    made.graphs = MemoryGraphs("auto", lambda device: capture)
    same(gradients(made, h), expected)
    assert capture.recorded == 0
    with pytest.raises(ConfigError, match="expected one of auto, on, off"):
        MemoryGraphs("yes")  # type: ignore[arg-type]


def test_auto_leaves_memories_without_chunks_alone() -> None:
    made, capture = titans(chunk_size=None), EagerCapture()
    made.graphs = MemoryGraphs("auto", lambda device: capture)
    gradients(made, tokens())
    assert capture.recorded == 0


def test_copies_capture_their_own() -> None:
    made = titans()
    made.graphs = MemoryGraphs("auto")
    gradients(made, tokens())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.graphs.choice == "auto"
        assert other.graphs is not made.graphs
        assert not other.graphs._slots


@pytest.mark.parametrize("graph", [True, False], ids=["second order", "first order"])
def test_hooks_meet_the_gradients_that_they_meet_without_graphs(graph: bool) -> None:
    """Those of an engine that shares gradients out: none for a parameter without one, nor for what comes before."""
    made, met = titans(), []
    for name, parameter in made.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: met.append((name, p.grad is None)))
    before = torch.nn.Parameter(torch.zeros(2, 3, H, dtype=torch.float64))
    before.register_post_accumulate_grad_hook(lambda p: met.append(("before", p.grad is None)))

    def call() -> list[tuple[str, bool]]:
        met.clear()
        trace = LayerTrace(tokens(3).detach())
        made(tokens(3) + before, None, None, None, replace(WRITE, graph=graph), trace=trace)[0].sum().backward()
        state = {n: t.detach() for n, t in made(tokens(3), None, None, None, Pass())[1].items()}
        replayed = made(trace.hidden, state, None, None, WRITE, trace=trace.rewriting())[0]
        if replayed.requires_grad:
            replayed.sum().backward()
        made.zero_grad()
        before.grad = None
        return sorted(met)

    expected = call()
    graphed(made)
    assert call() == expected
    assert not any(missing for _, missing in expected)
