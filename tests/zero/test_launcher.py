"""SIGKILL of a launcher: its ranks save themselves and end, and those that can't are ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.kill_and_resume import prepare
from tests.zero.test_checkpoint_ranks import ROOT, environment, launcher
from titans_ds.training.checkpoints import files as files

# A rank that hears no SIGTERM, as one that waits in a collective for ever, with 1 s to save itself instead of 30.
DEAF = """
import signal, sys, time
from pathlib import Path
from titans_ds.zero import engine, launcher
signal.signal(signal.SIGTERM, signal.SIG_IGN)
launcher._GRACE = 1.0
engine.start_ranks()
(Path(sys.argv[-1]) / "started").touch()  # the launcher puts --local_rank before it
time.sleep(600)
"""

# A rank whose launcher is killed while the rank still imports.
EARLY = """
import os, time
from titans_ds.zero import launcher
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.05)
launcher.watch_launcher()
time.sleep(600)
"""


@contextlib.contextmanager
def started(command: list[str], sign: Path, log: Path) -> Iterator[tuple[psutil.Process, list[psutil.Process]]]:
    """The process of a command once a file is there, and all below it; what is left of them at the end is killed."""
    with log.open("w") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    below: list[psutil.Process] = []
    try:
        limit = time.monotonic() + 200
        while not sign.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        below = process.children(recursive=True)
        assert sign.exists(), log.read_text()[-3000:]
        yield process, below
    finally:
        for left in (process, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@pytest.mark.long
def test_ranks_save_themselves_and_end_when_deepspeed_is_killed(tmp_path: Path) -> None:
    prepare(tmp_path, deepspeed="ds_configs/zero1.json")
    run = tmp_path / "run"
    training = [str(ROOT / "launch" / "train.py"), "--config", str(tmp_path / "config.yaml"), "--run.dir", str(run)]
    training += ["--training.steps", "100000", "--evaluation.interval", "0", "--checkpoint.interval", "100000"]
    with started([*launcher(2), *training], run / "metrics.jsonl", tmp_path / "log") as (deepspeed, below):
        assert len(below) >= 3  # DeepSpeed's launcher of the node, and two ranks
        deepspeed.kill()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive
    assert "is gone: stopping" in (tmp_path / "log").read_text()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    newest = files.candidates(run / "checkpoints")[0]
    assert newest.name == files.name_of(status["step"])
    assert files.damage(newest, files.read_marker(newest)) is None


def test_a_rank_that_does_not_listen_is_ended_with_the_launcher_of_its_node(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [*launcher(1), str(tmp_path / "deaf.py"), str(tmp_path)]
    with started(command, tmp_path / "started", tmp_path / "log") as (deepspeed, below):
        (of_node,) = deepspeed.children()
        of_node.kill()
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive
    said = (tmp_path / "log").read_text()
    assert f"(process {of_node.pid}, child of {deepspeed.pid}) is gone" in said
    assert "--resume auto" in said


def test_a_rank_ends_whose_launcher_was_killed_before_it_came_to_start() -> None:
    shell = subprocess.Popen(["sh", "-c", '"$0" -c "$1" & wait', sys.executable, EARLY], stdout=subprocess.PIPE)
    assert shell.stdout is not None
    with shell:
        rank = psutil.Process(int(shell.stdout.readline()))
        shell.kill()
        _, alive = psutil.wait_procs([rank], timeout=20)
        for left in alive:
            left.kill()
    assert not alive
