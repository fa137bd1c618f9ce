"""What a chunked memory carries between calls: a text may be cut anywhere, padding and neighbours change nothing."""

from __future__ import annotations

import pytest
import torch

from tests.memory.test_titans_rule import GRAPH, LEARNED, MASKS, RULES, WRITE, H, hidden, make
from tests.support.tiny_models import tiny_base
from titans_ds import preset
from titans_ds.config import GraftConfig
from titans_ds.errors import ConfigError
from titans_ds.memory import Controls, MemoryState, Pass
from titans_ds.memory.mlp import MLPConfig, MLPMemory, RuleConfig
from titans_ds.training.build import make_module
from titans_ds.training.settings import DataSettings, ModelSettings, TrainConfig, TrainingSettings

CHUNKED = [n for n, s in RULES.items() if s["rule"].chunk_size is not None]


@pytest.mark.parametrize("name", CHUNKED)
def test_a_text_may_be_cut_into_calls_anywhere(name) -> None:
    memory, h = make(name), hidden(3, 21)
    mask = MASKS.flatten(1)
    whole_read, whole, _ = memory(h, None, mask, None, WRITE)
    for cuts in ([1] * 21, [8, 13], [5, 1, 11, 4]):
        state, reads = None, []
        for piece, piece_mask in zip(h.split(cuts, 1), mask.split(cuts, 1), strict=True):
            read, state, _ = memory(piece, state, piece_mask, None, WRITE)
            reads.append(read)
        torch.testing.assert_close(torch.cat(reads, 1)[mask], whole_read[mask], rtol=1e-9, atol=1e-11)
        assert state.keys() == whole.keys()
        for key in whole:
            torch.testing.assert_close(state[key], whole[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", RULES)
def test_no_mask_is_a_mask_of_ones(name) -> None:
    memory, h = make(name), hidden(2, 3, 7)
    states, reads = [None, None], [None, None]
    for call in range(3):
        for i, mask in enumerate((None, torch.ones(2, 7).bool())):
            reads[i], states[i], _ = memory(h[:, call], states[i], mask, None, WRITE)
        torch.testing.assert_close(reads[0], reads[1])
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key])


@pytest.mark.parametrize("name", RULES)
def test_no_token_changes_what_is_read_before_it(name) -> None:
    memory, h = make(name), hidden(1, 14)
    read, _, _ = memory(h, None, None, None, WRITE)
    seen_later = False
    for t in range(14):
        other = h.clone()
        other[:, t] += 1.0
        changed, _, _ = memory(other, None, None, None, WRITE)
        torch.testing.assert_close(changed[:, :t], read[:, :t], rtol=0, atol=0)
        assert not torch.allclose(changed[:, t], read[:, t])
        seen_later |= t + 5 < 14 and not torch.allclose(changed[:, t + 5 :], read[:, t + 5 :])
    assert seen_later == (memory.config.rule.chunk_size is not None)


@pytest.mark.parametrize("name", RULES)
def test_samples_are_the_same_alone_and_beside_padding_of_any_content(name) -> None:
    memory, h = make(name), hidden(3, 7)
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    start = memory(hidden(3, 6, seed=8), None, None, None, WRITE)[1]
    spoilt = h.masked_fill(~mask.unsqueeze(-1), float("nan"))
    read, together, _ = memory(spoilt, start, mask, None, WRITE)
    for row in range(3):
        own = {n: t[row : row + 1] for n, t in start.items()}
        alone_read, alone, _ = memory(h[row : row + 1, mask[row]], own, None, None, WRITE)
        torch.testing.assert_close(read[row][mask[row]], alone_read[0])
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key][row], tensor[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", RULES)
def test_a_row_without_tokens_keeps_its_state_and_gives_finite_gradients(name) -> None:
    memory = make(name, learned=True)
    _, start, _ = memory(hidden(2, 9), None, None, None, GRAPH)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    read, after, _ = memory(hidden(2, 5, seed=1), start, mask, None, GRAPH)
    for key in start:
        torch.testing.assert_close(after[key][1], start[key][1], rtol=0, atol=0)
    (read.square().sum() + sum(after[f"w{i}"].square().sum() for i in range(memory.config.depth))).backward()
    for parameter_name, parameter in memory.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", ["titans, heads", "adamw", "ttt-linear", "titans, shift and convolution"])
def test_a_reset_row_starts_anew_whatever_it_held(name) -> None:
    memory, h = make(name), hidden(2, 6)
    state = memory(hidden(2, 9, seed=1), None, None, None, WRITE)[1]
    state = {n: t.clone() for n, t in state.items()}
    for tensor in state.values():
        tensor[1] = float("nan")
    read, after, _ = memory(h, state, None, torch.tensor([False, True]), WRITE)
    fresh_read, fresh, _ = memory(h[1:], None, None, None, WRITE)
    torch.testing.assert_close(read[1:], fresh_read)
    for key in fresh:
        torch.testing.assert_close(after[key][1:], fresh[key])


def test_an_unwritten_token_reads_what_the_call_started_with() -> None:
    memory, h = make("titans"), hidden(1, 12)
    mask = torch.ones(1, 12).bool()
    mask[0, 9] = False
    state = memory(hidden(1, 8, seed=1), None, None, None, WRITE)[1]
    read, _, _ = memory(h, state, mask, None, WRITE)
    moved = memory(h[:, :9], state)[1]  # only the convolution's tail
    assert torch.equal(moved["w0"], state["w0"])
    torch.testing.assert_close(read[:, 9:10], memory(h[:, 9:10], moved)[0])


def test_reading_token_by_token_equals_reading_at_once() -> None:
    memory, h = make("titans, shift and convolution"), hidden(2, 6)
    state = memory(hidden(2, 10, seed=1), None, None, None, WRITE)[1]
    whole, _, _ = memory(h, state)
    pieces = []
    for t in range(6):
        read, state, _ = memory(h[:, t : t + 1], state)
        pieces.append(read)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_reads_alone_change_nothing_where_queries_are_not_convolved() -> None:
    memory, h = make("queries not convolved"), hidden(2, 6)
    state = memory(hidden(2, 10, seed=1), None, None, None, WRITE)[1]
    read, after, _ = memory(h, state)
    assert all(torch.equal(after[n], t) for n, t in state.items())
    torch.testing.assert_close(memory(h[:, 3:4], state)[0], read[:, 3:4])


def test_fixed_queries_read_the_weights_of_the_start() -> None:
    memory, h = make("titans, heads"), hidden(2, 9)
    queries = torch.randn(5, 8, dtype=torch.float64)
    read, written, _ = memory(h, None, None, None, WRITE, queries)
    torch.testing.assert_close(read, memory(h, None, queries_ND=queries)[0])
    torch.testing.assert_close(written["w0"], memory(h, None, None, None, WRITE)[1]["w0"])


@pytest.mark.parametrize("name", ["titans, heads", "adamw", "muon", "ttt-linear"])
def test_products_in_bf16_leave_the_state_in_fp32(name) -> None:
    memory = make(name, torch.bfloat16)
    read, state, _ = memory(hidden(2, 9).bfloat16(), None, None, None, Pass(stats=True))
    assert read.dtype == torch.bfloat16
    in_bf16 = {n for n, t in state.items() if t.dtype == torch.bfloat16}
    assert in_bf16 <= {"pending_keys", "pending_values", "tail_hidden", "last_hidden"}
    exact = make(name, torch.float32)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), memory.parameters(), strict=True):
            p.copy_(q)
    _, wide, _ = exact(hidden(2, 9).bfloat16().float(), None, None, None, WRITE)
    for level in range(memory.config.depth):
        moved = (wide[f"w{level}"] - exact.initial_state(2, hidden(2, 1).float())[f"w{level}"]).norm()
        assert (state[f"w{level}"] - wide[f"w{level}"]).norm() < 0.1 * moved


@pytest.mark.parametrize("count", [9, 32])  # with and without an unfinished chunk
def test_the_state_goes_through_files_and_batch_operations(tmp_path, count) -> None:
    memory = make("titans, heads", torch.float32)
    _, layer, _ = memory(hidden(3, count).float(), None, None, None, WRITE)
    state = MemoryState({0: layer})
    state.save(tmp_path / "state.safetensors")
    loaded = MemoryState.load(tmp_path / "state.safetensors")[0].select(torch.tensor([2, 0]))
    h = hidden(3, 5, seed=4).float()
    expected = memory(h, layer, None, None, WRITE)[1]
    got = memory(h[[2, 0]], loaded.layers[0], None, None, WRITE)[1]
    for key in expected:
        torch.testing.assert_close(got[key], expected[key][[2, 0]])
    assert state.is_finite().tolist() == [True] * 3


@pytest.mark.parametrize("name", ["titans", "adamw", "ttt-linear"])
def test_stats_and_controls(name) -> None:
    memory, h = make(name), hidden(2, 9)
    _, down, stats = memory(h, None, None, None, Pass(stats=True))
    assert (stats["inner_loss_after"] < stats["inner_loss_before"]).all()
    assert (stats["write_norm"] > 0).all()
    _, _, up = memory(h, None, None, None, Pass(stats=True, controls=Controls(sign=-1.0)))
    assert (up["inner_loss_after"] > up["inner_loss_before"]).all()
    _, none, _ = memory(h, None, None, None, Pass(controls=Controls(inner_steps=0)))
    torch.testing.assert_close(none["w0"], memory.initial_state(2, h)["w0"], rtol=0, atol=0)
    assert not torch.equal(down["w0"], none["w0"])


def test_a_rule_of_one_pass_refuses_more_steps() -> None:
    plan = Pass(controls=Controls(inner_steps=3))
    with pytest.raises(ConfigError, match="steps once a chunk"):
        make("titans")(hidden(1, 4), None, None, None, plan)


def test_first_order_training_reaches_what_is_read_with() -> None:
    """Norm scales and query convolution get gradients without second order; what acts through writes gets none."""
    memory = make("titans, heads", learned=True)
    _, state, _ = memory(hidden(1, 9), None, None, None, WRITE)
    state = {n: t.detach() for n, t in state.items()}
    memory(hidden(1, 6, seed=1), state, None, None, WRITE)[0].square().sum().backward()
    reached = {n for n, p in memory.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert reached == {
        "pre_norm", "read_norm", "query_projection.weight", "output_projection.weight", "query_convolution.weight"
    }  # fmt: skip


FROZEN = {
    "key_convolution": {"features": {"convolution": True}},
    "log_step_sizes": {"learn_step_size": True},
    "value_projection": {"value_projection": "learned"},
    "key_projection": {"key_projection": "learned"},
    "gates, step size": {"rule": {"token_step_size": True}},
    "gates, momentum": {"rule": {"optimizer": "momentum", "token_momentum": True}},
    "gates, forget gate": {"rule": {"forget_gate": 0.1, "token_forget_gate": True}},
}


@pytest.mark.parametrize("name", FROZEN)
def test_first_order_freezes_what_gets_no_gradient_from_it(name) -> None:
    graft = GraftConfig.from_dict({"memory": {"preset": "paper", "dim": 8, **FROZEN[name]}})
    learned = {}
    for order in ("first", "second"):
        training = TrainingSettings(order=order)
        config = TrainConfig(ModelSettings(base="B"), DataSettings(corpus="C"), graft, training=training)
        module = make_module(tiny_base("llama"), config)
        learned[order] = {n.split(".memory.")[-1] for n, p in module.named_parameters() if p.requires_grad}
    part = name.split(",")[0]
    assert any(n.startswith(part) for n in learned["second"])
    assert not any(n.startswith(part) for n in learned["first"])


def test_a_tied_query_trains_the_key_projection_at_first_order() -> None:
    assert "key_projection" not in MLPConfig(key_projection="learned", query_projection="tied").write_only()


WRONG = [
    ({"rule": {"token_forget_gate": True}}, "set rule.forget_gate above 0"),
    ({"rule": {"token_momentum": True}}, "optimizer 'sgd' has none"),
    ({"rule": {"optimizer": "muon", "forget_gate": 0.1}}, "set rule.gate_scope to 'chunk'"),
    ({"rule": {"optimizer": "adamw", "token_momentum": True, "gate_scope": "chunk"}}, "corrects its bias"),
    ({"rule": {"optimizer": "momentum"}, "inner_steps": 2}, "passes over a chunk's tokens once"),
    ({"rule": {"step_sizes": [0.1]}}, "expected 2 numbers"),
    ({"rule": {"chunk_sise": 3}}, "did you mean 'chunk_size'"),
    ({"rule": {"chunk_size": 0}}, "must be 1 or more"),
    ({"rule": {"optimizer": "adam"}}, "'adamw'"),
    ({"features": {"activation": "gelu"}}, "'silu'"),
    ({"heads": 3}, "not divisible"),
    ({"initial_stds": [0.0, 0.0]}, "every inner gradient would be 0"),
    ({"learn_step_size": True, "rule": {"step_sizes": [0.1, 0.0]}}, "learn_step_size"),
]


@pytest.mark.parametrize(("memory", "message"), WRONG, ids=lambda v: str(v))
def test_settings_that_do_not_fit_together_are_refused(memory, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GraftConfig.from_dict({"memory": {"preset": "paper", **memory}})


def test_settings_go_through_an_adapter_file() -> None:
    config = GraftConfig(memory=preset("titans", dim=32, heads=2))
    assert GraftConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["paper", "titans", "ttt_linear"])
def test_named_memories_write_and_read(name) -> None:
    memory = MLPMemory(H, preset(name, dim=8), 0)
    h = hidden(2, 130).float()
    _, state, stats = memory(h, None, None, None, Pass(stats=True))
    assert (stats["write_norm"] > 0).all()
    assert (stats["inner_loss_after"] < stats["inner_loss_before"]).all()
    assert torch.isfinite(memory(h, state)[0]).all()
    with pytest.raises(ConfigError, match=r"is no preset.*did you mean 'titans'"):
        preset("titan")


def test_rule_settings_have_no_surprises() -> None:
    assert MLPConfig().rule == RuleConfig()
    assert not RuleConfig().has_momentum
    assert RuleConfig().token_gates == ()


@pytest.mark.parametrize("name", RULES)
def test_everything_is_computed_on_the_device_of_the_hidden_states(name) -> None:
    """On the meta device any tensor made elsewhere is an error."""
    memory = MLPMemory(H, MLPConfig(**RULES[name] | LEARNED), 0).to("meta", torch.bfloat16)
    h, state = torch.empty(2, 7, H, device="meta", dtype=torch.bfloat16), None
    for mask, reset in ((None, None), (torch.empty(2, 7, device="meta"), torch.empty(2, device="meta").bool())):
        read, state, _ = memory(h, state, mask, reset, Pass(graph=True, stats=True))
    assert {t.device.type for t in (read, *state.values())} == {"meta"}
    read.sum().backward()
