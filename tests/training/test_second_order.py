"""Second order over a window of files: every way to get there gives torch.func's gradients, to 1e-9 in fp64.

The reference (tests/support/slow_window.py) is a GPT-NeoX whose memories are written one token at a time. GPT-NeoX,
since the norms of the other families compute in fp32 whatever they are given.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import titans_ds
from tests.support import slow_window
from tests.support.tiny_models import VOCAB, tiny_base
from titans_ds import preset
from titans_ds.config import GraftConfig
from titans_ds.memory.delta import backends
from titans_ds.memory.mlp import MLPConfig, kernels
from titans_ds.training.build import enable_checkpointing, trainable_names
from titans_ds.training.data.lanes import Step
from titans_ds.training.data.segments import IGNORED, Batch
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import TrainingModule
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import OptimizerSettings, TrainingSettings
from titans_ds.training.speed import offload
from titans_ds.training.step import Carried, commit, run_passes

KINDS = ("two_phase", "window", "through_base")
LENGTHS = [[5, 4], [3, 6], [4, 4]]  # tokens of each file of the window, by lane
RESETS = [[True, True], [False, True], [False, False]]
LEARNED: dict[str, Any] = {
    "dim": 8,
    "write": "token",
    "step_size": 0.5,
    "learn_step_size": True,
    "key_projection": "learned",
    "value_projection": "learned",
    "output_projection": "learned",
    "learn_initial_weights": True,
}


def chunked(name: str, chunk_size: int, **changes: Any) -> MLPConfig:
    """A named memory, learned through and through, in small chunks."""
    memory = preset(name, dim=8, learn_step_size=True, **changes)
    limit = 0.5 if memory.rule.max_gradient_norm else None
    return dataclasses.replace(
        memory, rule=dataclasses.replace(memory.rule, chunk_size=chunk_size, max_gradient_norm=limit)
    )


GRAFTS = {
    "paper": GraftConfig(
        layers="attention", gate_init=0.0, memory=MLPConfig(**{**LEARNED, "write": "pooled", "token_shift": True})
    ),
    "token": GraftConfig(
        layers="attention",
        gate_init=0.0,
        memory=MLPConfig(**{**LEARNED, "depth": 3, "hidden_dim": 6, "inner_steps": 2}),
    ),
    "titans": GraftConfig(layers="attention", gate_init=0.0, memory=chunked("titans", 3, heads=2)),
    "mac": GraftConfig(
        layers="attention",
        gate_init=0.0,
        injection="mac",
        memory_tokens=3,
        memory=MLPConfig(**LEARNED, query_projection="tied"),
    ),
    "ttt_linear": GraftConfig(layers="attention", gate_init=0.0, injection="mag", memory=chunked("ttt_linear", 2)),
}
# Their reference is the rule token by token, in one graph over the window.
DELTA = {
    name: GraftConfig(layers="attention", gate_init=0.0, memory=preset(name, dim=8, heads=2))
    for name in ("delta", "gated_delta")
}


class Files:
    """Random files, the same every time."""

    def __init__(self) -> None:
        self._rng, self._count = np.random.default_rng(0), 0

    def next(self) -> Step:
        """The next file of every lane; in later windows one lane goes on where it was."""
        number, self._count = self._count % len(LENGTHS), self._count + 1
        lengths = np.array(LENGTHS[number])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.where(mask, self._rng.integers(3, VOCAB, mask.shape), 0)
        labels = np.where(mask, self._rng.integers(3, VOCAB, mask.shape), IGNORED)
        reset = np.array(RESETS[number]) & np.array([self._count == 1, True])
        batch = Batch(ids, labels, mask, reset, np.zeros(len(lengths), dtype=np.int64))
        return Step(batch, batch.num_targets)


def make_engine(graft: str, checkpointing: bool = False, train_base: bool = False) -> TorchEngine:
    """The grafted tiny model in fp64."""
    base = tiny_base("gpt_neox", num_hidden_layers=2)
    model = titans_ds.attach(base, (GRAFTS | DELTA)[graft], freeze_base=not train_base)
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)  # nothing at 0, nothing symmetric
    if checkpointing:
        enable_checkpointing(base)
    module = TrainingModule(model.double(), 7).train()
    return TorchEngine(module, make_optimizer(module, OptimizerSettings()), 0.0, torch.device("cpu"))


def settings(kind: str, **options: Any) -> TrainingSettings:
    """A window of three files."""
    return TrainingSettings(order="second", second_order=kind, window=len(LENGTHS), **options)  # type: ignore[arg-type]


def gradients(graft: str, kind: str, steps: int = 1, train_base: bool = False, **options: Any) -> dict[str, Tensor]:
    """By run_passes, as training does; of the last of several windows."""
    wanted = settings(kind, **options)
    engine, files, carried = make_engine(graft, wanted.checkpointing, train_base), Files(), Carried()
    names = trainable_names(engine.module)
    for _ in range(steps):
        engine.module.zero_grad()
        commit(run_passes(engine, files, carried, wanted, 1), carried)
    found = engine.gradients(names)
    assert [n for n, g in found.items() if g is None] == []
    return {n: g for n, g in found.items() if g is not None}


@functools.lru_cache
def reference(graft: str, through_base: bool, train_base: bool) -> dict[str, Tensor]:
    """By torch.func, slowly."""
    files = Files()
    model: Any = make_engine(graft, train_base=train_base).module.model
    found = slow_window.gradients(model, [files.next().batch for _ in LENGTHS], through_base)
    return {f"model.{name.removeprefix('model.')}": g for name, g in found.items()}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient; every one of them must have one."""
    assert actual.keys() == expected.keys()
    assert [n for n, g in expected.items() if not g.any()] == []
    return max((float((actual[n] - g).norm() / g.norm()), n) for n, g in expected.items())


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload the tensors of a tiny model, too."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graft", GRAFTS)
def test_gradients_equal_torch_func(graft: str, kind: str) -> None:
    """For every rule and injection, with every way of keeping activations, the base model trained in one of them."""
    train_base = graft == "token"
    expected = reference(graft, kind == "through_base", train_base)
    for checkpointing, offloaded in itertools.product((False, True), (False, True)):
        backward = "autograd" if offloaded else "derived"
        options = {"checkpointing": checkpointing, "offload_activations": offloaded, "write_backward": backward}
        with kernels.choice("loop" if checkpointing else "auto"):
            error = worst(gradients(graft, kind, train_base=train_base, **options), expected)
        assert error[0] < 1e-9, (options, error)


@pytest.mark.parametrize("offload_activations", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graft", DELTA)
def test_the_delta_rule_in_chunks_has_the_gradients_of_the_rule_token_by_token(
    graft: str, kind: str, checkpointing: bool, offload_activations: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a carried state, with every way of keeping activations; through the base they are others."""
    ours = gradients(graft, kind, 2, checkpointing=checkpointing, offload_activations=offload_activations)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "choose", lambda config, queries: "naive")
        expected = gradients(graft, "through_base" if kind == "through_base" else "window", 2)
    assert worst(ours, expected)[0] < 1e-9


@pytest.mark.parametrize("graft", GRAFTS)
def test_two_phases_equal_one_graph_from_a_carried_state(graft: str) -> None:
    """The second window starts from a state that the first one wrote, its chunks unfinished."""
    expected = gradients(graft, "window", steps=2)
    assert worst(gradients(graft, "two_phase", steps=2, checkpointing=True), expected)[0] < 1e-9
    assert worst(gradients(graft, "two_phase", steps=1), expected)[0] > 1e-3


class Kept:
    """Bytes that autograd keeps for backward passes, now and at most; inside the context."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        """Count; a list that is counted off when the graph lets go of it."""
        box = Box([tensor.detach()])
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(box, self._drop, tensor.nbytes)
        return box

    def _drop(self, size: int) -> None:
        self.now -= size


class Box(list[Tensor]):
    """A list with weak references."""


def kept_bytes(kind: str | None) -> int:
    """The most that the graph of one optimizer step holds; None for first order."""
    wanted = settings(kind) if kind else TrainingSettings(order="first", window=len(LENGTHS))
    engine, kept = make_engine("token"), Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box[0]):
        run_passes(engine, Files(), Carried(), wanted, 1)
    assert kept.now == 0
    return kept.most


def test_two_phases_keep_the_base_graph_of_one_file() -> None:
    """About as much as first order, whose backward passes come after each file; one graph keeps the window's files."""
    first = kept_bytes(None)
    assert kept_bytes("two_phase") < 1.25 * first
    assert kept_bytes("window") > 2.5 * first
