"""Memories of every rule that has a fast path, and what a test compares of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from titans_ds.memory import Pass
from titans_ds.memory.mlp import FeatureConfig, MLPConfig, MLPMemory, RuleConfig, kernels

H = 12
GATES = {"token_step_size": True, "token_momentum": True, "token_forget_gate": True, "forget_gate": 0.1}
MOMENTUM = {"optimizer": "momentum", **GATES}
CASES = {
    "titans": (MOMENTUM, {}),
    "by chunk": (MOMENTUM | {"gate_scope": "chunk", "reduction": "sum"}, {"step_size": 0.05}),
    "limited": (MOMENTUM | {"max_gradient_norm": 0.05}, {"hidden_dim": 6}),
    "limited by chunk": (MOMENTUM | {"max_gradient_norm": 0.05, "gate_scope": "chunk"}, {}),
    "limited, constant momentum": (
        {"optimizer": "momentum", "gate_scope": "chunk", "max_gradient_norm": 0.05},
        {"activation": "linear"},
    ),
    "limited, plain": ({"max_gradient_norm": 0.05}, {}),
    "plain": ({}, {}),
    "forgetting": ({"forget_gate": 0.2}, {"depth": 3}),
    "constant momentum": (
        {"optimizer": "momentum", "gate_scope": "chunk"},
        {"activation": "linear", "step_size": 0.01},
    ),
    "residual norm": ({"token_step_size": True}, {"residual_norm": True}),
    "linear memory": ({}, {"depth": 1}),
    "linear memory, residual norm": ({"token_step_size": True}, {"depth": 1, "residual_norm": True}),
    "linear memory, momentum": (MOMENTUM, {"depth": 1}),
    "linear memory, limited": (MOMENTUM | {"max_gradient_norm": 0.05}, {"depth": 1}),
    "linear memory, residual norm, limited": (
        {"max_gradient_norm": 0.05, "token_step_size": True},
        {"depth": 1, "residual_norm": True},
    ),
    "linear memory, residual norm, momentum by chunk": (
        MOMENTUM | {"gate_scope": "chunk"},
        {"depth": 1, "residual_norm": True},
    ),
    "hidden scale, shift": (MOMENTUM, {"hidden_scale": 1.5, "token_shift": True, "query_projection": "tied"}),
    "pooled": (MOMENTUM, {"write": "pooled"}),
}


def memory(rule: dict, settings: dict, chunk_size: int, heads: int, seed: int) -> MLPMemory:
    """In fp64, with gates and scales that are not the neutral ones that a memory starts with."""
    config = MLPConfig(
        **{"dim": 4 * heads, "heads": heads, "step_size": 0.3, "write": "token", "learn_step_size": True}
        | {f"{name}_projection": "learned" for name in ("key", "value", "output")}
        | {"learn_initial_weights": True, "features": FeatureConfig(activation="silu", normalize_keys=True)}
        | settings,
        rule=RuleConfig(chunk_size=chunk_size, **rule),
    )
    made = MLPMemory(H, config, 0).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def run(made: MLPMemory, h: torch.Tensor, mask: torch.Tensor | None, kernel: str, graph: bool) -> list[torch.Tensor]:
    """Two calls; reads, states and the gradients of everything learned."""
    h = h.clone().requires_grad_()
    with kernels.choice(kernel):
        plan = Pass(graph=graph)
        first, state, _ = made(h, None, mask, None, plan)
        second, state, _ = made(h * 0.7, state, None, None, plan)
        final = [state[name] for name in sorted(state) if name[0] in "ws"]
        loss = first.square().sum() + (second * torch.linspace(0, 1, H, dtype=h.dtype, device=h.device)).sum()
        if graph:
            loss = loss + sum(t.square().sum() for t in final)
        loss.backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    return [first, second, *final, h.grad, *gradients]


def first_and_long(number: int) -> list[Any]:
    """Seeds from 0 on: one is always tried, the others with the long tests, since Triton's interpreter is slow."""
    return [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, number))]
