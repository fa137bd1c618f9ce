"""Inner optimizers against torch.optim, and the recurrences of a long chunk against a loop over its tokens."""

from __future__ import annotations

import pytest
import torch

from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPConfig, MLPMemory, RuleConfig, gates
from titans_ds.memory.mlp.gates import GateValues, coefficients
from titans_ds.memory.mlp.network import Form, forward
from titans_ds.memory.mlp.optimizers import newton_schulz


def weights_after(memory: MLPMemory, h: torch.Tensor) -> list[torch.Tensor]:
    _, state, _ = memory(h, None, None, None, Pass())
    return [state[f"w{level}"][0] for level in range(memory.config.depth)]


def by_torch(memory: MLPMemory, h: torch.Tensor, optimizer: type, **options: float) -> list[torch.Tensor]:
    """The same inner problem as an ordinary training loop."""
    weights = [getattr(memory, f"initial_w{i}").clone().requires_grad_() for i in range(memory.config.depth)]
    inner = optimizer(weights, lr=memory.config.step_size, **options)
    keys, values = memory.key_projection(h), memory.value_projection(h)
    for _ in range(memory.config.inner_steps):
        inner.zero_grad()
        y = forward(tuple(w.unsqueeze(0) for w in weights), keys, Form())
        (0.5 * (y - values).square().sum(dim=-1).mean()).backward()
        inner.step()
    return [w.detach() for w in weights]


CASES = [
    ({"optimizer": "sgd"}, torch.optim.SGD, {}),
    ({"optimizer": "momentum", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    ({"optimizer": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}),
]


@pytest.mark.parametrize(("rule", "optimizer", "options"), CASES, ids=lambda v: str(v))
def test_inner_steps_equal_an_ordinary_training_loop(rule, optimizer, options) -> None:
    config = MLPConfig(dim=8, write="token", inner_steps=6, step_size=0.05, rule=RuleConfig(gate_scope="chunk", **rule))
    memory = MLPMemory(12, config, 0).double()
    h = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(weights_after(memory, h), by_torch(memory, h, optimizer, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (16, 5), (5, 16)])
def test_newton_schulz_brings_singular_values_to_about_one(shape) -> None:
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    singular = torch.linalg.svdvals(newton_schulz(matrix, 8))
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    before = torch.linalg.svdvals(matrix)
    assert (singular.amax(-1) / singular.amin(-1) < 0.8 * before.amax(-1) / before.amin(-1)).all()
    assert torch.isfinite(newton_schulz(torch.zeros(1, *shape), 5)).all()


def test_cosine_schedule_starts_at_theta_and_ends_near_zero() -> None:
    """One step of a schedule is theta; of K steps the sum of the factors is (K + 1) / 2 (of tiny steps)."""
    settings = {"dim": 8, "depth": 1, "write": "token", "initial_scale": 0.0, "step_size": 1e-7}
    h = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    written = {}
    for schedule in ("constant", "cosine"):
        for steps in (1, 4):
            rule = RuleConfig(schedule=schedule)
            memory = MLPMemory(12, MLPConfig(**settings, inner_steps=steps, rule=rule), 0).double()
            written[schedule, steps] = weights_after(memory, h)[0]
    torch.testing.assert_close(written["cosine", 1], written["constant", 1])
    torch.testing.assert_close(written["cosine", 4], written["constant", 1] * 2.5, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("block", [1, 3, 7, 64])
def test_a_long_chunk_goes_through_the_recurrence_block_by_block(block, monkeypatch) -> None:
    monkeypatch.setattr(gates, "_BLOCK", block)
    generator = torch.Generator().manual_seed(2)
    rule = RuleConfig(optimizer="momentum", forget_gate=0.1, token_momentum=True, token_forget_gate=True)
    eta, alpha = (torch.randn(1, 1, 20, dtype=torch.float64, generator=generator) for _ in range(2))
    active = torch.rand(1, 1, 20, generator=generator) > 0.3
    c = coefficients(GateValues(active, momentum=eta, forget_gate=alpha), rule, active.double()).chunk(0)
    gradients = torch.randn(20, dtype=torch.float64, generator=generator)
    w = s = torch.tensor(0.7, dtype=torch.float64)
    for t in range(20):
        if active[0, 0, t]:
            s = eta[0, 0, t].sigmoid() * s - gradients[t] / active.sum()
            w = (1 - alpha[0, 0, t].sigmoid()) * w + s
    torch.testing.assert_close(c.momentum_keep[0] * 0.7 - (c.to_momentum[0] * gradients).sum(), s)
    torch.testing.assert_close(c.keep[0] * 0.7 + c.carry[0] * 0.7 - (c.to_weights[0] * gradients).sum(), w)


def test_a_limit_bounds_the_step_and_leaves_small_gradients_alone() -> None:
    h = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = {}
    for limit in (None, 0.01, 1e6):
        config = MLPConfig(dim=8, write="token", step_size=0.5, rule=RuleConfig(max_gradient_norm=limit))
        _, _, stats = MLPMemory(12, config, 0).double()(h, None, None, None, Pass(stats=True))
        norms[limit] = stats["write_norm"]
    torch.testing.assert_close(norms[0.01], torch.full_like(norms[0.01], 0.5 * 0.01))
    torch.testing.assert_close(norms[1e6], norms[None])
