"""launch/configs/v3_second_order.yaml, run as it is on a tiny base: every way of second order through the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launch import train
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base

CONFIG = Path(__file__).resolve().parents[2] / "launch" / "configs" / "v3_second_order.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a base model."""
    folder = tmp_path_factory.mktemp("place")
    write_packed(folder / "corpus", {"train": random_repos(8, seed=1, files=4, most=15)})
    tiny_base("qwen3_5").save_pretrained(folder / "base")
    return folder


def losses(place: Path, name: str, *options: str) -> list[float]:
    """Of the steps of a run on plain torch."""
    settings: dict[str, Any] = {
        "model.base": place / "base",
        "model.dtype": "float32",
        "data.corpus": place / "corpus",
        "data.num_lanes": 4,
        "graft.segment_tokens": 16,
        "graft.memory.dim": 8,
        "graft.memory.step_size": 0.5,
        "optimizer.lr": 0.01,
        "optimizer.warmup_steps": 0,
        "training.steps": 4,
        "training.log_interval": 1,
        "evaluation.interval": 0,
        "checkpoint.interval": 0,
        "deepspeed": "null",
        "run.dir": place / name,
        "run.trackers": "[]",
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    assert train.main(["--config", str(CONFIG), *arguments, *options]) == 0
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_every_way_trains_what_only_writes_use(place: Path) -> None:
    """Two phases take the steps of one graph, with everything in host memory too; through the base they are others."""
    two_phase = losses(place, "two_phase")
    assert losses(place, "window", "--training.second_order=window") == pytest.approx(two_phase, abs=2e-5)
    elsewhere = losses(place, "host", "--training.offload_activations=true", "--training.write_backward=autograd")
    assert elsewhere == pytest.approx(two_phase, abs=2e-5)
    through = losses(place, "through", "--training.second_order=through_base")
    assert through[0] == pytest.approx(two_phase[0], abs=1e-5)
    assert through[-1] != pytest.approx(two_phase[-1], abs=1e-6)
    trained, other = (load_file(place / n / "adapter" / "titans_memory.safetensors") for n in ("two_phase", "through"))
    learned = [n for n in trained if "value_projection" in n or "log_step_sizes" in n or "initial_w" in n]
    assert len(learned) == 2 * 4
    assert all(not trained[n].equal(other[n]) for n in learned)
