"""A batch replayed in slices of rows is the batch: values, states, gradients, and one pair of graphs for many sizes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.support.eager_capture import EagerCapture, graphed
from tests.support.kernel_memories import CASES, H, memory, run
from titans_ds.cuda_graphs.replay import Graphs, Result, Slices, Tensors
from titans_ds.memory import LayerTrace, Pass
from titans_ds.memory import graphs as memory_graphs
from titans_ds.memory.mlp import MLPMemory

WRITE = Pass(graph=True)
T = 11


@pytest.fixture(autouse=True)
def two_rows_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_graphs, "SLICE_TOKENS", 2 * T + 1)


def tokens(rows: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, T, H, generator=generator, dtype=torch.float64)


def mask(rows: int) -> torch.Tensor:
    return torch.rand(rows, T, generator=torch.Generator().manual_seed(0)) < 0.7


def titans(chunk_size: int | None = None) -> MLPMemory:
    """Without chunks: where chunk follows chunk, a batch goes whole."""
    return memory(*CASES["titans"], chunk_size, 2, 5)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def gradients(made: MLPMemory) -> list[torch.Tensor]:
    found = [p.grad for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    return found


@pytest.mark.parametrize("graph", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("name", CASES)
def test_every_rule_is_the_same(name: str, graph: bool) -> None:
    """Two calls, the second from the first's state, before either goes back."""
    made = memory(*CASES[name], None, 2, 5)
    expected = run(made, tokens(4), mask(4), "auto", graph)
    capture = graphed(made)
    same(run(made, tokens(4), mask(4), "auto", graph), expected)
    assert (capture.recorded, capture.replays) == (4, 8)  # two calls, there and back, in two slices


def test_a_whole_segment_resets_and_statistics() -> None:
    made, reset = titans(), torch.tensor([True, False, False, True])

    def call() -> list[torch.Tensor]:
        h = tokens(4).requires_grad_()
        _, state, _ = made(h, None, mask(4), None, WRITE)
        read, state, stats = made(h, state, mask(4), reset, replace(WRITE, stats=True))
        (read.square().sum() + state["w0"].square().sum()).backward()
        return [read, *state.values(), *stats.values(), h.grad, *gradients(made)]

    expected = call()
    capture = graphed(made)
    same(call(), expected)
    assert capture.replays == 8


@pytest.mark.parametrize("queries", ["of tokens", "one set", "by sample"])
def test_two_phases(queries: str) -> None:
    """The second phase answers with a sum over all samples, whose value nobody needs: only its way back is replayed.

    Memory tokens ask the same in every slice.
    """
    made, generator = titans(), torch.Generator().manual_seed(7)
    shape = {"of tokens": None, "one set": (4, 8), "by sample": (4, 4, 8)}[queries]
    asked = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64)

    def call() -> list[torch.Tensor]:
        h = tokens(4).requires_grad_()
        given = None if asked is None else asked.clone().requires_grad_()
        trace = LayerTrace(h.detach() * 1.5)
        read = made(h * 1.5, None, mask(4), None, WRITE, given, trace)[0]
        read.square().sum().backward()
        first = gradients(made)
        answer, state, _ = made(trace.hidden, None, mask(4), None, WRITE, given, trace.rewriting())
        (answer.sum() * 0.3 + state["w0"].square().sum()).backward()
        found = [read, trace.queries, trace.read_gradient, *state.values(), h.grad]
        return [*found, *first, *gradients(made), *([] if given is None else [given.grad])]

    expected = call()
    capture = graphed(made)
    same(call(), expected)
    assert (capture.recorded, capture.replays) == (4, 6)


def test_batches_share_a_pair() -> None:
    made = titans()
    plain, capture = copy.deepcopy(made), graphed(made)
    for rows, recorded, replays in ((2, 2, 2), (4, 2, 4), (6, 2, 6), (3, 4, 6)):
        capture.replays = 0
        for each in (plain, made):
            read, state, _ = each(tokens(rows), None, mask(rows), None, WRITE)
            (read.square().sum() + state["w0"].square().sum()).backward()
        same(gradients(made), gradients(plain))
        assert (capture.recorded, capture.replays) == (recorded, replays)


def test_a_chunked_memory_goes_whole() -> None:
    """It takes as long for half the samples."""
    made = titans(chunk_size=4)
    capture = graphed(made)
    made(tokens(4), None, None, None, WRITE)[0].square().sum().backward()
    assert (capture.recorded, capture.replays) == (2, 2)


def test_without_gradients() -> None:
    made = titans()
    expected = made(tokens(4), None, mask(4), None, Pass())
    capture = graphed(made)
    with torch.no_grad():
        for rows in (2, 4):  # slices of the second batch are shapes that were met
            found = made(tokens(4)[:rows], None, mask(4)[:rows], None, Pass())
    same([found[0], *found[1].values()], [expected[0], *expected[1].values()])
    assert (capture.recorded, capture.replays) == (1, 2)


def test_parameters_that_move_before_the_backward() -> None:
    """No graph, no slices, and nothing for an output that nobody asked about."""
    made = titans()
    found = []
    for graphs in (False, True):
        if graphs:
            graphed(made)
        h = tokens(4).requires_grad_()
        read, state, _ = made(h, None, None, None, WRITE)
        for parameter in made.parameters():
            parameter.data = parameter.data.clone()
        (read.square().sum() + state["w0"].square().sum()).backward()
        found.append([read, h.grad, *gradients(made)])
    same(found[1], found[0])


def test_sums_over_slices_in_bf16() -> None:
    """Gradients of parameters add up in their own dtype: as near to fp64 as the whole call's."""
    exact = titans()
    made = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(made.state_dict())
    h, errors = tokens(16).bfloat16(), []

    def found(memory: MLPMemory, dtype: torch.dtype) -> torch.Tensor:
        _, state, _ = memory(h.to(dtype), None, None, None, WRITE)
        memory(h.to(dtype), state, None, None, WRITE)[0].square().mean().backward()
        return torch.cat([g.double().flatten() for g in gradients(memory)])

    expected = found(exact, torch.float64)
    for capture in (None, graphed):
        if capture is not None:
            assert graphed(made).replays == 0
        errors.append(float((found(made, torch.bfloat16) - expected).norm() / expected.norm()))
    assert errors[1] < 1.2 * errors[0] < 0.05


def test_results_may_lie_where_inputs_lay() -> None:
    """Outputs and gradients that are inputs, and output gradients, themselves."""
    x, y = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def swap(given: Tensors, held: Tensors) -> Result:
        total = (given["x"].sum() * held["factor"]).view(1)
        return Result({"y": given["y"], "x": given["x"], "total": total}, totals=frozenset({"total"}))

    for slices in (Slices(), Slices(2), Slices(4)):
        graphs, capture = Graphs(), EagerCapture()
        found = graphs.call(capture, "swap", swap, {"x": x, "y": y}, {"factor": factor}, None, slices)
        assert found is not None
        same([found["x"], found["y"], found["total"]], [x, y, (2 * x.sum()).view(1)])
        loss = (found["x"] * y.detach()).sum() + (found["y"] * x.detach()).sum() + 3 * found["total"].sum()
        got = torch.autograd.grad(loss, [x, y, factor])
        torch.testing.assert_close(list(got), [y + 6, x, 3 * x.sum()])
        assert capture.replays == 2 * slices.count
