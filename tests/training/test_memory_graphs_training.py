"""Training with memories replayed as graphs gives the gradients of training without, in every order and scheme."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

import titans_ds
from launch.arguments import parse
from tests.support.eager_capture import EagerCapture
from tests.support.tiny_models import tiny_base, token_ids
from tests.training import test_second_order as windows
from titans_ds.errors import ConfigError
from titans_ds.memory import graphs as memory_graphs
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.training.build import make_module
from titans_ds.training.settings import TrainingSettings
from titans_ds.training.speed import offload
from titans_ds.training.step import Carried, commit, run_passes

ENOUGH = ["--model.base=B", "--data.corpus=C", "--graft.memory.dim=8"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> EagerCapture:
    """Every memory made from here on is replayed."""
    made = EagerCapture()
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    monkeypatch.setattr(memory_graphs, "MemoryGraphs", lambda: MemoryGraphs("on", lambda device: made))
    return made


@pytest.mark.parametrize("kind", windows.KINDS)
@pytest.mark.parametrize("graft", windows.GRAFTS)
def test_second_order(graft: str, kind: str, capture: EagerCapture, caplog: pytest.LogCaptureFixture) -> None:
    """Windows of files from a carried state, with every way of keeping activations."""
    expected = windows.reference(graft, kind == "through_base", False)
    for checkpointing, offloaded in itertools.product((False, True), (False, True)):
        options = {"checkpointing": checkpointing, "offload_activations": offloaded}
        before = capture.replays
        with caplog.at_level(logging.WARNING):
            assert windows.worst(windows.gradients(graft, kind, **options), expected)[0] < 1e-9
        assert capture.replays > before
    assert [r for r in caplog.records if "graphs" in r.message] == []


@pytest.mark.parametrize("checkpointing", [True, False])
def test_first_order(checkpointing: bool, capture: EagerCapture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a memory without chunks whose writes learn nothing."""

    def found() -> dict[str, torch.Tensor | None]:
        engine, files, carried = windows.make_engine("ttt_linear", checkpointing), windows.Files(), Carried()
        names = windows.trainable_names(engine.module)
        settings = TrainingSettings(order="first", window=3, accumulation=2, checkpointing=checkpointing)
        for _ in range(2):
            commit(run_passes(engine, files, carried, settings, 1), carried)
        return engine.gradients(names)

    replayed = found()
    assert capture.replays > 20
    monkeypatch.undo()
    plain = found()
    assert {n for n, g in plain.items() if g is None} == {n for n, g in replayed.items() if g is None}
    for name, g in plain.items():
        if g is not None:
            torch.testing.assert_close(replayed[name], g, rtol=1e-9, atol=1e-12)


def test_priming(capture: EagerCapture) -> None:
    model = titans_ds.attach(tiny_base("llama"), windows.GRAFTS["titans"])
    ids = token_ids(2, 30)
    states = []
    for _ in range(3):
        with model.memory_session(2) as memory:
            model.prime(ids, memory)
            states.append(memory.state)
    assert capture.recorded == len(model.memories)
    assert capture.replays == 2 * len(model.memories)
    model.use_memory_graphs("off")
    with model.memory_session(2) as memory:
        model.prime(ids, memory)
    for state in states:
        for index, layer in memory.state.layers.items():
            for name, t in layer.items():
                torch.testing.assert_close(state.layers[index][name], t)


def test_the_setting_reaches_every_memory() -> None:
    for choice in ("auto", "on", "off"):
        config, _ = parse([*ENOUGH, f"--training.memory_graphs={choice}"])
        module = make_module(tiny_base("llama"), config)
        assert {m.memory.graphs.choice for m in module.model.memories.values()} == {choice}
    assert TrainingSettings().memory_graphs == "auto"
    with pytest.raises(ConfigError, match=r"training\.memory_graphs"):
        TrainingSettings(memory_graphs="yes")  # type: ignore[arg-type]
