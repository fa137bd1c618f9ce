"""On a GPU: memories replayed as CUDA graphs, in training's shapes and orders. Skipped where there is none."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.kernel_memories import CASES, H, memory
from tests.training import test_second_order as windows
from titans_ds.cuda_graphs.capture import CudaCapture, capture_of
from titans_ds.memory import LayerState, Pass
from titans_ds.memory import graphs as memory_graphs
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.memory.mlp import FeatureConfig, MLPConfig, MLPMemory, RuleConfig, kernels
from titans_ds.training.engine import TorchEngine
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import OptimizerSettings
from titans_ds.training.step import Carried, commit, run_passes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
GPU = torch.device("cuda", 0)
GATES = {"token_step_size": True, "token_momentum": True, "token_forget_gate": True, "forget_gate": 0.01}


@pytest.fixture(autouse=True)
def nothing_falls_back(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
    assert [r.message for r in caplog.records if "graphs" in r.message] == []


def titans(heads: int, seed: int = 0, chunk_size: int | None = 64) -> MLPMemory:
    """128 wide; with two heads Triton's kernels are used in bf16."""
    config = MLPConfig(
        dim=128,
        heads=heads,
        write="token",
        step_size=0.05,
        key_projection="learned",
        value_projection="learned",
        output_projection="learned",
        learn_initial_weights=True,
        features=FeatureConfig(activation="silu", normalize_keys=True, convolution=True),
        rule=RuleConfig(chunk_size=chunk_size, optimizer="momentum", **GATES),  # type: ignore[arg-type]
    )
    return MLPMemory(256, config, seed).to(GPU)


def text(number: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)  # not that of a projection
    h = torch.randn(2, 300, 256, generator=generator).to(GPU, dtype)
    return h, (torch.rand(2, 300, generator=generator) < 0.8).to(GPU)


def window(layers: list[MLPMemory], number: int, dtype: torch.dtype, graph: bool, kept: bool) -> list[torch.Tensor]:
    """Two texts through all layers, and back: reads, states, and gradients."""
    states: list[LayerState | None] = [None] * len(layers)
    plan, found = Pass(graph=graph), []
    leaves = []
    total = torch.zeros((), device=GPU)
    for part in range(2):
        h, mask = text(2 * number + part, dtype)
        leaves.append(h.requires_grad_())
        for index, layer in enumerate(layers):
            given = (h, states[index], mask, None, plan)
            read, states[index], _ = layer(*given) if kept else checkpoint(layer, *given, use_reentrant=False)
            h = h + read
            total = total + read.float().square().mean()
        found.append(h.detach())
    total.backward()
    found += [t.detach() for state in states if state is not None for t in state.values()]
    found += [t.grad for t in leaves if t.grad is not None]
    for layer in layers:
        found += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
    return found


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert [t.shape for t in found] == [t.shape for t in expected]
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("heads", "dtype", "graph"),
    [
        (2, torch.bfloat16, True),
        (2, torch.bfloat16, False),
        (1, torch.float32, True),
    ],
)
def test_windows_of_layers(heads: int, dtype: torch.dtype, graph: bool, kept: bool) -> None:
    """New texts and changed parameters every time; all calls of a window before its backward."""
    layers = [titans(heads, seed) for seed in range(3)]
    plain = copy.deepcopy(layers)
    for layer in layers:
        layer.graphs = MemoryGraphs("auto")
    worst = []
    for number in range(3):
        expected = window(plain, number, dtype, graph, kept)
        worst.append(error(window(layers, number, dtype, graph, kept), expected))
        with torch.no_grad():
            for a, b in zip(layers, plain, strict=True):
                for p, q in zip(a.parameters(), b.parameters(), strict=True):
                    p.mul_(0.98)
                    q.mul_(0.98)
    print(f"{heads} {dtype} graph {graph}: {max(worst):.1e}")
    assert max(worst) < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert all(len(layer.graphs._graphs._pairs) == 2 for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and both."""
    found = []
    for tokens in (300, 600):
        monkeypatch.setattr(memory_graphs, "SLICE_TOKENS", tokens)
        layers = [titans(2, chunk_size=None)]
        layers[0].graphs = MemoryGraphs("auto")
        found.append([window(layers, number, dtype, True, True) for number in range(2)])
    for sliced, whole in zip(*found, strict=True):
        assert error(sliced, whole) < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon", *CASES])
def test_every_rule_is_captured(name: str) -> None:
    loops = {
        "adamw": ({"optimizer": "adamw"}, {"step_size": 0.01}),
        "muon": ({"optimizer": "muon"}, {"step_size": 0.01, "learn_step_size": False}),
    }
    made = memory(*(loops.get(name) or CASES[name]), 4, 2, 5).to(GPU)
    plan, found = Pass(graph=True, stats=True), []
    for choice in ("off", "on", "on"):
        made.graphs = MemoryGraphs(choice)  # type: ignore[arg-type]
        h = torch.randn(2, 11, H, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(GPU)
        h.requires_grad_()
        mask = (torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.7).to(GPU)
        with kernels.choice("auto"):
            read, state, stats = made(h, None, mask, None, plan)
            (read.square().sum() + sum(t.square().sum() for t in state.values() if t.requires_grad)).backward()
        found.append(
            [
                read,
                *state.values(),
                *stats.values(),
                h.grad,
                *(p.grad.clone() for p in made.parameters() if p.grad is not None),
            ]
        )
        made.zero_grad()
    for again in found[1:]:
        assert error(again, found[0]) < 1e-9


@pytest.mark.parametrize("kind", windows.KINDS)
def test_training(kind: str) -> None:
    """Two steps, recomputed and offloaded, against torch.func's gradients."""
    found = []
    for choice in ("off", "on"):
        engine, files, carried = windows.make_engine("titans", checkpointing=True), windows.Files(), Carried()
        engine.module.to(GPU)
        engine.module.model.use_memory_graphs(choice)
        engine = TorchEngine(engine.module, make_optimizer(engine.module, OptimizerSettings()), 0.0, GPU)
        names = windows.trainable_names(engine.module)
        settings = windows.settings(kind, checkpointing=True, offload_activations=True)
        for _ in range(2):
            engine.module.zero_grad()
            commit(run_passes(engine, files, carried, settings, 1), carried)
        found.append([g for g in engine.gradients(names).values() if g is not None])
    assert error(found[1], found[0]) < 1e-8


def test_an_older_graph_in_a_cycle_does_not_break_a_capture() -> None:
    """Python collects them whenever enough objects were made; no graph can be destroyed while another is captured."""
    capture, total = CudaCapture(GPU), torch.zeros((), device=GPU)
    kept: list[Any] = []

    def counts() -> None:
        if kept:
            kept[0].append(kept[0])
            kept.clear()
        objects: list[Any] = [[] for _ in range(100_000)]
        total.add_(len(objects))

    for _ in range(3):
        capture.warm_up(counts)
        older, newer = (capture.record(counts) for _ in range(2))
        kept.append([older])
        del older
        again = capture.record(counts)  # lets go of the older one
        assert newer is not again
    total.zero_()
    again()
    assert total.item() == 100_000


def test_memory_comes_back() -> None:
    """Pool and buffers live as long as the memories that use them."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    layers = [titans(2, seed) for seed in range(2)]
    for layer in layers:
        layer.graphs = MemoryGraphs("auto")
    window(layers, 0, torch.bfloat16, True, True)
    first = capture_of(GPU)
    assert first is layers[0].graphs._where is layers[1].graphs._where
    del layers, layer, first
    gc.collect()
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    assert [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)] == []
    assert torch.cuda.memory_allocated() - before < 100 * 2**20  # workspaces of libraries stay
