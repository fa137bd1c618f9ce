"""Sweep processes on other machines, over ssh: on nodes made of namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sweeping.study import Study
from tests.support import namespaces
from tests.support.sweep_processes import ROOT, TRAINER, wait_for, write_space

SWEEP = str(ROOT / "launch" / "sweep.py")
NO_NODES = namespaces.why_not("pdsh")

# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = [pytest.mark.long, pytest.mark.flaky(reruns=1, reruns_delay=5)]


def database(folder: Path) -> str:
    """Of one machine in truth, which these nodes share."""
    return f"sqlite:///{folder / 'sweeps.db'}"


@pytest.mark.skipif(NO_NODES is not None, reason=str(NO_NODES))
def test_hosts_work_side_by_side_and_end_with_the_command(tmp_path: Path) -> None:
    """In a folder whose name would be a command to a shell. When the command is killed, the hosts save their trials."""
    settings = {"training.steps": 60}
    brake = tmp_path / "brake"
    brake.write_text("5")
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0, 1]}, settings=settings)
    study = tmp_path / "it's $(touch oops); 100%h"
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    command = [sys.executable, SWEEP, "--space", str(space), "--study", str(study), "--storage", database(tmp_path)]
    command += ["--executor", "ssh", "--hostfile", str(tmp_path / "hosts"), "--lease", "20"]

    def on_first() -> list[str]:
        words = found[0].command(*command, "--launcher", f"env SWEEP_TRAINER_BRAKE={brake} {TRAINER}")
        return [f"--wd={tmp_path}" if word.startswith("--wd=") else word for word in words]

    with namespaces.nodes(tmp_path / "n", 2) as found, (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(on_first(), env=namespaces.environment(), stdout=log, stderr=log)

        def on_both() -> list[str]:
            rows = Study(study).rows() if (study / "study.json").exists() else []
            places = {row.place for row in rows if row.state == "running" and row.step > 2}
            return sorted(places) if len(places) == 2 else []

        assert [place.split()[0] for place in wait_for(on_both)] == ["node1", "node2"], (tmp_path / "log").read_text()
        starter = [p for p in Path("/proc").glob("[0-9]*/cmdline") if is_sweep(p, "--hostfile")]
        os.kill(min(int(path.parent.name) for path in starter), signal.SIGKILL)
        first.wait(60)
        states = [study / f"trials/000{n}/run/status.json" for n in (0, 1)]
        wait_for(lambda: all(json.loads(path.read_text())["state"] == "stopped" for path in states))
        wait_for(lambda: {row.state for row in Study(study).rows()} == {"waiting"})
        brake.unlink()
        done = subprocess.run(on_first(), env=namespaces.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in Study(study).rows():
        assert (row.state, row.attempts) == ("complete", 2)
        steps = (row.folder / "run/steps.log").read_text().split()
        assert steps == [str(n) for n in range(1, 61)]
    assert not (tmp_path / "oops").exists()


def is_sweep(cmdline: Path, option: str) -> bool:
    """Whether a process is one of launch/sweep.py with this option."""
    try:
        words = cmdline.read_bytes().split(b"\0")
    except OSError:
        return False
    return SWEEP.encode() in words[:2] and option.encode() in words
