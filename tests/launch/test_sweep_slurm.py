"""Sweep processes as tasks of a real Slurm cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.sweeping.study import Study
from tests.support.clean_environment import without_ranks
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.slurm_cluster import Cluster, slurm_cluster
from tests.support.slurm_cluster import why_not as why_no_slurm
from tests.support.sweep_processes import ROOT, TRAINER, wait_for, write_space
from tests.support.tiny_models import tiny_base

SWEEP = str(ROOT / "launch" / "sweep.py")
NO_SLURM = why_no_slurm()

# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = [pytest.mark.long, pytest.mark.flaky(reruns=1, reruns_delay=5)]


def database(folder: Path) -> str:
    """Of one machine in truth, which these nodes share."""
    return f"sqlite:///{folder / 'sweeps.db'}"


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("s") / "c", nodes=2) as running:  # short: it holds a socket
        yield running


@pytest.mark.skipif(NO_SLURM is not None, reason=f"no Slurm cluster here: {NO_SLURM}")
def test_tasks_of_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """A node dies together with the submitting process: its trial goes on elsewhere. Then a trial over two nodes."""
    brake = tmp_path / "brake"
    brake.write_text("5")
    environment = {**without_ranks(OMP_NUM_THREADS="1", SWEEP_TRAINER_BRAKE=str(brake)), **cluster.environment}
    settings = {"training.steps": 60}
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0, 1, 2]}, settings=settings)
    study = tmp_path / "study"
    command = [sys.executable, SWEEP, "--study", str(study), "--storage", database(tmp_path), "--executor", "slurm"]
    more = "additional_parameters={no-requeue: true}"  # Slurm holds a job back for two minutes before it runs it again
    options = ["--space", str(space), "--slots", "2", "--lease", "8", "--launcher", TRAINER]
    slurm = ["--slurm", "cpus_per_task=2", "time=10", more]
    first = subprocess.Popen([*command, *options, *slurm], env=environment, cwd=tmp_path)
    wait_for(lambda: len(list(study.glob("trials/*/run/checkpoint.json"))) == 2, 300)
    first.kill()
    first.wait()
    cluster.stop_node("node1")
    cluster.run("scontrol", "update", "nodename=node1", "state=down", "reason=test")
    brake.unlink()
    second = subprocess.run([*command, *options, *slurm], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    rows = Study(study).rows()
    assert Counter(row.state for row in rows) == {"complete": 3}
    assert max(row.attempts for row in rows) >= 2  # that of the node that died
    for row in rows:
        steps = [int(step) for step in (row.folder / "run/steps.log").read_text().split()]
        assert sorted(set(steps)) == list(range(1, 61))
        assert len(steps) < 60 + row.attempts


@pytest.mark.skipif(NO_SLURM is not None, reason=f"no Slurm cluster here: {NO_SLURM}")
def test_a_trial_over_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """The launcher makes it one: here srun, within the nodes of the task."""
    write_packed(tmp_path / "corpus", {"train": random_repos(6, 1), "validation": random_repos(4, 2, least=12)})
    tiny_base("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    config = {
        "model": {"base": str(tmp_path / "base")},
        "data": {"corpus": str(tmp_path / "corpus"), "num_lanes": 2},
        "graft": {"segment_tokens": 8, "memory": {"dim": 8}},
        "training": {"steps": 10},
        "evaluation": {"interval": 10, "repositories": 4, "group_size": 2, "max_segments": 3},
        "checkpoint": {"interval": 10},
        "deepspeed": str(ROOT / "ds_configs/zero2.json"),
        "run": {"trackers": []},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0]}, config="tiny.yaml")
    study = tmp_path / "study"
    command = [sys.executable, SWEEP, "--space", str(space), "--study", str(study), "--storage", database(tmp_path)]
    command += ["--executor", "slurm", "--slurm", "nodes=2", "time=10"]
    command += [
        "--launcher",
        f"env MASTER_ADDR=127.0.0.1 MASTER_PORT={{port}} srun --overlap --ntasks-per-node=1 {sys.executable}",
    ]
    environment = {**without_ranks(OMP_NUM_THREADS="1"), **cluster.environment}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    logs = "".join(path.read_text()[-3000:] for path in [*study.glob("slurm/*.err"), *study.glob("trials/*/*.log")])
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (row,) = Study(study).rows()
    assert row.state == "complete"
    marker = json.loads((row.folder / "run/checkpoints/step_0000010/checkpoint.json").read_text())
    assert marker["world_size"] == 2
