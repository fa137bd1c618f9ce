"""The delta memory of one layer: every path computes the same rule, and a text may be cut anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory import Controls, Pass
from titans_ds.memory.delta import DeltaConfig, DeltaMemory, backends, chunkwise, naive
from titans_ds.memory.interface import LayerTrace

HIDDEN, HEADS = 24, 2
CONFIGS = {
    "delta": DeltaConfig(dim=16, heads=HEADS),
    "gated_delta": DeltaConfig(dim=16, heads=HEADS, step_size="token", forget_gate=True, initial_forget=0.1),
    "no shift, own queries": DeltaConfig(dim=16, heads=HEADS, token_shift=False, query_projection="learned"),
    "orthogonal, constant": DeltaConfig(dim=16, projections="orthogonal", step_size="constant"),
}


def tensors(
    batch: int, tokens: int, heads: int, width: int, gated: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor | None]:
    """Queries, keys, values, step sizes with a gap, log decays (or None) and a state that is not empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys, values = (normal(batch, tokens, heads, width) for _ in range(3))
    queries, keys = torch.nn.functional.normalize(queries, dim=-1), torch.nn.functional.normalize(keys, dim=-1)
    step = torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64)
    step[0, tokens // 3] = 0
    log_keep = -0.3 * torch.rand(batch, tokens, heads, generator=generator, dtype=torch.float64) if gated else None
    found = [queries, keys, values, step, log_keep, normal(batch, heads, width, width)]
    return [None if t is None else t.to(dtype).requires_grad_() for t in found]


def outcome(rule: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor | None], seed: int = 1) -> list[Tensor]:
    """Reads, state, and the gradients of a random function of both in every input."""
    reads, state = rule(*given)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (reads, state)]
    weights = [weight.to(t.device, t.dtype) for weight, t in zip(drawn, (reads, state), strict=True)]
    total = (reads * weights[0]).sum() + (state * weights[1]).sum()
    return [reads, state, *torch.autograd.grad(total, [t for t in given if t is not None])]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, over the largest value of the tensor that it is in."""
    errors = [(a.cpu().double() - b.double()).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max().detach())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 40, 70])
def test_chunks_of_any_length_equal_the_loop_over_tokens(tokens: int, gated: bool) -> None:
    given = tensors(2, tokens, 2, 8, gated)
    expected = outcome(naive.delta_rule, given)
    for chunk in (1, 3, 16, 32, 64, tokens, None):
        found = outcome(lambda *t, c=chunk: chunkwise.delta_rule(*t, chunk_size=c), given)
        assert relative_error(found, expected) < 1e-10, f"chunk {chunk}"


@pytest.mark.parametrize("gated", [False, True])
def test_in_fp32_long_texts_stay_within_1e_5(gated: bool) -> None:
    given = tensors(1, 2048, 1, 32, gated, torch.float32)
    with torch.no_grad():
        exact = naive.delta_rule(*(None if t is None else t.double() for t in given))
        for chunk in (16, 64, 256):
            found = chunkwise.delta_rule(*given, chunk_size=chunk)
            assert relative_error(list(found), list(exact)) < 1e-5, f"chunk {chunk}"


def test_a_key_that_comes_again_and_again_is_stable() -> None:
    """The triangular system is then as badly conditioned as it gets."""
    queries, keys, values, step, state = (t.detach() for t in tensors(1, 512, 1, 16, False) if t is not None)
    given = [queries, keys[:, :1].expand_as(keys), values, step.clamp(min=0.9), None, state]
    exact = naive.delta_rule(*given)
    found = chunkwise.delta_rule(*(None if t is None else t.float() for t in given), chunk_size=128)
    assert relative_error(list(found), list(exact)) < 1e-4


def test_the_gradient_in_the_queries_alone_keeps_no_graph_of_the_writes() -> None:
    given = tensors(1, 20, 1, 8, True)
    expected = outcome(naive.delta_rule, given)
    constants = [given[0], *(None if t is None else t.detach() for t in given[1:])]
    reads, state = chunkwise.delta_rule(*constants, chunk_size=8)
    assert not state.requires_grad
    weights = torch.randn(reads.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad((reads * weights).sum(), [given[0]])
    assert relative_error([found], [expected[2]]) < 1e-10


def memory_of(name: str, seed: int = 3) -> DeltaMemory:
    """A memory in fp64 whose gates and norms are not what they start as."""
    memory = DeltaMemory(HIDDEN, CONFIGS[name], layer_index=0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return memory


def text(batch: int, tokens: int, seed: int = 5) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_in_pieces(memory: DeltaMemory, hidden: Tensor, cuts: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """A text in several calls."""
    state, reads = None, []
    for start, end in itertools.pairwise([0, *cuts, hidden.shape[1]]):
        read, state, _ = memory(hidden[:, start:end], state, plan=Pass())
        reads.append(read)
    assert state is not None
    return torch.cat(reads, dim=1), state


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_in_one_call_equals_the_text_in_any_pieces(name: str) -> None:
    memory, hidden = memory_of(name), text(2, 23)
    whole, state = read_in_pieces(memory, hidden, [])
    for cuts in ([1], [7, 16], [22], list(range(1, 23))):
        read, end = read_in_pieces(memory, hidden, cuts)
        assert relative_error([read, end["matrices"]], [whole, state["matrices"]]) < 1e-10, f"cuts {cuts}"


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_anywhere_writes_nothing_whatever_it_holds(name: str) -> None:
    memory, hidden = memory_of(name), text(1, 12)
    expected, state = read_in_pieces(memory, hidden, [])
    places = torch.tensor([1, 2, 5, 6, 7, 9, 10, 11, 14, 15, 16, 17])
    padded = torch.full((1, 20, HIDDEN), float("nan"), dtype=torch.float64)
    padded[:, places] = hidden
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, places] = True
    read, end, _ = memory(padded, None, mask, plan=Pass())
    assert relative_error([read[:, places], end["matrices"]], [expected, state["matrices"]]) < 1e-10
    assert torch.equal(end["last_hidden"], hidden[:, -1])


def test_a_token_reads_what_it_has_written_itself_and_nothing_later() -> None:
    memory, hidden = memory_of("delta"), text(1, 9)
    before, _ = read_in_pieces(memory, hidden, [])
    changed = hidden.clone()
    changed[:, 5] += 1
    after, _ = read_in_pieces(memory, changed, [])
    differs = (before - after).abs().amax(dim=(0, 2)) > 1e-9
    assert differs.tolist() == [False] * 5 + [True] * 4


def test_a_pair_across_two_calls_is_written_and_a_reset_forgets_it() -> None:
    memory, hidden = memory_of("delta"), text(2, 2)
    _, state, _ = memory(hidden[:, :1], None, plan=Pass())
    assert not state["matrices"].any(), "one token alone has no pair to write"
    _, state, _ = memory(hidden[:, 1:], state, plan=Pass())
    assert state["matrices"].flatten(1).any(dim=1).tolist() == [True, True]
    reset = torch.tensor([True, False])
    _, state, _ = memory(hidden[:, 1:], state, reset_B=reset, plan=Pass())
    assert state["matrices"].flatten(1).any(dim=1).tolist() == [False, True]


def test_reading_alone_changes_no_state_and_an_empty_state_reads_zero() -> None:
    memory, hidden = memory_of("delta"), text(2, 4)
    read, state, _ = memory(hidden, None)
    assert not read.any()
    assert not any(t.any() for t in state.values())


def window_gradients(memory: DeltaMemory, pieces: list[Tensor], two_phases: bool) -> dict[str, Tensor]:
    """Gradients of a random function of the reads of several segments, through their writes."""
    weights = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) for i, p in enumerate(pieces)
    ]
    memory.zero_grad()
    state, traces = None, []
    total = torch.zeros((), dtype=torch.float64)
    for piece, weight in zip(pieces, weights, strict=True):
        trace = LayerTrace(piece) if two_phases else None
        read, state, _ = memory(piece, state, plan=Pass(graph=not two_phases), trace=trace)
        total = total + (read * weight).sum()
        traces.append(trace)
    total.backward()
    state, answers = None, [torch.zeros(1, dtype=torch.float64)]
    for piece, trace in zip(pieces, traces, strict=True):
        if trace is not None:
            answer, state, _ = memory(piece, state, plan=Pass(graph=True), trace=trace.rewriting())
            answers.append(answer)
    through_writes = torch.cat(answers).sum()
    if through_writes.requires_grad:  # nothing is learned through the writes of frozen projections
        through_writes.backward()
    return {name: p.grad for name, p in memory.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_second_order_in_two_phases_has_the_gradient_of_one_graph(name: str) -> None:
    memory, hidden = memory_of(name), text(2, 18)
    pieces = list(hidden.split(6, dim=1))
    expected = window_gradients(memory, pieces, two_phases=False)
    found = window_gradients(memory, pieces, two_phases=True)
    assert expected.keys() == found.keys() == dict(memory.named_parameters()).keys()
    assert relative_error(list(found.values()), list(expected.values())) < 1e-10


@pytest.mark.parametrize("graph", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mask_that_hides_nothing_changes_nothing(name: str, graph: bool) -> None:
    """Neither reads, state and gradients, nor the order in which modules are called: ranks of ZeRO-3 gather in it."""
    memory, hidden = memory_of(name), text(2, 9)
    called: list[str] = []
    for part, module in memory.named_modules():
        module.register_forward_pre_hook(lambda _, __, part=part: called.append(part))
    found, orders = [], []
    for mask in (None, torch.ones(2, 9, dtype=torch.bool)):
        given = hidden.detach().requires_grad_()
        read, state, _ = memory(given, None, mask, plan=Pass(graph=graph))
        total = read.square().sum() + (state["matrices"].square().sum() if graph else 0)
        gradients = torch.autograd.grad(total, [given, *memory.parameters()], allow_unused=True)
        found.append([read, state["matrices"], *(t for t in gradients if t is not None)])
        orders.append(called.copy())
        called.clear()
    assert orders[0] == orders[1]
    assert len(found[0]) == len(found[1])
    assert relative_error(found[1], found[0]) < 1e-12


def test_first_order_trains_what_reads_use_and_nothing_else() -> None:
    memory = memory_of("gated_delta")
    read, _, _ = memory(text(1, 8), None, plan=Pass())
    read.sum().backward()
    learned = {n.split(".")[0] for n, p in memory.named_parameters() if p.grad is not None}
    assert learned == {"key_projection", "output_projection", "read_norm"}


def test_control_changes_the_writes() -> None:
    memory, hidden = memory_of("delta"), text(1, 6)
    _, still, _ = memory(hidden, None, plan=Pass(controls=Controls(inner_steps=0)))
    assert not still["matrices"].any()
    _, down, _ = memory(hidden, None, plan=Pass())
    _, up, _ = memory(hidden[:, :2], None, plan=Pass(controls=Controls(sign=-1.0)))
    _, first, _ = memory(hidden[:, :2], None, plan=Pass())
    assert torch.allclose(up["matrices"], -first["matrices"])
    assert down["matrices"].any()
    with pytest.raises(ConfigError, match="inner_steps"):
        memory(hidden, None, plan=Pass(controls=Controls(inner_steps=2)))


def test_statistics_show_that_writing_lowers_the_inner_loss() -> None:
    _, _, stats = memory_of("delta")(text(3, 6), None, plan=Pass(stats=True))
    assert (stats["inner_loss_after"] < stats["inner_loss_before"]).all()
    assert all(stat.shape == (3,) for stat in stats.values())


def bad_settings() -> Iterator[tuple[dict[str, object], str]]:
    yield {"heads": 0}, "memory.heads"
    yield {"dim": 10, "heads": 4}, "not divisible"
    yield {"initial_step_size": 1.0}, "between 0 and 1"
    yield {"initial_forget": 0.5}, "forget_gate is false"
    yield {"step_size": "chunk"}, "expected one of"


@pytest.mark.parametrize(("settings", "message"), bad_settings())
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeltaConfig(**settings)  # type: ignore[arg-type]


def test_the_width_is_chosen_from_the_base_model() -> None:
    assert [DeltaConfig().resolved(h).dim for h in (96, 896, 4096)] == [96, 896, 1024]
    assert DeltaConfig(heads=3).resolved(1000).dim == 999
    assert DeltaConfig(dim=64).resolved(4096).dim == 64


def test_fla_says_why_it_cannot_and_what_can() -> None:
    for width, message in ((896, "heads of up to 256"), (64, "need a GPU")):
        with pytest.raises(ConfigError, match=message):
            backends.choose(DeltaConfig(dim=width, backend="fla"), torch.zeros(1, 1, 1, width))
    assert backends.choose(DeltaConfig(dim=64), torch.zeros(1, 1, 1, 64)) == "chunkwise"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla's kernels need a GPU")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_fla_is_within_three_times_the_error_of_the_loop_in_bf16(width: int, gated: bool) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    given = [None if t is None else t.detach() for t in tensors(2, 512, 2, width, gated)]
    exact = outcome(naive.delta_rule, [None if t is None else t.clone().requires_grad_() for t in given])
    narrow = [t if t is None else t.to("cuda", torch.float32 if i > 2 else torch.bfloat16) for i, t in enumerate(given)]
    config = DeltaConfig(dim=width, backend="fla")

    def fla(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return backends.delta_rule(config, *tensors)

    leaves = [None if t is None else t.requires_grad_() for t in narrow]
    loop, kernel = outcome(naive.delta_rule, leaves), outcome(fla, leaves)
    for expected, of_loop, of_kernel in zip(exact, loop, kernel, strict=True):
        scale = expected.abs().max()
        error = [float((t.cpu().double() - expected).abs().max() / scale) for t in (of_loop, of_kernel)]
        assert error[1] < 3 * error[0] + 1e-3
