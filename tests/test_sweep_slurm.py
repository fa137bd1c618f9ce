"""The Slurm executor on a real cluster of virtual nodes on this machine: arrays, a dead node, ranks on two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.sweeping.results import read_results
from launch.sweeping.study import Study
from tests.clean_environment import without_ranks
from tests.packed_corpora import random_repos, write_packed
from tests.slurm_cluster import Cluster, slurm_cluster, why_not
from tests.tiny_models import tiny_base

ROOT = Path(__file__).resolve().parent.parent
REASON = why_not()
NOW = "additional_parameters={no-requeue: true}"  # Slurm holds a job back for two minutes before it runs it again
# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm cluster here: {REASON}"),
    pytest.mark.flaky(reruns=2, reruns_delay=5),
]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of two nodes, one of which a test before may have ended."""
    with slurm_cluster(tmp_path_factory.mktemp("s") / "c", nodes=2) as running:  # short: it holds a socket
        yield running


def write_space(folder: Path, deepspeed: str | None, steps: int, seeds: list[int]) -> Path:
    """A corpus, a base model, a configuration, and a grid over seeds."""
    write_packed(folder / "corpus", {"train": random_repos(6, 1), "validation": random_repos(4, 2, least=12)})
    tiny_base("llama", num_hidden_layers=2).save_pretrained(folder / "base")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 2},
        "graft": {"segment_tokens": 8, "memory": {"dim": 8}},
        "training": {"steps": steps},
        "evaluation": {"interval": steps, "repositories": 4, "group_size": 2, "max_segments": 3},
        "checkpoint": {"interval": 10},
        "deepspeed": deepspeed,
        "run": {"tensorboard": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    space = {"config": "tiny.yaml", "parameters": {"training.seed": seeds}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder / "space.yaml"


def start(cluster: Cluster, folder: Path, space: Path, *options: str) -> subprocess.Popen[str]:
    """launch/sweep.py on the login node."""
    command = [sys.executable, str(ROOT / "launch/sweep.py"), "--space", str(space), "--study", str(folder / "study")]
    environment = {**without_ranks(OMP_NUM_THREADS="1"), **cluster.environment}
    return subprocess.Popen(
        [*command, "--executor", "slurm", *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Any, seconds: float = 300) -> Any:
    """Its first value that is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.05)
    return value


def states_of(study: Path) -> list[list[str]]:
    """How the attempts ended, trial by trial."""
    return [
        [(result.trial.claims.ended(n) or {"state": "?"})["state"] for n in result.trial.claims.numbers()]
        for result in read_results(Study(study))
    ]


def logs_of(study: Path) -> str:
    return "".join(p.read_text()[-2000:] for p in [*study.glob("slurm/*.err"), *study.glob("slurm/*.out")])


def test_a_trial_of_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Each task of Slurm's is a rank of one DeepSpeed run."""
    space, study = write_space(tmp_path, str(ROOT / "ds_configs/zero2.json"), 20, [0]), tmp_path / "study"
    running = start(cluster, tmp_path, space, "--slurm", "nodes=2", "ntasks_per_node=1", "time=10")
    text, _ = running.communicate(timeout=600)
    assert running.returncode == 0, text + logs_of(study)
    assert states_of(study) == [["complete"]]
    marker = json.loads((study / "trials/0000/run/checkpoints/step_0000020/checkpoint.json").read_text())
    assert marker["world_size"] == 2


def test_a_node_dies_and_so_does_the_submitting_process(cluster: Cluster, tmp_path: Path) -> None:
    """Its trial goes on from the checkpoint on the other node; every trial ends once."""
    space, study = write_space(tmp_path, None, 600, [0, 1, 2]), tmp_path / "study"
    options = ["--slots", "2", "--lease", "8", "--slurm", "cpus_per_task=2", "time=10", NOW]
    first = start(cluster, tmp_path, space, *options)
    saved = wait_for(lambda: next(iter(study.glob("trials/*/run/checkpoints/step_*")), None))
    trial = saved.parents[2]
    first.kill()
    first.wait()
    claim = json.loads((trial / "attempts/0001.claim.json").read_text())
    node = cluster.run("squeue", "--noheader", "--job", claim["details"]["slot"].split()[1], "--format", "%N").strip()
    assert node in ("node1", "node2")
    cluster.stop_node(node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    second = start(cluster, tmp_path, space, *options)
    text, _ = second.communicate(timeout=600)
    assert second.returncode == 0, text + logs_of(study)
    results = read_results(Study(study))
    assert [r.state for r in results] == ["complete"] * 3
    assert next(s for s in states_of(study) if len(s) > 1) == ["lost", "complete"]
    assert [s[-1] for s in states_of(study)] == ["complete"] * 3
    assert "going on from" in (trial / "attempts/0002.log").read_text()
