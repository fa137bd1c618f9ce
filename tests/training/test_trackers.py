"""Trackers: accelerate's, by themselves; named, installed, and purged where a run goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from launch import train
from titans_ds.errors import ConfigError
from titans_ds.training.metrics import MetricsWriter
from titans_ds.training.settings import RunSettings
from titans_ds.training.trackers import TRACKERS, Trackers, check_installed

# A tracker's package as far as accelerate uses it: what is logged stands in the file calls.jsonl.
FAKE = """
import json, pathlib
def init(**arguments):
    return Run().note("init", arguments)
class Run:
    def note(self, call, values):
        with (pathlib.Path(__file__).parent / "calls.jsonl").open("a") as file:
            file.write(json.dumps([call, values]) + "\\n")
        return self
    def log(self, values, step=None):
        self.note("log", {**values, "step": step})
    def finish(self):
        self.note("finish", {})
"""


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What accelerate's PartialState shares: nothing, whatever another test has started."""
    shared: dict[str, Any] = {}
    monkeypatch.setattr(PartialState, "_shared_state", shared)
    return shared


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs a package `trackio`; gives the file of its calls."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    return tmp_path / "packages" / "calls.jsonl"


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_is_the_default_and_hides_what_came_after_the_step_that_a_run_goes_on_from(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    settings = RunSettings()
    assert settings.trackers == ["tensorboard"]
    writer = MetricsWriter(tmp_path, settings)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": float(step), "gate": {"2": 0.5}, "finite_state": True, "skipped": None})
    writer.close()
    resumed = MetricsWriter(tmp_path, settings, resumed=1)
    resumed.write("train", 2, {"loss": 20.0})
    resumed.close()
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 1.0), (2, 20.0)]
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "train/gate/2")] == [1]
    assert state == {}  # which would have started what DeepSpeed starts
    assert not torch.distributed.is_initialized()


def test_another_tracker_gets_the_same_values_and_a_name_of_its_own_for_a_resumed_run(
    tmp_path: Path, calls: Path, state: dict[str, Any]
) -> None:
    settings = RunSettings(trackers=["trackio", "tensorboard"], project="mine")
    for resumed in (None, 1):
        (tmp_path / "run").mkdir(exist_ok=True)
        writer = MetricsWriter(tmp_path / "run", settings, resumed)
        writer.write("train", 2, {"loss": 1.5, "gate": {"2": 0.5}, "text": "no number"})
        writer.close()
    logged: list[Any] = [json.loads(line) for line in calls.read_text().splitlines()]
    values = {"train/loss": 1.5, "train/gate/2": 0.5, "step": 2}
    expected = [
        call
        for name in ("run", "run-from-1")
        for call in (["init", {"project": "mine", "name": name}], ["log", values], ["finish", {}])
    ]
    assert logged == expected
    assert len(scalars(tmp_path / "run" / "tensorboard", "train/loss")) == 1
    assert state == {}


def test_no_trackers_leave_metrics_jsonl(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, RunSettings(trackers=[]))
    writer.write("train", 1, {"loss": 2.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_names_are_accelerates_and_others_are_refused_with_the_nearest() -> None:
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    with pytest.raises(ConfigError, match=r"run\.trackers names 'wandbb', .*did you mean 'wandb'"):
        RunSettings(trackers=["wandbb"])


def test_a_package_that_is_missing_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_installed(["tensorboard"])
    find, missing = importlib.util.find_spec, ("wandb", "comet_ml")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    with pytest.raises(ConfigError, match="comet_ml, whose package is not installed: pip install comet-ml"):
        check_installed(["comet_ml"])
    config = Path(train.__file__).parent / "configs" / "quickstart.yaml"
    assert train.main(["--config", str(config), f"--run.dir={tmp_path / 'run'}", "--run.trackers=[wandb]"]) == 2
    assert "error: run.trackers names wandb, whose package is not installed: pip install wandb" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_can_not_start_is_named(tmp_path: Path, calls: Path) -> None:
    (calls.parent / "trackio.py").write_text("def init(**_):\n    raise RuntimeError('no API key')\n")
    with pytest.raises(ConfigError, match=r"the tracker trackio can't start \(no API key\); log in"):
        Trackers(["trackio"], "mine", tmp_path)
