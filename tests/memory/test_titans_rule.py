"""Every write rule against its plain specification in titans_ds.memory.mlp.naive: one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from titans_ds.memory import Pass
from titans_ds.memory.mlp import FeatureConfig, MLPConfig, MLPMemory, RuleConfig, naive

H, D = 10, 8
WRITE, GRAPH = Pass(), Pass(graph=True)
FEATURES = FeatureConfig(pre_norm=True, convolution=True, activation="silu", normalize_keys=True, read_norm=True)
GATES = {"token_step_size": True, "token_momentum": True, "token_forget_gate": True, "forget_gate": 0.1}
TITANS = {"optimizer": "momentum", "chunk_size": 4, **GATES}


def settings(rule: dict | None = None, **memory: object) -> dict:
    return {"dim": D, "write": "token", "step_size": 0.3, "rule": RuleConfig(**(rule or {})), **memory}


RULES = {
    "titans": settings(TITANS, features=FEATURES),
    "titans, heads": settings(TITANS | {"max_gradient_norm": 0.3}, features=FEATURES, heads=2, hidden_dim=6),
    "titans, gates by chunk": settings(TITANS | {"gate_scope": "chunk"}),
    "titans, every token": settings(TITANS | {"chunk_size": 1, "reduction": "sum"}, step_size=0.05, token_shift=True),
    "shift, every token, gates by chunk": settings(
        TITANS | {"chunk_size": 1, "gate_scope": "chunk"}, step_size=0.05, token_shift=True
    ),
    "adamw, shift, a call a chunk": settings(
        {"optimizer": "adamw", "forget_gate": 0.1, "gate_scope": "chunk"}, token_shift=True, inner_steps=2
    ),
    "titans, a call a chunk": settings(TITANS | {"chunk_size": None}),
    "titans, shift and convolution": settings(TITANS | {"chunk_size": 3}, token_shift=True, features=FEATURES),
    "constant momentum": settings(
        {"optimizer": "momentum", "momentum": 0.8, "chunk_size": 3, "reduction": "sum"}, step_size=0.02
    ),
    "constant forget gate": settings({"forget_gate": 0.2, "chunk_size": 3}, depth=1),
    "forget gate by chunk": settings({"forget_gate": 0.2, "chunk_size": 3, "gate_scope": "chunk"}, inner_steps=2),
    "momentum, steps": settings({"optimizer": "momentum", "chunk_size": 4, "gate_scope": "chunk"}, inner_steps=3),
    "adamw": settings(
        {"optimizer": "adamw", "chunk_size": 4, "schedule": "cosine", "token_step_size": True}, inner_steps=3
    ),
    "adamw, forgetting": settings({"optimizer": "adamw", "chunk_size": 4, "forget_gate": 0.1, "gate_scope": "chunk"}),
    "muon": settings(
        {"optimizer": "muon", "chunk_size": 4, **GATES, "gate_scope": "chunk"}, inner_steps=2, hidden_dim=5
    ),
    "muon, limited, heads": settings({"optimizer": "muon", "chunk_size": 4, "max_gradient_norm": 0.1}, heads=2),
    "ttt-linear": settings({"chunk_size": 3, "token_step_size": True}, depth=1, residual_norm=True, heads=2),
    "residual norm": settings({"chunk_size": 3}, residual_norm=True),
    "limited, sum": settings({"chunk_size": 3, "reduction": "sum", "max_gradient_norm": 0.5}),
    "queries not convolved": settings(TITANS, features=replace(FEATURES, convolve_queries=False)),
    "pooled chunks": settings(TITANS, features=FEATURES, **{"write": "pooled"}),
    "recall recipe": settings(
        {"chunk_size": 4, "step_sizes": [0.4, 0.1]},
        hidden_dim=16,
        initial_stds=[1.0, 0.02],
        hidden_scale="unit",
        query_projection="tied",
        token_shift=True,
    ),
    "three layers, schedule": settings({"chunk_size": 3, "schedule": "cosine"}, depth=3, inner_steps=3, hidden_dim=5),
}
LEARNED = {
    "key_projection": "learned",
    "value_projection": "learned",
    "output_projection": "learned",
    "learn_step_size": True,
    "learn_initial_weights": True,
}


def make(name: str, dtype: torch.dtype = torch.float64, learned: bool = False) -> MLPMemory:
    """A memory whose gates, convolutions and scales are not the neutral ones that it starts with."""
    memory = MLPMemory(H, MLPConfig(**RULES[name] | (LEARNED if learned else {})), layer_index=2).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return memory


def tensors(memory: MLPMemory) -> dict[str, torch.Tensor]:
    return {**dict(memory.named_parameters()), **dict(memory.named_buffers())}


def hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASKS = torch.tensor(
    [
        [[1] * 7, [1] * 7, [1] * 7],
        [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 1]],
        [[0, 0, 1, 1, 1, 1, 1], [0] * 7, [1, 1, 1, 1, 1, 1, 0]],
    ]
).bool()  # samples x calls x tokens: all, padding on the right and left, holes, nothing


@pytest.mark.parametrize("name", RULES)
def test_reads_and_weights_equal_the_reference(name) -> None:
    """Three calls, three samples of different lengths in one batch, padding on every side."""
    memory, h = make(name), hidden(3, 3, 7)
    state, reads = None, []
    for call in range(3):
        read, state, _ = memory(h[:, call], state, MASKS[:, call], None, WRITE)
        reads.append(read)
    for sample in range(3):
        lengths = MASKS[sample].sum(dim=1).tolist()
        expected, heads = naive.run(tensors(memory), h[sample][MASKS[sample]], memory.config, lengths)
        torch.testing.assert_close(torch.stack(reads, 1)[sample][MASKS[sample]], expected, rtol=1e-10, atol=1e-11)
        for head, level in ((h, i) for h in range(memory.config.heads) for i in range(memory.config.depth)):
            weight = state[f"w{level}"][sample]
            weight = weight if memory.config.heads == 1 else weight[head]
            error = (weight - heads[head].weights[level]).norm() / heads[head].weights[level].norm()
            assert error < 1e-10, (sample, head, level)
            assert not torch.equal(weight, memory.initial_state(1, h[:1, 0])[f"w{level}"][0])


@pytest.mark.parametrize("name", [n for n, s in RULES.items() if s["rule"].chunk_size is not None])
def test_an_unfinished_chunk_is_written_when_it_is_closed(name) -> None:
    """Samples with no, one and several tokens pending; nothing is pending then, and the text goes on."""
    memory, h = make(name), hidden(3, 3, 7).flatten(1, 2)
    mask, size = MASKS.flatten(1), memory.config.rule.chunk_size
    _, state, _ = memory(h, None, mask, None, WRITE)
    before = {n: t.clone() for n, t in state.items()}
    closed = memory.close(state)
    assert all(torch.equal(state[n], t) for n, t in before.items())
    assert not any(closed[n].any() for n in closed if n.startswith("pending"))
    for sample in range(3):
        text = h[sample][mask[sample]]
        _, heads = naive.run(tensors(memory), text, memory.config, [len(text)])
        naive.close(tensors(memory), heads, memory.config)
        for head, level in ((h, i) for h in range(memory.config.heads) for i in range(memory.config.depth)):
            weight = closed[f"w{level}"][sample]
            weight = weight if memory.config.heads == 1 else weight[head]
            torch.testing.assert_close(weight, heads[head].weights[level], rtol=1e-10, atol=1e-11)
        unchanged = torch.equal(closed["w0"][sample], state["w0"][sample])
        assert unchanged == (len(text) % size == 0)
    again = memory.close(closed)
    assert all(torch.equal(again[n], t) for n, t in closed.items())
    _, on, _ = memory(hidden(3, size, seed=4), closed, None, None, WRITE)
    assert all(not torch.equal(on["w0"][row], closed["w0"][row]) for row in range(3))


@pytest.mark.parametrize("name", RULES)
def test_second_order_gradients_equal_torch_func(name) -> None:
    """Of everything learned, through the writes of two calls, one of them padded."""
    memory, h = make(name, learned=True), hidden(1, 2, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).bool()
    target = hidden(12, seed=3)
    first, state, _ = memory(h[:, 0], None, mask, None, GRAPH)
    second, state, _ = memory(h[:, 1], state, None, None, GRAPH)
    real = torch.cat([first[0, :5], second[0]])
    (real * target).sum().add(sum(state[f"w{i}"].square().sum() for i in range(memory.config.depth))).backward()

    def outer(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        text = torch.cat([h[0, 0, :5], h[0, 1]])
        reads, heads = naive.run({**tensors(memory), **parameters}, text, memory.config, [5, 7])
        return (reads * target).sum() + sum(w.square().sum() for head in heads for w in head.weights)

    expected = torch.func.grad(outer)({n: p.detach() for n, p in memory.named_parameters()})
    for parameter_name, parameter in memory.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert expected[parameter_name].norm() > 0, parameter_name
        error = (parameter.grad - expected[parameter_name]).norm() / expected[parameter_name].norm()
        assert error < 1e-9, (parameter_name, error)
