"""Sweeps: trials, workers and whole sweeps killed, stopped and frozen; pruning; every way in which a trial can end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from launch.arguments import parse
from launch.sweeping.report import best_of
from launch.sweeping.study import Study, connect, open_study, this_machine
from launch.sweeping.trial import judge
from launch.sweeping.worker import local_slots
from tests.support import namespaces, sweep_kills
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.sweep_kills import steps_of
from tests.support.sweep_processes import TRAINER, Process, kill_all, processes_of, wait_for, write_space
from tests.support.tiny_models import tiny_base
from titans_ds.errors import TitansError

STEPS = 30

# Processes and their deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = pytest.mark.flaky(reruns=1, reruns_delay=5)


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    Process.end_all()


def in_the_middle(study: Path, count: int = 1) -> list[int]:
    """Points that run, past a few steps and not near their last; empty while there are fewer than so many."""
    found = [row.index for row in Study(study).rows() if row.state == "running" and 4 < row.step < STEPS - 10]
    return found if len(found) >= count else []


@pytest.mark.long
def test_whatever_is_killed_no_trial_is_lost_and_none_runs_twice(tmp_path: Path) -> None:
    """SIGKILL of a trial, of a sweep with all its trials, and of one of two sweep processes."""
    rates, seeds = [0.001, 0.01, 0.1], [0, 1]
    settings = {"training.steps": STEPS}
    space = write_space(tmp_path / "space.yaml", {"optimizer.lr": rates, "training.seed": seeds}, settings=settings)
    study = tmp_path / "it's a $(study)"
    launcher = f"setsid --wait {TRAINER}"  # which leaves its rank, in a session of its own, when it is killed
    command = ["--space", space, "--study", study, "--launcher", launcher, "--lease", "60"]
    fast, brake = {"SWEEP_TRAINER_SECONDS": "0.02"}, tmp_path / "brake"
    braked = {"SWEEP_TRAINER_BRAKE": str(brake), **fast}
    brake.write_text("8")
    first = Process(tmp_path / "first.log", *command, "--slots", "2", **braked)
    wait_for(lambda: (study / "study.json").exists())
    trial, other = wait_for(lambda: in_the_middle(study, 2))
    kill_all(processes_of(study / f"trials/{trial:04d}"))
    wait_for(lambda: f"trial {trial}: attempt 2 on" in first.said())
    brake.write_text("12")
    wait_for(lambda: steps_of(study, trial)[-1:] == [12] == steps_of(study, other)[-1:])
    first.send(signal.SIGKILL)
    assert first.code() == 137
    wait_for(lambda: not processes_of(study))  # the guards have seen to that
    assert {row.state for row in Study(study).rows()} == {"running", "waiting"}  # as far as the database knows
    two = [Process(tmp_path / f"{name}.log", *command, **how) for name, how in (("second", braked), ("third", fast))]
    begun = wait_for(lambda: re.search(r"trial (\d): attempt 1", two[0].said()))
    wait_for(lambda: len(steps_of(study, int(begun[1]))) > 4)
    two[0].send(signal.SIGKILL)
    assert two[0].code() == 137
    assert two[1].code() == 0, two[1].said()
    found = Study(study)
    rows = found.rows()
    assert {row.index: row.state for row in rows} == dict.fromkeys(range(6), "complete")
    assert sorted((row.params["optimizer.lr"], row.params["training.seed"]) for row in rows) == [
        (rate, seed) for rate in rates for seed in seeds
    ]
    assert [t.user_attrs["index"] for t in found.trials() if t.state == TrialState.COMPLETE].count(trial) == 1
    best = best_of(found)
    assert best is not None
    assert (best.params["optimizer.lr"], best.value) == (0.01, pytest.approx(1 / STEPS))
    # From its checkpoint a trial repeats at most the step that it was killed in.
    assert rows[int(begun[1])].attempts == 2
    for row in rows:
        assert sorted(set(steps_of(study, row.index))) == list(range(1, STEPS + 1))
        assert len(steps_of(study, row.index)) <= STEPS + row.attempts - 1
    assert (rows[trial].attempts, rows[other].attempts) == (3, 2)
    again = Process(tmp_path / "again.log", *command)
    assert again.code() == 0
    assert "attempt" not in again.said()


@pytest.mark.long
@pytest.mark.skipif(namespaces.why_not() is not None, reason=str(namespaces.why_not()))
def test_a_machine_that_dies_loses_no_trial(tmp_path: Path) -> None:
    """Its namespaces are killed, with the sweep and all that it has started; another machine goes on."""
    assert sweep_kills.one_round("namespace", tmp_path / "round") == ""


def is_stopped(pid: int) -> bool:
    """Whether all threads of a process stand still: one in a system call stops when that is over."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread that has just ended
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def freeze(process: Process, database: Path) -> bool:
    """Stop a process where it stands; not in a transaction, with which it would hold up everyone."""
    process.send(signal.SIGSTOP)
    wait_for(lambda: is_stopped(process.pid))
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=0.1)) as connection:
            connection.execute("BEGIN EXCLUSIVE")  # which a reader holds up, too
    except sqlite3.OperationalError:
        process.send(signal.SIGCONT)
        return False
    return True


@pytest.mark.long
def test_a_stopped_sweep_goes_on_and_a_frozen_one_is_replaced(tmp_path: Path) -> None:
    """SIGTERM lets trials save themselves. A process that stands still loses its trial to another, and notices."""
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0]}, settings={"training.steps": 60})
    study = tmp_path / "study"
    command = ["--space", space, "--study", study, "--launcher", TRAINER, "--lease", "6"]
    brake = tmp_path / "brake"
    brake.write_text("6")
    braked = {"SWEEP_TRAINER_BRAKE": str(brake)}
    first = Process(tmp_path / "first.log", *command, **braked)
    wait_for(lambda: len(steps_of(study, 0)) > 3)
    first.send(signal.SIGTERM)
    assert first.code() == 143
    assert "the same command goes on" in first.said()
    assert [row.state for row in Study(study).rows()] == ["waiting"]
    assert json.loads((study / "trials/0000/run/status.json").read_text())["state"] == "stopped"
    before = len(steps_of(study, 0))
    brake.write_text("12")
    second = Process(tmp_path / "second.log", *command, **braked)
    wait_for(lambda: len(steps_of(study, 0)) > before + 3)
    wait_for(lambda: freeze(second, study / "study.db"))
    wait_for(lambda: not processes_of(study))  # its guard has heard nothing for half a lease
    third = Process(tmp_path / "third.log", *command)
    wait_for(lambda: re.search(r"attempt \d+ on cpu0 from step", third.said()))  # a busy machine may have lost one more
    second.send(signal.SIGCONT)
    assert [second.code(), third.code()] == [0, 0], second.said() + third.said()
    assert "was taken over by another process" in second.said()
    (row,) = Study(study).rows()
    assert row.state == "complete"
    assert row.attempts >= 3
    steps = steps_of(study, 0)
    assert sorted(set(steps)) == list(range(1, 61))
    assert len(steps) < 60 + row.attempts


@pytest.mark.long
def test_a_database_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    """The trial is ended in time, and the process leaves with a message; when it is back, the same command goes on."""
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0]}, settings={"training.steps": 40})
    study = tmp_path / "study"
    command = ["--space", space, "--study", study, "--launcher", TRAINER, "--lease", "4"]
    (tmp_path / "brake").write_text("5")
    process = Process(tmp_path / "log", *command, SWEEP_TRAINER_BRAKE=str(tmp_path / "brake"))
    wait_for(lambda: len(steps_of(study, 0)) > 2)
    with contextlib.closing(sqlite3.connect(study / "study.db", timeout=30)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with (study / "study.db").open("rb+") as file:
            head = file.read(100)
            file.seek(0)
            file.write(b"x" * 100)
    assert process.code() == 2
    assert "does not answer as it should: file is not a database" in process.said()
    assert "Traceback" not in process.said()
    wait_for(lambda: not processes_of(study))
    with (study / "study.db").open("rb+") as file:
        file.write(head)
    again = Process(tmp_path / "again", *command, SWEEP_TRAINER_SECONDS="0")
    assert again.code() == 0, again.said()
    assert sorted(set(steps_of(study, 0))) == list(range(1, 41))


@pytest.mark.long
def test_adaptive_search_prunes_bad_trials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two slots; the table, the page and the exported configuration show what happened."""
    parameters = {
        "optimizer.lr": {"low": 1e-4, "high": 1.0, "log": True},
        "graft.memory.write": ["pooled", "token"],
    }
    search = {"method": "adaptive", "trials": 12, "pruning": "median", "startup_trials": 3, "seed": 1}
    settings = {"training.steps": 20, "evaluation.interval": 1}
    space = write_space(tmp_path / "space.yaml", parameters, search=search, settings=settings)
    study = tmp_path / "study"
    process = Process(
        tmp_path / "log", "--space", space, "--study", study, "--launcher", TRAINER, "--slots", "2",
        SWEEP_TRAINER_SECONDS="0.07",
    )  # fmt: skip
    assert process.code() == 0, process.said()
    rows = Study(study).rows()
    states = Counter(row.state for row in rows)
    assert len(rows) == 12
    assert set(states) == {"complete", "pruned"}
    assert states["complete"] >= 3
    # Where the machine stood still, one may have trained its last step before it was ended.
    assert min(row.step for row in rows if row.state == "pruned") < 20
    for command in (["status"], ["report"], ["best", "--export", str(tmp_path / "best.yaml")]):
        assert Process(tmp_path / "said", *command, "--study", study).code() == 0
    said = (tmp_path / "said").read_text()
    assert f"12 trials: {states['complete']} complete, {states['pruned']} pruned; best" in said
    page = (study / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert 'src="' not in page
    best = min((row for row in rows if row.value is not None), key=lambda row: row.value)
    assert f"trial {best.index}:" in said
    config, _ = parse(["--config", str(tmp_path / "best.yaml")])
    assert config.optimizer.lr == best.params["optimizer.lr"]
    assert config.run.dir == "runs/best"


@pytest.mark.long
def test_every_way_in_which_a_trial_ends(tmp_path: Path) -> None:
    """Out of memory and divergence are results; an error is tried again, and again when its cause is mended."""
    corpus = tmp_path / "corpus"
    cases = {
        "fine": {"training.seed": 1},
        "failing": {"training.seed": 13},
        "huge": {"training.seed": 14},
        "wild": {"training.seed": 15},
        "impossible": {"graft.memory.rule.token_momentum": True},
    }
    settings = {"training.steps": 3, "data.corpus": str(corpus)}
    search = {"method": "random", "trials": 8, "seed": 1}  # every case, two of them twice
    space = write_space(
        tmp_path / "space.yaml", {"case": {"pairs": cases}}, search=search, settings=settings, retries=1
    )
    study = tmp_path / "study"
    command = ["--space", space, "--study", study, "--launcher", TRAINER]
    first = Process(tmp_path / "first.log", *command, SWEEP_TRAINER_SECONDS="0")
    code = first.code()
    corpus.mkdir()
    # Three failed trials in a row may stop the sweep earlier: what is left waits.
    rows = {row.params["case"]: row for row in Study(study).rows() if row.state != "waiting"}
    assert (code, {case: row.state for case, row in rows.items()}) == (
        0,
        {"fine": "complete", "failing": "failed", "huge": "out_of_memory", "wild": "diverged", "impossible": "invalid"},
    ), first.said()
    assert {case: row.attempts for case, row in rows.items()} == {
        "fine": 1, "failing": 2, "huge": 1, "wild": 1, "impossible": 0,
    }  # fmt: skip
    assert rows["failing"].reason == "exit code 1: ValueError: no corpus"
    assert "not finite at step 3" in rows["wild"].reason
    second = Process(tmp_path / "second.log", *command, SWEEP_TRAINER_SECONDS="0")
    assert second.code() == 0
    states = Counter(row.state for row in Study(study).rows())
    assert "failed" not in states
    assert sum(states.values()) == 8


def test_a_broken_machine_does_not_fail_the_study(tmp_path: Path) -> None:
    """The process stops after some failures, without a traceback, and leaves the rest."""
    settings = {"data.corpus": str(tmp_path / "absent"), "training.seed": 13}
    space = write_space(
        tmp_path / "space.yaml", {"optimizer.lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, settings=settings, retries=0
    )
    process = Process(tmp_path / "log", "--space", space, "--study", tmp_path / "study", "--launcher", TRAINER)
    assert process.code() == 2
    assert "3 trials in a row have failed here" in process.said()
    assert "Traceback" not in process.said()
    assert Counter(row.state for row in Study(tmp_path / "study").rows()) == {"failed": 3, "waiting": 2}


@pytest.mark.long
def test_the_real_program(tmp_path: Path) -> None:
    """When the sweep is killed it ends; then it goes on from its checkpoint to the end."""
    write_packed(tmp_path / "corpus", {"train": random_repos(6, 1), "validation": random_repos(4, 2, least=12)})
    tiny_base("llama", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    config = {
        "model": {"base": str(tmp_path / "base")},
        "data": {"corpus": str(tmp_path / "corpus"), "num_lanes": 2},
        "graft": {"segment_tokens": 8, "memory": {"dim": 8}},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "training": {"steps": 60},
        "evaluation": {"interval": 60, "repositories": 4, "group_size": 2, "max_segments": 3},
        "checkpoint": {"interval": 5},
        "deepspeed": None,
        "run": {"trackers": []},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    space = write_space(tmp_path / "space.yaml", {"training.seed": [0]}, config="tiny.yaml")
    study = tmp_path / "study"
    command = ["--space", space, "--study", study]
    first = Process(tmp_path / "first.log", *command, OMP_NUM_THREADS="1")
    wait_for(lambda: list(study.glob("trials/0000/run/checkpoints/step_*")))
    first.send(signal.SIGKILL)
    assert first.code() == 137
    wait_for(lambda: not processes_of(study))
    second = Process(tmp_path / "second.log", *command, OMP_NUM_THREADS="1")
    assert second.code() == 0, second.said()
    assert "going on from" in (study / "trials/0000/attempt-002.log").read_text()
    (row,) = Study(study).rows()
    lines = [json.loads(line) for line in (study / "trials/0000/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 61))
    (last,) = [line["losses"]["memory"]["mean"] for line in lines if line["kind"] == "evaluation"]
    assert (row.state, row.step, row.value) == ("complete", 60, last)


def new_study(folder: Path, trials: int) -> Study:
    """A study of random trials that nobody works on."""
    search = {"method": "random", "trials": trials}
    space = write_space(folder / "space.yaml", {"training.seed": {"low": 0, "high": 9}}, search=search)
    return open_study(folder / "study", space, {}, None, 4)


def take(url: str, name: str, queue: multiprocessing.Queue) -> None:
    own = optuna.load_study(study_name=name, storage=connect(url, 60))
    taken = []
    while (trial := own._pop_waiting_trial_id()) is not None:
        taken.append(trial)
    queue.put(taken)


def test_sqlite_gives_each_trial_to_one_process(tmp_path: Path) -> None:
    """Optuna's own transactions there would give some to several."""
    study = new_study(tmp_path, 30)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue = context.Queue()
    workers = [context.Process(target=take, args=(study.url, study.meta["id"], queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    taken = sorted(trial for _ in workers for trial in queue.get(timeout=120))
    assert taken == sorted(trial._trial_id for trial in study.trials())


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_point_whose_trial_is_lost_gets_one_other(tmp_path: Path) -> None:
    """Also when a process is killed before it can enqueue that, or before its first heartbeat; and of two that were
    enqueued at the same time, one counts."""
    study = new_study(tmp_path, 3)
    taken = [study.optuna.ask() for _ in range(3)]
    study.fail_lost()
    assert [row.state for row in study.rows()] == ["running"] * 3  # their owners may be about to sign
    study._unowned = {number: since - 5 for number, since in study._unowned.items()}  # a lease ago
    lock = study.lock(1, taken[1].number)
    taken[1].set_user_attr("machine", this_machine())
    taken[2].set_user_attr("machine", "another machine")
    study.fail_lost()
    assert [row.state for row in study.rows()] == ["waiting", "running", "running"]
    lock.close()
    study.fail_lost()
    assert [row.state for row in study.rows()] == ["waiting", "waiting", "running"]
    study.requeue()
    study.requeue()
    found = [t for t in study.trials() if t.state == TrialState.WAITING]
    assert sorted(t.user_attrs["index"] for t in found) == [0, 1]
    study.optuna.enqueue_trial({}, user_attrs={"index": 0})  # as another process does meanwhile
    assert [study.is_duplicate(t) for t in study.chains()[0]] == [False, False, True]
    assert [row.state for row in study.rows()] == ["waiting", "waiting", "running"]


def test_how_attempts_are_judged() -> None:
    """From the run's own status where this attempt wrote it, whatever the launcher's exit code; else from the rest."""
    assert judge({"state": "finished"}, 1, "", 0) == ("complete", "")
    assert judge({}, 0, "step 3", 0) == ("failed", "exit code 0: step 3")
    assert judge({"state": "failed", "error": "CUDA out of memory"}, 1, "", 0)[0] == "out_of_memory"
    assert judge({}, 2, "error: the run needs about 90.0 GiB on each accelerator, and 78.0 are there", 0)[0] == (
        "out_of_memory"
    )
    assert judge({"state": "failed", "error": "the loss was not finite in 9 steps in a row"}, 1, "", 0)[0] == "diverged"
    assert judge({}, 137, "", 0)[0] == "killed"
    assert judge({}, 137, "", 1)[0] == "out_of_memory"
    assert judge({}, 1, "Traceback\nValueError: no\nsome more", 0) == ("failed", "exit code 1: ValueError: no")


def test_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot has GPUs of its own; those of another sweep on this machine are left alone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    (first,) = local_slots(1, 2, None)
    assert first.environment == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert "deepspeed.launcher.runner" in first.launcher
    second = local_slots(None, 1, None)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in second] == ["6", "7"]
    with pytest.raises(TitansError, match="0 of them not in use by other sweeps"):
        local_slots(1, 1, None)
    assert [slot.name for slot in local_slots(1, 4, None, lock=False)] == ["gpu4+5+6+7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot.name for slot in local_slots(2, 1, None)] == ["cpu0", "cpu1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
