"""Which fast path runs, and that a Triton kernel that is wrong on a device is found out and left alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.kernel_memories import CASES, H, memory
from titans_ds.config import RuleConfig
from titans_ds.errors import ConfigError
from titans_ds.memory import Access, kernels
from titans_ds.memory.kernels import launch, self_check
from titans_ds.memory.network import Form
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bf16 products


def passes(semantics: str, case: str, fused: bool = True) -> bool:
    self_check._passes.cache_clear()
    rule = RuleConfig(chunk_size=9, chunk_semantics=semantics, **CASES[case][0])
    weights = (torch.zeros(1, 20, 16, device=DEVICE), torch.zeros(1, 16, 20, device=DEVICE))
    keys = torch.zeros(1, 2, 9, 16, dtype=HALF, device=DEVICE)
    return self_check.passes(keys, Fast(weights), Inner(rule, Form(), torch.ones(2, device=DEVICE), 1), fused)


@needs_triton
@pytest.mark.parametrize("semantics", ["chunk", "span"])
@pytest.mark.parametrize("case", ["titans", "limited by chunk", "plain"])
def test_the_kernels_pass(semantics, case, caplog) -> None:
    assert passes(semantics, case)
    assert caplog.text == ""


@needs_triton
def test_the_kernels_of_wide_heads_pass(monkeypatch, caplog) -> None:
    assert passes("chunk", "constant momentum", fused=False)
    assert passes("chunk", "limited", fused=False)
    assert passes("span", "titans", fused=False)
    assert caplog.text == ""
    monkeypatch.setattr("titans_ds.memory.kernels.wide.LOSSES", {"l2": 1})
    assert not passes("chunk", "constant momentum", fused=False)
    assert "PyTorch does it instead" in caplog.text


def passes_one_matrix(normed: bool) -> bool:
    self_check._passes.cache_clear()
    rule = RuleConfig(chunk_size=9, **CASES["linear memory, momentum"][0])
    keys = torch.zeros(1, 2, 9, 16, dtype=HALF, device=DEVICE)
    norm = (torch.ones(1, 1, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE))
    inner = Inner(rule, Form(norm=norm if normed else None), torch.ones(1, device=DEVICE), 1)
    return self_check.passes(keys, Fast((torch.zeros(1, 16, 16, device=DEVICE),)), inner, True)


@needs_triton
@pytest.mark.parametrize("normed", [True, False])
def test_the_kernels_of_one_matrix_pass(normed, monkeypatch, caplog) -> None:
    assert passes_one_matrix(normed)
    assert caplog.text == ""
    monkeypatch.setattr("titans_ds.memory.kernels.launch.LOSSES", {"l2": 1})
    assert not passes_one_matrix(normed)
    assert "PyTorch does it instead" in caplog.text


@needs_triton
def test_one_matrix_is_written_by_a_kernel_or_the_loop(monkeypatch) -> None:
    keys = torch.zeros(1, 3, 4, 16, dtype=HALF, device=DEVICE)
    fast = Fast((torch.zeros(1, 16, 16, device=DEVICE),))
    inner = Inner(RuleConfig(chunk_size=4), Form(), torch.ones(1, device=DEVICE), 1)
    for name, found in (("triton", kernels.Engine(triton=True, fused=True)), ("torch", None), ("loop", None)):
        with kernels.choice(name):
            assert kernels.engine(fast, inner, keys) == found


@needs_triton
def test_wide_heads_have_kernels_of_their_own() -> None:
    keys = torch.zeros(1, 3, 4, 256, dtype=HALF, device=DEVICE)
    fast = Fast((torch.zeros(1, 256, 256, device=DEVICE),) * 2)
    inner = Inner(RuleConfig(chunk_size=4, **CASES["titans"][0]), Form(), torch.ones(2, device=DEVICE), 1)
    with kernels.choice("triton"):
        assert kernels.engine(fast, inner, keys) == kernels.Engine(triton=True, fused=False)


@needs_triton
def test_the_check_is_apart_from_the_call_that_asks_for_it(caplog) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise AssertionError("saved under the caller's hooks")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert passes("chunk", "plain")
    with torch.inference_mode():
        assert passes("chunk", "plain")
    assert caplog.text == ""


@needs_triton
@pytest.mark.parametrize("semantics", ["chunk", "span"])
def test_a_wrong_kernel_does_not_pass(semantics, monkeypatch, caplog) -> None:
    target = (
        "titans_ds.memory.kernels.launch.numbers" if semantics == "span" else "titans_ds.memory.kernels.chunk.numbers"
    )
    right = launch.numbers
    monkeypatch.setattr(target, lambda form, norm: (*right(form, norm)[:2], 1.2))  # of the hidden layer's scale
    assert not passes(semantics, "titans")
    assert "PyTorch does it instead" in caplog.text


@needs_triton
def test_a_kernel_that_does_not_compile_does_not_pass(monkeypatch, caplog) -> None:
    monkeypatch.setattr("titans_ds.memory.kernels.chunk.options", lambda *_: {"no_such_argument": 1})
    assert not passes("chunk", "plain")
    assert "failed; PyTorch does it instead" in caplog.text


def test_on_a_cpu_auto_is_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(self_check, "passes", None)  # not even asked
    made = memory(*CASES["titans"], 4, 1, 0, "chunk").float()
    keys = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    inner = Inner(made.config.rule, Form(), torch.ones(2), 1)
    fast = Fast((torch.zeros(1, 4, 4),) * 2)
    assert kernels.engine(fast, inner, keys) == kernels.Engine(triton=False, fused=False)
    read, _, _ = made(torch.randn(1, 9, H), None, None, None, Access(write=True))
    assert torch.isfinite(read).all()


def test_the_environment_chooses(monkeypatch) -> None:
    monkeypatch.setenv("TITANS_DS_KERNEL", "fast")
    with pytest.raises(ConfigError, match="expected one of auto, loop, torch, triton"):
        kernels.chosen()
