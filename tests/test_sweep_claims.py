"""Claims in a shared folder: one owner, one end, death by silence; and files that are whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch.sweeping import files
from launch.sweeping.claims import Claim, Claims
from launch.sweeping.executors import Local, visible_gpus
from launch.sweeping.outcome import judge, read_run
from launch.sweeping.processes import MARK, Identity, kill_marked, kill_tree
from launch.sweeping.space import Metric
from launch.sweeping.study import open_study
from titans_ds.errors import TitansError

ROOT = Path(__file__).resolve().parent.parent

ELSEWHERE = Identity("other", "another boot/pid:[1]", 5, 6)


def race(folder: str, queue: multiprocessing.Queue) -> None:
    """Take as many of 200 numbers as possible, and end those that are taken."""
    claims, me = Claims(Path(folder)), Identity.of(os.getpid())
    taken = [n for n in range(1, 201) if claims.take(n, me, 60.0, {})]
    ended = [n for n in range(1, 201) if claims.end(n, {"state": "complete"})]
    queue.put((taken, ended))


def test_many_processes_one_owner(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue = context.Queue()
    workers = [context.Process(target=race, args=(str(tmp_path), queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    taken, ended = zip(*(queue.get(timeout=300) for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    assert sorted(n for part in taken for n in part) == list(range(1, 201))
    assert sorted(n for part in ended for n in part) == list(range(1, 201))
    assert not list(tmp_path.glob(".*.part"))


def test_folders_get_their_name_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert files.publish_folder(tmp_path / "a", tmp_path / "final")
    assert not files.publish_folder(tmp_path / "b", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "a"


def test_death(tmp_path: Path) -> None:
    """At once where the process was on this machine; after a silence as long as the lease elsewhere."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = Identity.of(child.pid)
    claims = Claims(tmp_path)
    claims.take(1, theirs, 1000.0, {})
    claim = claims.read(1)
    assert claim is not None
    assert not claims.is_dead(claim)
    assert claims.is_dead(replace(claim, owner=replace(theirs, start=theirs.start + 1)))  # its id was used again
    claims.beat(1, 1, Identity.of(os.getpid()))
    child.communicate()
    assert not claims.is_dead(claim)  # its keeper is there still
    claims.beat(1, 2, theirs)
    assert claims.is_dead(claim)
    far = Claim(2, ELSEWHERE, 0.3, {})
    claims.beat(2, 1, ELSEWHERE)
    limit = time.monotonic() + 0.9
    while time.monotonic() < limit:  # beats that come keep it alive
        claims.beat(2, int(time.monotonic() * 1000), ELSEWHERE)
        assert not claims.is_dead(far)
        time.sleep(0.05)
    assert not Claims(tmp_path).is_dead(far)  # a newcomer waits a lease itself
    time.sleep(0.4)
    assert claims.is_dead(far)


def test_the_first_end_counts(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claims.take(1, ELSEWHERE, 1.0, {})
    assert claims.end(1, {"state": "lost"})
    assert not claims.end(1, {"state": "complete"})
    assert claims.lost(1)
    assert claims.ended(1)["state"] == "lost"


def test_a_beat_is_never_seen_torn(tmp_path: Path) -> None:
    """It is written in place, in one call of one length."""
    claims = Claims(tmp_path)
    for count in (1, 10**15, 2):
        claims.beat(1, count, ELSEWHERE)
        assert claims.last_beat(1)["count"] == count
    assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1


def test_marked_processes_are_found() -> None:
    """Whatever session and parent they have; none runs any more when that returns."""
    command, mark = [sys.executable, "-c", "import time; time.sleep(600)"], f"{uuid.uuid4().hex}/1/2"
    marked = subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=True)
    other = subprocess.Popen(command, env={**os.environ, MARK: f"{mark}0"})
    assert kill_marked(mark) == 1
    assert not Identity.of(marked.pid).start
    assert marked.wait(60) == -9
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_is_killed_with_all_that_it_started() -> None:
    """Also where it hangs."""
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    root = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert root.stdout is not None
    child = Identity.of(int(root.stdout.readline()))
    root.send_signal(signal.SIGSTOP)
    assert kill_tree(root.pid) == 2
    assert not child.alive
    assert root.wait(60) == -9
    assert kill_tree(root.pid) == 0


def run_folder(folder: Path, state: str, error: str = "") -> Path:
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 3, "error": error}))
    lines = [{"kind": "evaluation", "step": 2, "losses": {"memory": {"mean": 1.5}}}, {"kind": "train", "step": 3}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "evalu')
    return folder


def test_outcomes(tmp_path: Path) -> None:
    """From the run folder where it is this attempt's, whatever the launcher's exit code; else from code and output."""
    metric, log = Metric(), tmp_path / "log"
    log.write_text("step 3\n")
    finished = read_run(run_folder(tmp_path / "finished", "finished"), metric)
    assert finished.values == {2: 1.5}
    assert judge(finished, 0, True, log, metric, 0).value == 1.5
    missing = read_run(tmp_path / "finished", Metric("evaluation.losses.wrong.mean"))
    judged = judge(missing, 0, True, log, Metric("evaluation.losses.wrong.mean"), 0)
    assert judged.state == "failed"
    assert "losses.memory.mean" in judged.reason
    assert judge(finished, 0, False, log, metric, 0).state == "failed"  # a status that an attempt before has left
    failed = read_run(run_folder(tmp_path / "f", "failed", "OutOfMemoryError: CUDA out of memory. Tried 2 GiB"), metric)
    assert judge(failed, 0, True, log, metric, 0).state == "out_of_memory"
    empty = read_run(tmp_path / "absent", metric)
    assert judge(empty, 137, False, log, metric, 0).state == "lost"
    assert judge(empty, 137, False, log, metric, 1).state == "out_of_memory"
    log.write_text(
        "error: the run needs about 90.0 GiB on each accelerator, and 78.0 GiB are there. What would fit: …\n"
    )
    assert judge(empty, 2, False, log, metric, 0).state == "out_of_memory"
    log.write_text("Traceback\nValueError: no\nsome more\n")
    assert judge(empty, 1, False, log, metric, 0).reason == "exit code 1: ValueError: no"


def test_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot has GPUs of its own; those of another sweep on this machine are left alone, until it ends."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_gpus() == ["4", "5", "6", "7"]
    space = {"config": str(ROOT / "launch/configs/quickstart.yaml"), "parameters": {"training.seed": [0, 1]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    study = open_study(tmp_path / "study", tmp_path / "space.yaml", {})
    trial = study.make_trial(0, {"training.seed": 0}, None)
    assert trial is not None
    first = Local(study, 1, None, 2, inside=False)
    second = Local(study, None, ["4", "5", "6", "7"], 1, inside=False)
    assert (first.slots, second.slots) == (["gpu4+5"], ["gpu6", "gpu7"])
    with pytest.raises(TitansError, match="0 of them not in use by other sweeps"):
        Local(study, None, None, 1, inside=False)
    assert first.launch(trial, "gpu4+5").environment == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert "deepspeed.launcher.runner" in first.launch(trial, "gpu4+5").command
    assert second.launch(trial, "gpu7").environment == {"CUDA_VISIBLE_DEVICES": "7"}
    assert Path(second.launch(trial, "gpu7").command[2]) == ROOT / "launch/train.py"
    first.release()
    assert Local(study, None, None, 2, inside=False).slots == ["gpu4+5"]
