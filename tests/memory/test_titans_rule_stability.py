"""Fast weights of a long stream stay finite and bounded: 65,536 tokens against 4,096, products in bf16."""

from __future__ import annotations

import argparse
import dataclasses
import inspect

import pytest
import torch

from titans_ds import preset
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPConfig, MLPMemory

H, D, SEGMENT, SHORT, LONG = 32, 16, 2048, 4096, 65536


def random_tokens(number: int) -> torch.Tensor:
    return torch.randn(1, SEGMENT, H, generator=torch.Generator().manual_seed(number))


def code_tokens(number: int) -> torch.Tensor:
    """Bytes of Python source as random vectors: a few of them again and again, as in no random stream."""
    source = "".join(inspect.getsource(module) for module in (argparse, dataclasses, inspect)).encode()
    start = number * SEGMENT % (len(source) - SEGMENT)
    table = torch.randn(256, H, generator=torch.Generator().manual_seed(0))
    return table[torch.tensor(list(source[start : start + SEGMENT]))].unsqueeze(0)


CONFIGS = {
    "titans": preset("titans", dim=D),
    "titans, heads": preset("titans", dim=D, heads=2),
    "titans, muon": preset(
        "titans",
        dim=D,
        step_size=0.02,
        rule=dataclasses.replace(
            preset("titans").rule, optimizer="muon", gate_scope="chunk", forget_gate=0.05, max_gradient_norm=None
        ),
    ),
    "ttt_linear": preset("ttt_linear", dim=D),
    "paper": preset("paper", dim=D),
    "paper, tokens": MLPConfig(dim=D, write="token"),
}


@pytest.mark.long
@pytest.mark.parametrize("tokens", [random_tokens, code_tokens])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_stay_bounded_over_a_long_stream(name, tokens) -> None:
    memory = MLPMemory(H, CONFIGS[name], 0).bfloat16()
    state, norms, moved = None, {}, {}
    with torch.no_grad():
        for number in range(LONG // SEGMENT):
            read, state, stats = memory(tokens(number).bfloat16(), state, None, None, Pass(stats=True))
            assert all(torch.isfinite(t).all() for t in (read, *state.values()))
            weights = torch.cat([state[f"w{level}"].flatten() for level in range(memory.config.depth)])
            norms[(number + 1) * SEGMENT], moved[number] = weights.norm(), stats["write_norm"]
    assert norms[LONG] <= 2 * norms[SHORT], norms
    assert min(moved.values()) > 0
