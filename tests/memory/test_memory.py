"""One layer's memory against its specification in titans_ds.memory.mlp.naive."""

from __future__ import annotations

import itertools

import pytest
import torch

from titans_ds.errors import ConfigError, StateError
from titans_ds.memory import Controls, MemoryState, Pass
from titans_ds.memory.mlp import MLPConfig, MLPMemory, naive, network

H, D = 12, 8
WRITE = Pass()


def make(dtype: torch.dtype = torch.float64, **settings: object) -> MLPMemory:
    return MLPMemory(H, MLPConfig(dim=D, **settings), layer_index=3).to(dtype)  # type: ignore[arg-type]


def hidden(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, tokens, H, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state_of(memory: MLPMemory, batch: int, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Some state that is not the initial one."""
    state = memory.initial_state(batch, hidden(batch, 1))
    generator = torch.Generator().manual_seed(9)
    return {
        n: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype) if n.startswith("w") else t.clone()
        for n, t in state.items()
    }


def by_naive(memory: MLPMemory, h: torch.Tensor, mask: torch.Tensor, state: dict[str, torch.Tensor]) -> list:
    """The weights after writing each sample's tokens, from the state's weights and the token before."""
    parameters = {**dict(memory.named_parameters()), **dict(memory.named_buffers())}
    written = []
    for row in range(len(h)):
        start = {f"initial_w{level}": state[f"w{level}"][row] for level in range(memory.config.depth)}
        text, calls = h[row][mask[row]], [int(mask[row].sum())]
        if state.get("has_last", torch.zeros(99))[row] > 0:  # it has no pair of its own, and writes nothing
            text, calls = torch.cat([state["last_hidden"][row : row + 1], text]), [1, *calls]
        written.append(naive.run(parameters | start, text, memory.config, calls)[1][0].weights)
    return written


SHAPES = [(1, None, "silu"), (2, None, "silu"), (2, 20, "silu"), (3, 5, "silu"), (2, 7, "linear")]


@pytest.mark.parametrize(("depth", "hidden_dim", "activation"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_closed_form_gradient_equals_autograd(depth, hidden_dim, activation, dtype, tolerance) -> None:
    config = MLPConfig(dim=D, depth=depth, hidden_dim=hidden_dim, activation=activation)
    generator = torch.Generator().manual_seed(1)
    pairs = itertools.pairwise(config.widths)
    weights = tuple(torch.randn(3, o, i, generator=generator, dtype=dtype).requires_grad_() for i, o in pairs)
    keys, values = (torch.randn(3, 6, D, generator=generator, dtype=dtype) for _ in range(2))
    shares = torch.rand(3, 6, generator=generator, dtype=dtype)
    loss, gradients = network.loss_and_gradient(weights, keys, values, shares, network.Form(activation))
    expected = torch.autograd.grad(network.loss(weights, keys, values, shares, network.Form(activation)).sum(), weights)
    torch.testing.assert_close(loss, network.loss(weights, keys, values, shares, network.Form(activation)))
    for closed, exact in zip(gradients, expected, strict=True):
        assert (closed - exact).norm() / exact.norm() < tolerance


RULES = [
    {"write": write, "token_shift": shift, "inner_steps": steps, "depth": depth, "step_size": 0.1}
    for write in ("pooled", "token")
    for shift in (False, True)
    for steps, depth in ((1, 2), (3, 2), (2, 1))
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_write_equals_the_specification(rule) -> None:
    memory = make(**rule)
    h, state = hidden(3, 7), state_of(memory, 3)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 0, 1, 1, 1, 1, 1]]).bool()
    if rule["token_shift"]:
        state["last_hidden"], state["has_last"] = hidden(3, 1, seed=4)[:, 0], torch.tensor([1.0, 0.0, 1.0])
    _, new, _ = memory(h, state, mask, None, WRITE)
    for row, expected in enumerate(by_naive(memory, h, mask, state)):
        for level, weight in enumerate(expected):
            assert not torch.equal(new[f"w{level}"][row], state[f"w{level}"][row])
            torch.testing.assert_close(new[f"w{level}"][row], weight, rtol=1e-10, atol=1e-12)


def test_read_is_the_output_projection_of_the_network_on_the_query() -> None:
    memory = make()
    h, state = hidden(2, 5), state_of(memory, 2)
    read, _, _ = memory(h, state)
    for row in range(2):
        weights = [state["w0"][row], state["w1"][row]]
        asked = h[row] @ memory.query_projection.weight.T
        y = torch.stack([naive.network({}, weights, q, 0, memory.config) for q in asked])
        torch.testing.assert_close(read[row], y @ memory.key_projection.weight)


@pytest.mark.parametrize("write", ["pooled", "token"])
def test_second_order_gradients_equal_torch_func(write) -> None:
    """d/d(everything learned) of a later read's loss through two writes, against torch.func on the specification."""
    settings = {"write": write, "step_size": 0.3, "learn_step_size": True, "learn_initial_weights": True}
    memory = make(**settings, key_projection="learned", value_projection="learned", output_projection="learned")
    first, second, query = hidden(1, 5), hidden(1, 4, seed=1), hidden(1, 3, seed=2)
    plan = Pass(graph=True)
    _, state, _ = memory(first, None, None, None, plan)
    _, state, _ = memory(second, state, None, None, plan)
    memory(query, state)[0].square().sum().backward()
    names = [n for n, _ in memory.named_parameters()]

    def outer(values: dict[str, torch.Tensor]) -> torch.Tensor:
        text = torch.cat([first[0], second[0], query[0]])
        return naive.run(values, text, memory.config, [5, 4, 3])[0][-3:].square().sum()

    expected = torch.func.grad(outer)({n: p.detach() for n, p in memory.named_parameters()})
    for name in names:
        actual = memory.get_parameter(name).grad
        assert actual is not None, name
        assert actual.norm() > 0, name
        assert (actual - expected[name]).norm() / expected[name].norm() < 1e-9, name


def test_samples_are_the_same_alone_and_in_a_batch() -> None:
    memory = make(torch.float32, write="token", token_shift=True, step_size=0.5)
    h = hidden(3, 6, dtype=torch.float32)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 5 + [0]]).bool()
    read, together, _ = memory(h, None, mask, None, WRITE)
    for row in range(3):
        length = int(mask[row].sum())
        alone_read, alone, _ = memory(h[row : row + 1, :length], None, None, None, WRITE)
        torch.testing.assert_close(alone_read[0], read[row, :length], atol=1e-5, rtol=1e-5)
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor[0], together[name][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("write", ["pooled", "token"])
def test_padding_never_writes(garbage, write) -> None:
    memory = make(write=write, token_shift=True)
    h = hidden(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    spoilt = h.masked_fill(~mask.unsqueeze(-1), garbage)
    _, clean, _ = memory(h, None, mask, None, WRITE)
    _, dirty, _ = memory(spoilt, None, mask, None, WRITE)
    for name in clean:
        torch.testing.assert_close(dirty[name], clean[name], rtol=0, atol=0)
    torch.testing.assert_close(dirty["w0"][1], memory.initial_w0, rtol=0, atol=0)


def test_reset_rows_start_from_the_initial_weights_even_after_a_nan() -> None:
    memory = make()
    h, state = hidden(2, 4), state_of(memory, 2)
    state["w0"][1] = float("nan")
    read, new, _ = memory(h, state, None, torch.tensor([False, True]), WRITE)
    fresh_read, fresh, _ = memory(h[1:], None, None, None, WRITE)
    torch.testing.assert_close(read[1:], fresh_read)
    torch.testing.assert_close(new["w0"][1:], fresh["w0"])
    assert not torch.equal(new["w0"][:1], memory(h[:1], None, None, None, WRITE)[1]["w0"])


@pytest.mark.parametrize("write", ["pooled", "token"])
def test_a_write_lowers_the_inner_loss_and_reports_it(write) -> None:
    memory = make(write=write, inner_steps=4, step_size=0.2)
    _, _, stats = memory(hidden(3, 9), None, None, None, Pass(stats=True))
    assert (stats["inner_loss_after"] < stats["inner_loss_before"]).all()
    assert (stats["write_norm"] > 0).all()
    up = Pass(stats=True, controls=Controls(sign=-1.0))
    _, _, flipped = memory(hidden(3, 9), None, None, None, up)
    assert (flipped["inner_loss_after"] > flipped["inner_loss_before"]).all()


def test_pooled_write_has_rank_one_and_token_write_more() -> None:
    h = hidden(1, 6)
    ranks = {}
    for write in ("pooled", "token"):
        memory = make(write=write, step_size=1.0)
        _, new, _ = memory(h, None, None, None, WRITE)
        ranks[write] = int(torch.linalg.matrix_rank(new["w0"][0] - memory.initial_w0, rtol=1e-8))
    assert ranks["pooled"] == 1
    assert ranks["token"] == 6


def test_token_shift_carries_the_last_token_across_calls() -> None:
    """The pair (last token of one call, first of the next) is written in the second call."""
    memory = make(write="token", token_shift=True, step_size=0.5)
    h, state = hidden(1, 6), state_of(memory, 1)
    _, before, _ = memory(h[:, :3], state, None, None, WRITE)
    torch.testing.assert_close(before["last_hidden"][0], h[0, 2])
    _, after, _ = memory(h[:, 3:], before, None, None, WRITE)
    expected = by_naive(memory, h[:, 3:], torch.ones(1, 3).bool(), before)
    torch.testing.assert_close(after["w0"][0], expected[0][0])
    # At the very start a call of one token has no pair to write.
    _, single, _ = memory(h[:, :1], None, None, None, WRITE)
    torch.testing.assert_close(single["w0"][0], memory.initial_w0)


def test_query_choices() -> None:
    h = hidden(1, 4)
    tied = make(query_projection="tied")
    assert "query_projection.weight" not in tied.state_dict()
    learned = make()
    by_key, _, _ = learned(h, None, plan=Pass(write=False, controls=Controls(query="key")))
    torch.testing.assert_close(by_key, tied(h, None)[0])
    at_inference = make(tie_query_at_inference=True)
    torch.testing.assert_close(at_inference.eval()(h, None)[0], by_key)
    torch.testing.assert_close(at_inference.train()(h, None)[0], learned(h, None)[0])
    frozen = make(query_projection="orthogonal")
    assert dict(frozen.named_parameters()) == {}
    torch.testing.assert_close(frozen(h, None)[0], learned(h, None)[0])


def test_projections_are_orthonormal_and_their_own() -> None:
    memory, again, other = make(), make(), MLPMemory(H, MLPConfig(dim=D), 4).double()
    weights = [getattr(memory, n).weight for n in ("key_projection", "value_projection", "query_projection")]
    for weight in weights:
        torch.testing.assert_close(weight @ weight.T, torch.eye(D, dtype=weight.dtype), atol=1e-6, rtol=0)
    assert not torch.allclose(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
    assert not torch.allclose(weights[0], other.key_projection.weight)
    torch.testing.assert_close(weights[0], again.key_projection.weight, rtol=0, atol=0)


def test_fast_weights_stay_fp32_under_bf16_products() -> None:
    memory = make(torch.bfloat16, write="token")
    read, state, _ = memory(hidden(2, 5).bfloat16(), None, None, None, WRITE)
    assert read.dtype == torch.bfloat16
    assert {t.dtype for n, t in state.items() if n.startswith("w")} == {torch.float32}


def test_state_is_a_value(tmp_path) -> None:
    memory = make(torch.float32, token_shift=True)
    _, layer, _ = memory(hidden(3, 4, dtype=torch.float32), None, None, None, WRITE)
    state = MemoryState({3: layer, 7: {n: t + 1 for n, t in layer.items()}})
    before = {n: t.clone() for n, t in layer.items()}
    assert state.batch_size == 3
    picked = state.select(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(picked.layers[7]["w0"][0], state.layers[7]["w0"][2])
    assert state.repeat(2).batch_size == 6
    rebuilt = MemoryState.concatenate([state.select(torch.tensor([i])) for i in range(3)])
    mixed = state.where(torch.tensor([True, False, True]), picked)
    torch.testing.assert_close(mixed.layers[3]["w1"][1], picked.layers[3]["w1"][1])
    state.save(tmp_path / "state.safetensors", {"who": "me"})
    loaded, metadata = MemoryState.load(tmp_path / "state.safetensors")
    assert metadata == {"who": "me"}
    for index, name in itertools.product((3, 7), layer):
        torch.testing.assert_close(loaded.layers[index][name], state.layers[index][name], rtol=0, atol=0)
        torch.testing.assert_close(rebuilt.layers[index][name], state.layers[index][name], rtol=0, atol=0)
    for name, tensor in before.items():
        torch.testing.assert_close(layer[name], tensor, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_state_errors(tmp_path) -> None:
    with pytest.raises(StateError, match="one state or more"):
        MemoryState.concatenate([])
    (tmp_path / "x").write_bytes(b"not a state")
    with pytest.raises(StateError, match="not a readable memory state"):
        MemoryState.load(tmp_path / "x")
    bad = MemoryState({1: {"w0": torch.tensor([[[1.0]], [[float("inf")]]])}})
    assert bad.is_finite().tolist() == [True, False]
    for spoil, finite in ((float("inf"), False), (float("nan"), False), (1e38, True)):
        mixed = {
            "w0": torch.tensor([[1.0], [spoil]]),
            "tail_hidden": torch.ones(2, 3).bfloat16(),
            "none": torch.ones(2, 0),
        }
        assert bool(MemoryState({1: mixed, 4: {"w0": torch.zeros(2, 1)}}).all_finite()) is finite
    with pytest.raises(ConfigError, match="inner_steps is -1"):
        Controls(inner_steps=-1)


@pytest.mark.parametrize("write", ["pooled", "token"])
def test_no_mask_is_a_mask_of_ones(write) -> None:
    memory, h = make(write=write), hidden(2, 7)
    state = state_of(memory, 2)
    ones = torch.ones(2, 7, dtype=torch.bool)
    (read, bare, _), (same, masked, _) = (memory(h, state, mask, None, WRITE) for mask in (None, ones))
    assert not torch.equal(bare["w0"], state["w0"])
    torch.testing.assert_close(read, same)
    for name, tensor in masked.items():
        torch.testing.assert_close(bare[name], tensor)
