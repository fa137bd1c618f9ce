"""Which fast path runs, and that a Triton kernel that is wrong on a device is found out and left alone."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.support.kernel_memories import CASES, H, memory
from titans_ds.errors import ConfigError
from titans_ds.memory import Pass
from titans_ds.memory.mlp import RuleConfig, kernels
from titans_ds.memory.mlp.kernels import self_check, writes
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bf16 products


def twice(d: torch.Tensor | None, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a backward pass starts from, times two."""
    return 2 * writes.at_end(d, states, dtype)


def passes(case: str) -> bool:
    self_check._passes.cache_clear()
    rule = RuleConfig(chunk_size=9, **CASES[case][0])
    weights = (torch.zeros(1, 20, 16, device=DEVICE), torch.zeros(1, 16, 20, device=DEVICE))
    keys = torch.zeros(1, 2, 9, 16, dtype=HALF, device=DEVICE)
    return self_check.passes(keys, Fast(weights), Inner(rule, Form(), torch.ones(2, device=DEVICE), 1))


@needs_triton
@pytest.mark.parametrize("case", ["titans", "limited by chunk", "plain"])
def test_the_kernels_pass(case, caplog) -> None:
    assert passes(case)
    assert caplog.text == ""


@needs_triton
def test_a_kernel_that_is_off_is_left_alone(monkeypatch, caplog) -> None:
    assert passes("constant momentum")
    assert passes("limited")
    assert caplog.text == ""
    monkeypatch.setattr("titans_ds.memory.mlp.kernels.chunkwise.at_end", twice)
    assert not passes("constant momentum")
    assert "PyTorch does it instead" in caplog.text


def passes_one_matrix(normed: bool) -> bool:
    self_check._passes.cache_clear()
    rule = RuleConfig(chunk_size=9, **CASES["linear memory, momentum"][0])
    keys = torch.zeros(1, 2, 9, 16, dtype=HALF, device=DEVICE)
    norm = (torch.ones(1, 1, 16, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE))
    inner = Inner(rule, Form(norm=norm if normed else None), torch.ones(1, device=DEVICE), 1)
    return self_check.passes(keys, Fast((torch.zeros(1, 16, 16, device=DEVICE),)), inner)


@needs_triton
@pytest.mark.parametrize("normed", [True, False])
def test_the_kernels_of_one_matrix_pass(normed, monkeypatch, caplog) -> None:
    assert passes_one_matrix(normed)
    assert caplog.text == ""
    monkeypatch.setattr("titans_ds.memory.mlp.kernels.single.at_end", twice)
    assert not passes_one_matrix(normed)
    assert "PyTorch does it instead" in caplog.text


@needs_triton
def test_one_matrix_is_written_by_a_kernel_or_the_loop(monkeypatch) -> None:
    keys = torch.zeros(1, 3, 4, 16, dtype=HALF, device=DEVICE)
    fast = Fast((torch.zeros(1, 16, 16, device=DEVICE),))
    inner = Inner(RuleConfig(chunk_size=4), Form(), torch.ones(1, device=DEVICE), 1)
    for name, found in (("triton", "triton"), ("torch", "loop"), ("loop", "loop")):
        with kernels.choice(name):
            assert kernels.backend(fast, inner, keys) == found


@needs_triton
def test_heads_wider_than_a_program_holds_are_written_by_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(self_check, "passes", None)  # not even asked
    keys = torch.zeros(1, 3, 4, 256, dtype=HALF, device=DEVICE)
    fast = Fast((torch.zeros(1, 256, 256, device=DEVICE),) * 2)
    inner = Inner(RuleConfig(chunk_size=4, **CASES["titans"][0]), Form(), torch.ones(2, device=DEVICE), 1)
    assert kernels.backend(fast, inner, keys) == "torch"
    with kernels.choice("triton"), pytest.raises(ConfigError, match="heads of a width of up to 128"):
        kernels.backend(fast, inner, keys)


@needs_triton
def test_the_check_is_apart_from_the_call_that_asks_for_it(caplog) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise AssertionError("saved under the caller's hooks")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert passes("plain")
    with torch.inference_mode():
        assert passes("plain")
    assert caplog.text == ""


@needs_triton
def test_a_wrong_kernel_does_not_pass(monkeypatch, caplog) -> None:
    # Another factor of the hidden layer.
    monkeypatch.setattr("titans_ds.memory.mlp.kernels.chunkwise.numbers", lambda form, norm: (norm or 0.0, 1.2))
    assert not passes("titans")
    assert "PyTorch does it instead" in caplog.text


@needs_triton
def test_a_kernel_that_does_not_compile_does_not_pass(monkeypatch, caplog) -> None:
    monkeypatch.setattr("titans_ds.memory.mlp.kernels.chunkwise.options", lambda *_: {"no_such_argument": 1})
    assert not passes("plain")
    assert "failed; PyTorch does it instead" in caplog.text


def test_on_a_cpu_auto_is_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(self_check, "passes", None)  # not even asked
    made = memory(*CASES["titans"], 4, 1, 0).float()
    keys = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)
    inner = Inner(made.config.rule, Form(), torch.ones(2), 1)
    fast = Fast((torch.zeros(1, 4, 4),) * 2)
    assert kernels.backend(fast, inner, keys) == "torch"
    read, _, _ = made(torch.randn(1, 9, H), None, None, None, Pass())
    assert torch.isfinite(read).all()


def test_the_environment_chooses(monkeypatch) -> None:
    monkeypatch.setenv("TITANS_DS_KERNEL", "fast")
    with pytest.raises(ConfigError, match="expected one of auto, loop, torch, triton"):
        kernels.chosen()
