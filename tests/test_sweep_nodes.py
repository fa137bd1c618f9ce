"""Multi-node trials side by side on groups of nodes (namespaces with their own network, processes and sshd)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch import deepspeed_env
from launch.sweeping.results import read_results
from launch.sweeping.study import Study
from tests.kill_and_resume import prepare
from tests.namespaces import Node, environment, nodes, why_not

ROOT = Path(__file__).resolve().parent.parent
SWEEP = str(ROOT / "launch" / "sweep.py")
STEPS = 400
REASON = why_not("pdsh")

# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.flaky(reruns=2, reruns_delay=5),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, a hostfile of four nodes, and a space of two trials."""
    folder = tmp_path_factory.mktemp("groups")
    prepare(folder, deepspeed=str(ROOT / "ds_configs/zero2.json"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["lora"] = None
    config["training"]["steps"], config["checkpoint"]["interval"] = STEPS, 20
    config["evaluation"]["interval"] = STEPS
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "space.yaml").write_text(
        yaml.safe_dump({"config": "config.yaml", "parameters": {"training.seed": [0, 1]}})
    )
    (folder / "hostfile").write_text("".join(f"node{n} slots=1\n" for n in (1, 2, 3, 4)))
    given = ["GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    assert deepspeed_env.main(["--out", str(folder / ".deepspeed_env"), "--set", *given]) == 0
    return folder


@pytest.fixture
def four(tmp_path: Path) -> Iterator[list[Node]]:
    """node1 to node4, which end with all that runs on them."""
    with nodes(tmp_path / "n", 4) as found:
        yield found


def processes(*words: str) -> list[psutil.Process]:
    """Those on any node whose command line has all of the words."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(word in line for word in words) and "nsenter" not in line:
            found.append(process)
    return found


def wait_for(condition: Any, seconds: float = 300) -> Any:
    """Its first value that is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.05)
    return value


def start(place: Path, command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """The sweep process."""
    with (folder / "sweep.log").open("a") as log:
        return subprocess.Popen(command, cwd=place, env=environment(), stdout=log, stderr=log)


def signal_sweep(study: Path, number: int) -> None:
    """The oldest: its keepers look the same."""
    min(processes(SWEEP, f"--study {study} "), key=lambda p: p.create_time()).send_signal(number)


def log_of(study: Path, trial: int, attempt: int) -> str:
    """What an attempt has printed so far."""
    path = study / f"trials/{trial:04d}/attempts/{attempt:04d}.log"
    return path.read_text() if path.exists() else ""


def test_two_trials_on_two_groups_of_two_nodes(place: Path, four: list[Node], tmp_path: Path) -> None:
    """When the sweep process is killed, no rank runs on, on any node; when it is stopped, all are saved; both trials go
    on from their checkpoints."""
    study = tmp_path / "study"
    options = ["--executor", "hostfile", "--hostfile", "hostfile", "--nodes-per-trial", "2", "--lease", "30"]
    command = four[0].command(sys.executable, SWEEP, "--space", "space.yaml", "--study", str(study), *options)
    command = [word if not word.startswith("--wd=") else f"--wd={place}" for word in command]
    first = start(place, command, tmp_path)
    wait_for(lambda: len(list(study.glob("trials/*/run/checkpoints/latest"))) == 2)
    ranks = processes("--local_rank=0", str(study))
    assert len(ranks) == 4
    assert len({os.readlink(f"/proc/{p.pid}/ns/pid") for p in ranks}) == 4  # one on every node
    signal_sweep(study, signal.SIGKILL)
    first.wait(timeout=180)
    wait_for(lambda: not processes("launch/train.py", str(study)))
    second = start(place, command, tmp_path)
    wait_for(lambda: all("going on from" in log_of(study, n, 2) for n in (0, 1)))
    signal_sweep(study, signal.SIGTERM)
    assert second.wait(timeout=300) == 143
    wait_for(lambda: not processes("launch/train.py", str(study)))
    third = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=900)
    assert third.returncode == 0, third.stdout + third.stderr
    results = read_results(Study(study))
    assert [r.state for r in results] == ["complete", "complete"]
    for result in results:
        ends = [(result.trial.claims.ended(n) or {"state": "?"})["state"] for n in result.trial.claims.numbers()]
        assert ends == ["lost", "stopped", "complete"]
        assert "going on from" in result.trial.log(3).read_text()
        marker = json.loads((result.trial.run / f"checkpoints/step_{STEPS:07d}/checkpoint.json").read_text())
        assert marker["world_size"] == 2
    places = {result.place.split()[-1].split("-")[0] for result in results}
    assert places == {"node1+1", "node3+1"}
