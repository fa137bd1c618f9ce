"""The fast paths against the loop in fp64: PyTorch, and Triton in its interpreter, or on the GPU where there is one."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from tests.support.kernel_memories import CASES, MOMENTUM, H, first_and_long, memory, run
from titans_ds.errors import ConfigError
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPMemory, kernels
from titans_ds.memory.mlp.kernels import chunkwise

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


def check_triton(made: MLPMemory, h: torch.Tensor, mask: torch.Tensor | None, graph: bool) -> None:
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
    for seed in range(3):
        monkeypatch.setattr(chunkwise, "_BLOCK_BYTES", rng.choice([1, 10_000, 2**20]))
        made = memory(rule, settings, rng.choice([1, 3, 4]), rng.choice([1, 2]), seed)
        h, mask = text(3, rng.randint(1, 23), seed).cpu(), None
        if seed > 0:
            mask = torch.rand(h.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.8
            mask[0] = False
        got, expected = (run(made, h, mask, kernel, graph) for kernel in ("torch", "loop"))
        assert len(got) == len(expected)
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@needs_triton
@pytest.mark.parametrize("seed", first_and_long(20))
def test_random_shapes(seed) -> None:
    rng = random.Random(seed)
    rule, settings = CASES[SUPPORTED[seed % len(SUPPORTED)]]
    heads, tokens, batch = rng.choice([1, 2]), rng.randint(1, 21), rng.choice([1, 2])
    settings = settings | {"dim": heads * rng.choice([4, 16, 19]), "hidden_dim": rng.choice([None, 5, 33])}
    made = memory(rule, settings, rng.choice([1, 3, 7, 16, 18]), heads, seed).to(DEVICE)
    h, graph = text(batch, tokens, seed) / 2, seed % 5 != 4  # twice as large, seed 12 diverges, and rounding with it
    check_triton(made, h, some(batch, tokens, seed), graph)


SINGLE = tuple(case for case in CASES if case.startswith("linear memory"))


@needs_triton
@pytest.mark.parametrize("seed", first_and_long(18))
def test_one_matrix(seed) -> None:
    """With and without residual norm, at sizes that no tile fits."""
    rng, (rule, settings) = random.Random(seed), CASES[SINGLE[seed % len(SINGLE)]]
    heads, tokens, batch = rng.choice([1, 2]), rng.randint(1, 21), rng.choice([1, 2])
    settings = settings | {"dim": heads * rng.choice([4, 16, 19]), "step_size": 0.1}
    made = memory(rule, settings, rng.choice([1, 3, 7, 16, 18]), heads, seed).to(DEVICE)
    h, graph = text(batch, tokens, seed) / 2, seed % 5 != 4
    check_triton(made, h, some(batch, tokens, seed), graph)


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_final_state_that_nothing_follows(kernel) -> None:
    """PyTorch's backward then leaves the last chunk's write out."""
    made, h = memory(*CASES["titans"], 4, 1, 0).to(DEVICE), text(1, 8, 0)
    found = []
    for choice in ("loop", kernel):
        made = made if choice == "loop" else made.float()
        x = (h if choice == "loop" else h.float()).clone().requires_grad_()
        with kernels.choice(choice):
            made(x, None, None, None, Pass(graph=True))[0].square().sum().backward()
        found.append([x.grad.double(), *(p.grad.double() for p in made.parameters() if p.grad is not None)])
        made.zero_grad()
    for index, (right, left) in enumerate(zip(*found, strict=True)):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-7, index


@needs_triton
@pytest.mark.parametrize(
    ("graph", "case"),
    [(True, "half"), (False, "half"), (True, SINGLE[-1])],
)
def test_half_precision_is_as_near_to_fp64_as_the_loop(graph, case) -> None:
    rule, settings = (CASES | {"half": (MOMENTUM | {"max_gradient_norm": 0.5}, {})})[case]
    made = memory(rule, settings | {"dim": 32}, 16, 2, 3).to(DEVICE)
    h = text(2, 40, 1).to(torch.bfloat16 if DEVICE == "cuda" else torch.float16)  # the interpreter has no bf16 products
    exact = run(made, h.double(), None, "loop", graph)
    near, loop = (run(made.float(), h, None, kernel, graph) for kernel in ("triton", "loop"))
    for index, (got, plain, right) in enumerate(zip(near, loop, exact, strict=True)):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (got, plain))
        assert error < 2.5 * allowed + 2e-3, (index, error, allowed)
    assert near[2].dtype == torch.float32


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
def test_the_loop_is_left_out(kernel, monkeypatch) -> None:
    made = memory(MOMENTUM, {}, 4, 1, 0).float().to(DEVICE)
    monkeypatch.setattr("titans_ds.memory.mlp.chunks.write_chunk", None)
    with kernels.choice(kernel):
        made(text(1, 9, 0).float(), None, None, None, Pass())
    with kernels.choice("loop"), pytest.raises(TypeError):
        made(text(1, 9, 0).float(), None, None, None, Pass())


REFUSED = {
    "muon": ({"optimizer": "muon"}, {}, 4),
    "three matrices": ({}, {"depth": 3}, 4),
    "one matrix, wide": ({}, {"depth": 1, "dim": 256}, 4),
    "two matrices, wide": ({}, {"dim": 256}, 4),
    "long chunks": ({"max_gradient_norm": 0.5}, {}, 200),
}


@needs_triton
@pytest.mark.parametrize("case", REFUSED)
def test_what_triton_does_not_do_is_refused_or_left_to_pytorch(case) -> None:
    rule, settings, chunk_size = REFUSED[case]
    made, h = memory(rule, settings, chunk_size, 1, 0).float().to(DEVICE), text(1, 9, 0).float()
    with kernels.choice("triton"), pytest.raises(ConfigError, match="TITANS_DS_KERNEL is 'triton', but it does"):
        made(h, None, None, None, Pass())
    read, _, _ = made(h, None, None, None, Pass())
    assert torch.isfinite(read).all()


def test_long_input_stays_finite() -> None:
    made = memory(MOMENTUM | {"max_gradient_norm": 1.0, "gate_scope": "chunk"}, {}, 256, 1, 0).float().to(DEVICE)
    h = text(1, 65_536, 2).float().requires_grad_()
    read, state, _ = made(h, None, None, None, Pass(graph=True))
    (read.square().mean() + state["w0"].square().mean()).backward()
    assert all(torch.isfinite(t).all() for t in (read, state["w0"], state["s1"], h.grad))
