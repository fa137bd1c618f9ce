"""Against titans-pytorch at matching settings: the same inner gradients, the same weights stored, the same reads.

Its `batch_size` is the chunk size, so that it takes a chunk's gradients at the weights of its start, as here.
What differs by design is documented in docs/memories.md and pinned down here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from titans_ds.memory import Pass
from titans_ds.memory.mlp import FeatureConfig, MLPConfig, MLPMemory, RuleConfig, network

titans_pytorch = pytest.importorskip(
    "titans_pytorch", reason="titans-pytorch is not installed; it comes with the extra `dev`"
)
D, CHUNK, TOKENS = 8, 4, 16


class SiluMlp(nn.Module):
    """f_W as ours: titans-pytorch's own has a GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w0 = nn.Parameter(torch.randn(2 * dim, dim) / dim**0.5)
        self.w1 = nn.Parameter(torch.randn(dim, 2 * dim) / (2 * dim) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ self.w0.mT) @ self.w1.mT


def theirs(heads: int = 1, **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "chunk_size": CHUNK,
        "batch_size": CHUNK,
        "heads": heads,
        "dim_head": D // heads,
        "pre_rmsnorm": False,
        "activation": nn.SiLU(),
    }
    model = SiluMlp(D // heads)
    memory = titans_pytorch.NeuralMemory(D, model=model, mem_model_norm_add_residual=False, **settings, **options)
    with torch.no_grad():
        for p in memory.parameters():
            p.data = p.data + 0.2 * torch.randn(p.shape)
    return memory.double()


def ours(peer: nn.Module, heads: int = 1, momentum: bool = True) -> MLPMemory:
    """Its loss is a mean over coordinates, ours half their sum: theta = 1 / D, and theta_t = 2 theta sigmoid()."""
    settings = RuleConfig(
        chunk_size=CHUNK,
        optimizer="momentum" if momentum else "sgd",
        reduction="sum",
        gate_scope="chunk",
        forget_gate=0.5,
        token_step_size=True,
        token_momentum=momentum,
        token_forget_gate=True,
    )
    config = MLPConfig(
        dim=D,
        heads=heads,
        hidden_dim=2 * D // heads,
        write="token",
        step_size=heads / D,
        key_projection="learned",
        value_projection="learned",
        output_projection="learned",
        learn_initial_weights=True,
        features=FeatureConfig(activation="silu"),
        rule=settings,
    )
    memory = MLPMemory(D, config, 0).double()
    gates = [peer.to_adaptive_step[0], *([peer.to_momentum[0]] if momentum else []), peer.to_decay_factor[0]]
    weights = {f"initial_w{i}": p if heads > 1 else p[0] for i, p in enumerate(peer.memory_model_parameters)}
    copies = weights | {
        "key_projection.weight": peer.to_keys[0].weight,
        "value_projection.weight": peer.to_values[0].weight,
        "query_projection.weight": peer.to_queries[0].weight,
        "output_projection.weight": torch.eye(D, dtype=torch.float64),
        "gates.weight": torch.cat([gate.weight for gate in gates]),
        "gates.bias": torch.cat([gate.bias for gate in gates]),
    }
    memory.load_state_dict({n: t.detach().clone() for n, t in copies.items()})
    return memory


def text(batch: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_inner_gradients() -> None:
    peer, generator = theirs(), torch.Generator().manual_seed(3)
    keys, values = (torch.randn(3, 5, D, generator=generator, dtype=torch.float64) for _ in range(2))
    rates = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    weights = {
        n: p[0].detach().expand(3, -1, -1) for n, p in zip(("w0", "w1"), peer.memory_model_parameters, strict=True)
    }
    expected, _ = peer.per_sample_grad_fn(weights, keys, rates, values)
    _, gradients = network.loss_and_gradient(tuple(weights.values()), keys, values, rates * 2 / D, network.Form())
    for gradient, name in zip(gradients, ("w0", "w1"), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("momentum", [True, False])
def test_weights_and_momentum_stored(heads, momentum) -> None:
    peer = theirs(heads, momentum=momentum)
    memory, x = ours(peer, heads, momentum), text()
    _, expected = peer(x)
    last_update, last_momentum = expected.states
    _, state, _ = memory(x, None, None, None, Pass())
    for name, level in (("w0", 0), ("w1", 1)):
        stored = state[f"w{level}"] if heads == 1 else state[f"w{level}"].flatten(0, 1)
        torch.testing.assert_close(stored, last_update[name], rtol=1e-9, atol=1e-11)
        assert not torch.allclose(stored, memory.initial_state(2, x)[f"w{level}"].reshape(stored.shape))
        if momentum:
            surprise = state[f"s{level}"] if heads == 1 else state[f"s{level}"].flatten(0, 1)
            torch.testing.assert_close(surprise, last_momentum[name][0], rtol=1e-9, atol=1e-11)


def test_reads_and_the_lag_of_a_chunk() -> None:
    """There the last token of a chunk reads what its own chunk wrote; here every token of a chunk reads the same."""
    peer = theirs()
    memory, x = ours(peer), text()
    expected, _ = peer(x)
    read, _, _ = memory(x, None, None, None, Pass())
    last = torch.arange(TOKENS) % CHUNK == CHUNK - 1
    torch.testing.assert_close(read[:, ~last], expected[:, ~last], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(read[:, last], expected[:, last])
    for end in (CHUNK, 2 * CHUNK):
        _, state, _ = memory(x[:, :end], None, None, None, Pass())
        torch.testing.assert_close(memory(x, state)[0][:, end - 1], expected[:, end - 1], rtol=1e-9, atol=1e-11)


def test_gradients_of_what_is_learned() -> None:
    peer = theirs()
    memory, x = ours(peer), text(1)
    keep = torch.arange(TOKENS) % CHUNK != CHUNK - 1
    peer(x)[0][:, keep].square().sum().backward()
    memory(x, None, None, None, Pass(graph=True))[0][:, keep].square().sum().backward()
    pairs = {
        "key_projection.weight": peer.to_keys[0].weight,
        "value_projection.weight": peer.to_values[0].weight,
        "query_projection.weight": peer.to_queries[0].weight,
    }
    for name, theirs_ in pairs.items():
        torch.testing.assert_close(memory.get_parameter(name).grad, theirs_.grad, rtol=1e-8, atol=1e-10)
    peers = torch.cat(
        [peer.to_adaptive_step[0].bias.grad, peer.to_momentum[0].bias.grad, peer.to_decay_factor[0].bias.grad]
    )
    torch.testing.assert_close(memory.gates.bias.grad, peers, rtol=1e-8, atol=1e-10)
