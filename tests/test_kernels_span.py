"""`span` without the loop over chunks: the same reads, states and gradients as chunk after chunk, for every rule."""

from __future__ import annotations

import random

import pytest
import torch

from titans_ds.config import FeatureConfig, MemoryConfig, RuleConfig
from titans_ds.memory import Access, NeuralMemory, kernels
from titans_ds.memory.kernels import span

H = 12
GATES = {"token_step_size": True, "token_momentum": True, "token_forget_gate": True, "forget_gate": 0.1}
MOMENTUM = {"optimizer": "momentum", **GATES}
CASES = {
    "titans": (MOMENTUM, {}),
    "by chunk": (MOMENTUM | {"gate_scope": "chunk", "reduction": "sum"}, {"step_size": 0.05}),
    "limited": (MOMENTUM | {"max_gradient_norm": 0.05}, {"hidden_dim": 6}),
    "limited by chunk": (MOMENTUM | {"max_gradient_norm": 0.05, "gate_scope": "chunk"}, {}),
    "plain": ({}, {}),
    "forgetting": ({"forget_gate": 0.2}, {"depth": 3}),
    "constant momentum": ({"optimizer": "momentum", "gate_scope": "chunk"}, {"activation": "linear"}),
    "huber, residual norm": ({"loss": "huber", "huber_delta": 0.2, "token_step_size": True}, {"residual_norm": True}),
    "linear memory": ({"loss": "dot"}, {"depth": 1}),
    "hidden scale, shift": (MOMENTUM, {"hidden_scale": 1.5, "token_shift": True, "query_projection": "tied"}),
    "pooled": (MOMENTUM, {"write": "pooled"}),
}


def memory(rule: dict, settings: dict, chunk_size: int, heads: int, seed: int) -> NeuralMemory:
    config = MemoryConfig(
        **{"dim": 4 * heads, "heads": heads, "step_size": 0.3, "write": "token", "learn_step_size": True}
        | {f"{name}_projection": "learned" for name in ("key", "value", "output")}
        | {"learn_initial_weights": True, "features": FeatureConfig(activation="silu", normalize_keys=True)}
        | settings,
        rule=RuleConfig(chunk_size=chunk_size, chunk_semantics="span", **rule),
    )
    made = NeuralMemory(H, config, 0).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def run(made: NeuralMemory, h: torch.Tensor, mask: torch.Tensor | None, kernel: str, graph: bool) -> list[torch.Tensor]:
    """Two calls; reads, states and the gradients of everything learned."""
    h = h.clone().requires_grad_()
    with kernels.choice(kernel):
        access = Access(write=True, graph=graph)
        first, state, _ = made(h, None, mask, None, access)
        second, state, _ = made(h * 0.7, state, None, None, access)
        final = [state[name] for name in sorted(state) if name[0] in "ws"]
        loss = first.square().sum() + (second * torch.linspace(0, 1, H, dtype=h.dtype)).sum()
        if graph:
            loss = loss + sum(t.square().sum() for t in final)
        loss.backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    return [first, second, *final, h.grad, *gradients]


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_chunk_after_chunk(case, graph, monkeypatch) -> None:
    rng, (rule, settings) = random.Random(case), CASES[case]
    for seed in range(3):
        chunk_size, heads, tokens, batch = rng.choice([1, 3, 4]), rng.choice([1, 2]), rng.randint(1, 23), 3
        made = memory(rule, settings, chunk_size, heads, seed)
        monkeypatch.setattr(span, "_MOST_CHUNKS", rng.choice([1, 2, 64]))
        h = torch.randn(batch, tokens, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
        mask[0] = False  # a sample that writes nothing
        got = run(made, h, None if seed == 0 else mask, "torch", graph)
        expected = run(made, h, None if seed == 0 else mask, "loop", graph)
        assert len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


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
