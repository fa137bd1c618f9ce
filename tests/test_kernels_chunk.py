"""The fast paths of `chunk`, and the kernels of `span`, against the loop in fp64: PyTorch, and Triton in its
interpreter, or on the GPU where there is one."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from tests.kernel_memories import CASES, MOMENTUM, H, memory, run
from titans_ds.errors import ConfigError
from titans_ds.memory import Access, NeuralMemory, kernels
from titans_ds.memory.kernels import chunk

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUPPORTED = ("titans", "by chunk", "limited", "limited by chunk", "plain", "constant momentum")


def text(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, tokens, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def some(batch: int, tokens: int, seed: int) -> torch.Tensor | None:
    """Which tokens are written; None: all of them."""
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.7
    mask[0] = seed % 3 > 0  # nothing to write, or everything
    return None if seed % 4 == 0 else mask


def check_triton(made: NeuralMemory, h: torch.Tensor, mask: torch.Tensor | None, graph: bool) -> None:
    """In fp32, against the loop in fp64."""
    expected = run(made, h, mask, "loop", graph)
    got = run(made.float(), h.float(), mask, "triton", graph)
    assert len(got) == len(expected)
    for index, (left, right) in enumerate(zip(got, expected, strict=True)):
        assert (left.double() - right).norm() <= 1e-4 * right.norm() + 1e-7, index


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("case", SUPPORTED)
def test_pytorch_equals_chunk_after_chunk(case, graph, monkeypatch) -> None:
    rng, (rule, settings) = random.Random(case), CASES[case]
    for seed, loss in enumerate(("l2", "dot", "huber")):
        monkeypatch.setattr(chunk, "_BLOCK_BYTES", rng.choice([1, 10_000, 2**20]))
        made = memory(rule | {"loss": loss}, settings, rng.choice([1, 3, 4]), rng.choice([1, 2]), seed, "chunk")
        h, mask = text(3, rng.randint(1, 23), seed).cpu(), None
        if seed > 0:
            mask = torch.rand(h.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.8
            mask[0] = False
        got, expected = (run(made, h, mask, kernel, graph) for kernel in ("torch", "loop"))
        assert len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@needs_triton
@pytest.mark.parametrize("seed", range(28))
def test_random_shapes(seed) -> None:
    rng, semantics = random.Random(seed), "chunk" if seed < 20 else "span"
    rule, settings = CASES[SUPPORTED[seed % len(SUPPORTED)]]
    heads, tokens, batch = rng.choice([1, 2]), rng.randint(1, 21), rng.choice([1, 2])
    settings = settings | {"dim": heads * rng.choice([4, 16, 19]), "hidden_dim": rng.choice([None, 5, 33])}
    if seed % 4 == 1:
        rule = rule | {"loss": rng.choice(["dot", "huber"]), "huber_delta": 0.3}
    made = memory(rule, settings, rng.choice([1, 3, 7, 16, 18]), heads, seed, semantics).to(DEVICE)
    h, graph = text(batch, tokens, seed) / 2, seed % 5 != 4  # twice as large, seed 12 diverges, and rounding with it
    check_triton(made, h, some(batch, tokens, seed), graph)


WIDE = ("titans", "by chunk", "plain", "constant momentum", "hidden scale, shift")


@needs_triton
@pytest.mark.parametrize("seed", range(10))
def test_span_of_wide_heads(seed, monkeypatch) -> None:
    """Products, and kernels between them."""
    monkeypatch.setattr(kernels, "MOST_WIDTH", 1)
    rng, (rule, settings) = random.Random(seed), CASES[WIDE[seed % len(WIDE)]]
    heads = rng.choice([1, 2])
    settings = settings | {"dim": heads * rng.choice([4, 19]), "hidden_dim": rng.choice([None, 5, 33])}
    rule = rule | {"loss": rng.choice(["l2", "dot", "huber"]), "huber_delta": 0.3}
    made = memory(rule, settings, rng.choice([1, 3, 7]), heads, seed, "span").to(DEVICE)
    monkeypatch.setattr("titans_ds.memory.kernels.span._LEAST_CHUNKS", rng.choice([2, 64]))
    monkeypatch.setattr("titans_ds.memory.kernels.span._BLOCK_BYTES", 1)
    h = text(rng.choice([1, 2]), rng.randint(1, 21), seed)
    check_triton(made, h, None, seed != 4)


ODD = (  # chunk size; width of a head, of its hidden layer; heads, batch, tokens, graph
    ("titans", "l2", 5, 19, 33, 2, 1, 6, True),
    ("by chunk", "huber", 16, 16, 5, 1, 2, 19, True),
    ("plain", "dot", 33, 4, 12, 1, 1, 40, True),
    ("constant momentum", "l2", 33, 130, 7, 1, 1, 34, True),
    ("forgetting", "l2", 70, 7, 12, 1, 1, 72, True),
    ("titans", "dot", 5, 5, 7, 1, 1, 6, True),
    ("hidden scale, shift", "huber", 7, 40, 50, 1, 1, 8, False),
    ("limited", "l2", 5, 19, 33, 1, 1, 11, True),
    ("limited by chunk", "huber", 18, 16, 40, 1, 1, 19, True),
    ("limited, constant momentum", "dot", 33, 70, 7, 1, 1, 66, True),
    ("limited, plain", "l2", 70, 7, 12, 1, 2, 140, True),
    ("limited", "l2", 7, 33, 5, 1, 1, 15, False),
)


@needs_triton
@pytest.mark.parametrize("seed", range(len(ODD)))
def test_wide_heads(seed, monkeypatch) -> None:
    """Kernels of a product each, at sizes that no tile fits."""
    case, loss, chunk_size, dim, hidden, heads, batch, tokens, graph = ODD[seed]
    monkeypatch.setattr(kernels, "MOST_WIDTH", 1)
    monkeypatch.setattr("titans_ds.memory.kernels.wide._LONG", 70)
    rule, settings = CASES[case]
    settings = settings | {"dim": heads * dim, "hidden_dim": hidden, "depth": 2}
    made = memory(rule | {"loss": loss, "huber_delta": 0.3}, settings, chunk_size, heads, seed, "chunk").to(DEVICE)
    h, mask = text(batch, tokens, seed), None
    if seed < 2:
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.8
    check_triton(made, h, mask, graph)


SINGLE = tuple(case for case in CASES if case.startswith("linear memory"))


@needs_triton
@pytest.mark.parametrize("seed", range(18))
def test_one_matrix(seed) -> None:
    """With and without residual norm, at sizes that no tile fits."""
    rng, (rule, settings) = random.Random(seed), CASES[SINGLE[seed % len(SINGLE)]]
    heads, tokens, batch = rng.choice([1, 2]), rng.randint(1, 21), rng.choice([1, 2])
    settings = settings | {"dim": heads * rng.choice([4, 16, 19]), "step_size": 0.1}
    rule = rule | {"loss": rng.choice(["l2", "dot", "huber"]), "huber_delta": 0.3}
    made = memory(rule, settings, rng.choice([1, 3, 7, 16, 18]), heads, seed, "chunk").to(DEVICE)
    h, graph = text(batch, tokens, seed) / 2, seed % 5 != 4
    check_triton(made, h, some(batch, tokens, seed), graph)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_final_state_that_nothing_follows(kernel, monkeypatch) -> None:
    """The backward then leaves the last chunk's write out."""
    monkeypatch.setattr(kernels, "MOST_WIDTH", 1)
    made, h = memory(*CASES["titans"], 4, 1, 0, "chunk").to(DEVICE), text(1, 8, 0)
    found = []
    for choice in ("loop", kernel):
        made = made if choice == "loop" else made.float()
        x = (h if choice == "loop" else h.float()).clone().requires_grad_()
        with kernels.choice(choice):
            made(x, None, None, None, Access(write=True, graph=True))[0].square().sum().backward()
        found.append([x.grad.double(), *(p.grad.double() for p in made.parameters() if p.grad is not None)])
        made.zero_grad()
    for index, (right, left) in enumerate(zip(*found, strict=True)):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-7, index


@needs_triton
@pytest.mark.parametrize(
    ("semantics", "graph", "case"),
    [("chunk", True, "half"), ("chunk", False, "half"), ("span", True, "half"), ("chunk", True, SINGLE[-1])],
)
def test_half_precision_is_as_near_to_fp64_as_the_loop(semantics, graph, case) -> None:
    rule, settings = (CASES | {"half": (MOMENTUM | {"max_gradient_norm": 0.5}, {})})[case]
    made = memory(rule, settings | {"dim": 32}, 16, 2, 3, semantics).to(DEVICE)
    h = text(2, 40, 1).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)  # the interpreter has no bf16 products
    exact = run(made, h.double(), None, "loop", graph)
    near, loop = (run(made.float(), h, None, kernel, graph) for kernel in ("triton", "loop"))
    for index, (got, plain, right) in enumerate(zip(near, loop, exact, strict=True)):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (got, plain))
        assert error < 2.5 * allowed + 2e-3, (index, error, allowed)
    assert near[2].dtype == torch.float32


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_the_loop_is_left_out(kernel, monkeypatch) -> None:
    made = memory(MOMENTUM, {}, 4, 1, 0, "chunk").float().to(DEVICE)
    monkeypatch.setattr("titans_ds.memory.chunks.write_chunk", None)
    with kernels.choice(kernel):
        made(text(1, 9, 0).float(), None, None, None, Access(write=True))
    with kernels.choice("loop"), pytest.raises(TypeError):
        made(text(1, 9, 0).float(), None, None, None, Access(write=True))


REFUSED = {
    "muon": ({"optimizer": "muon"}, {}, 4),
    "three matrices": ({}, {"depth": 3}, 4),
    "one matrix, wide": ({}, {"depth": 1, "dim": 256}, 4),
    "long chunks": ({"max_gradient_norm": 0.5}, {}, 200),
}


@needs_triton
@pytest.mark.parametrize("case", REFUSED)
def test_what_triton_does_not_do_is_refused_or_left_to_pytorch(case) -> None:
    rule, settings, chunk_size = REFUSED[case]
    made, h = memory(rule, settings, chunk_size, 1, 0, "chunk").float().to(DEVICE), text(1, 9, 0).float()
    with kernels.choice("triton"), pytest.raises(ConfigError, match="TITANS_DS_KERNEL is 'triton', but it does"):
        made(h, None, None, None, Access(write=True))
    read, _, _ = made(h, None, None, None, Access(write=True))
    assert torch.isfinite(read).all()


def test_long_input_stays_finite() -> None:
    made = (
        memory(MOMENTUM | {"max_gradient_norm": 1.0, "gate_scope": "chunk"}, {}, 256, 1, 0, "chunk").float().to(DEVICE)
    )
    h = text(1, 65_536, 2).float().requires_grad_()
    read, state, _ = made(h, None, None, None, Access(write=True, graph=True))
    (read.square().mean() + state["w0"].square().mean()).backward()
    assert all(torch.isfinite(t).all() for t in (read, state["w0"], state["s1"], h.grad))
