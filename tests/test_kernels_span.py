"""`span` without the loop over chunks: the same reads, states and gradients as chunk after chunk, for every rule."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernel_memories import CASES, MOMENTUM, H, memory, run
from titans_ds.memory import Access, kernels
from titans_ds.memory.kernels import span


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_chunk_after_chunk(case, graph, monkeypatch) -> None:
    rng, (rule, settings) = random.Random(case), CASES[case]
    for seed in range(3):
        chunk_size, heads, tokens, batch = rng.choice([1, 3, 4]), rng.choice([1, 2]), rng.randint(1, 23), 3
        made = memory(rule, settings, chunk_size, heads, seed)
        monkeypatch.setattr(span, "_BLOCK_BYTES", 1)
        monkeypatch.setattr(span, "_LEAST_CHUNKS", rng.choice([1, 2, 64]))
        h = torch.randn(batch, tokens, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
        mask[0] = False  # a sample that writes nothing
        got = run(made, h, None if seed == 0 else mask, "torch", graph)
        expected = run(made, h, None if seed == 0 else mask, "loop", graph)
        assert len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_derivatives_may_go_where_inputs_lay(case, graph, monkeypatch) -> None:
    """In a graph's only backward pass: the same gradients, block by block, and less memory."""
    rule, settings = CASES[case]
    monkeypatch.setattr(span, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(span, "_LEAST_CHUNKS", 2)
    made, places = memory(rule, settings, 3, 2, 0), []
    monkeypatch.setattr(span, "_place", lambda given, name, of=span._place: _noted(of(given, name), given, places))
    h = torch.randn(2, 21, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = run(made, h, None, "torch", graph)
    assert places
    assert not any(places)
    places.clear()
    got = run(made, h, None, "torch", graph, only=True)
    assert all(places)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def _noted(found: torch.Tensor, given: dict[str, torch.Tensor], places: list[bool]) -> torch.Tensor:
    places.append(any(found is t for t in given.values()))
    return found


def test_the_loop_is_left_out(monkeypatch) -> None:
    """What is compared above really is another path."""
    made = memory(MOMENTUM, {}, 4, 1, 0)
    monkeypatch.setattr("titans_ds.memory.chunks.write_chunk", None)
    h = torch.randn(1, 9, H, dtype=torch.float64)
    made(h, None, None, None, Access(write=True))
    with kernels.choice("loop"), pytest.raises(TypeError):
        made(h, None, None, None, Access(write=True))


@pytest.mark.parametrize("graph", [True, False])
def test_bf16_is_as_near_to_fp64_as_the_loop(graph) -> None:
    made = memory(MOMENTUM | {"gate_scope": "chunk"}, {}, 8, 2, 0)
    h = torch.randn(2, 100, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = run(made, h.double(), None, "loop", graph)
    near, loop = (run(made.float(), h, None, kernel, graph) for kernel in ("torch", "loop"))
    assert near[2].dtype == torch.float32
    for index, (got, plain, right) in enumerate(zip(near, loop, exact, strict=True)):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (got, plain))
        assert error < 2.5 * allowed + 2e-3, (index, error, allowed)


def test_long_input_stays_finite() -> None:
    made = memory(MOMENTUM, {}, 64, 1, 0).float()
    h = torch.randn(1, 65_536, H, generator=torch.Generator().manual_seed(2)).requires_grad_()
    read, state, _ = made(h, None, None, None, Access(write=True, graph=True))
    (read.square().mean() + state["w0"].square().mean()).backward()
    assert all(torch.isfinite(t).all() for t in (read, state["w0"], state["s1"], h.grad))
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
