"""Sweeps of real training runs: several processes on one study, killed and stopped, pruned, out of memory, failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from launch.arguments import parse
from launch.sweeping.outcome import read_run
from launch.sweeping.processes import Identity
from launch.sweeping.results import Result, read_results
from launch.sweeping.space import Metric
from launch.sweeping.study import Study
from tests.packed_corpora import random_repos, write_packed
from tests.sweep_forks import ROOT, Forks
from tests.tiny_models import tiny_base

GRID = {
    "graft.memory.step_size": [0.01, 0.1, 1.0],
    "graft.memory.write": ["pooled", "token"],
    "graft.gate_floor": [0.0, 0.3],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base model, and a configuration of a short run on plain torch."""
    folder = tmp_path_factory.mktemp("sweep")
    write_packed(folder / "corpus", {"train": random_repos(6, 1), "validation": random_repos(4, 2, least=12)})
    tiny_base("llama", num_hidden_layers=2).save_pretrained(folder / "base")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 2},
        "graft": {"segment_tokens": 8, "memory": {"dim": 8}},
        "optimizer": {"lr": 0.01, "warmup_steps": 1},
        "training": {"steps": 8},
        "evaluation": {"interval": 4, "repositories": 4, "group_size": 2, "max_segments": 3},
        "checkpoint": {"interval": 1},
        "deepspeed": None,
        "run": {"tensorboard": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


def write_space(place: Path, name: str, parameters: dict[str, Any], **others: Any) -> str:
    """A space over the tiny configuration."""
    space = {"config": "tiny.yaml", "parameters": parameters, **others}
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    return str(path)


def arguments(space: str, study: Path, *options: str) -> list[str]:
    return ["--space", space, "--study", str(study), "--executor", "fork", *options]


def ends_of(result: Result) -> list[dict[str, Any]]:
    """How the attempts of a trial ended."""
    claims = result.trial.claims
    return [claims.ended(number) or {"state": None} for number in claims.numbers()]


def wait_for(condition: Any, seconds: float = 300) -> Any:
    """Its first value that is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.005)
    return value


def trial_in_the_middle(study: Path, pid: int, steps: int) -> Path | None:
    """A trial that a process runs, begun and saved, and not past half its steps."""
    for claim in study.glob("trials/[0-9]*/attempts/0001.claim.json"):
        trial = claim.parent.parent
        if json.loads(claim.read_text())["owner"]["pid"] == pid and not (claim.parent / "0001.end.json").exists():
            saved = [int(p.name[5:]) for p in (trial / "run" / "checkpoints").glob("step_*")]
            if saved and max(saved) <= steps // 2:
                return trial
    return None


def processes_of(trial: Path) -> list[psutil.Process]:
    """Processes whose attempt log or command line is the trial's."""
    found = []
    for process in psutil.process_iter():
        try:
            files = [os.readlink(f"/proc/{process.pid}/fd/1")]
            words = process.cmdline()
        except (OSError, psutil.Error):
            continue
        if str(trial) in files[0] or any(str(trial) in word for word in words):
            found.append(process)
    return found


def hold(trial: Path, attempt: int) -> bool:
    """Suspend what the keeper of an attempt runs, so that it can't end; false, and let go, where it has ended."""
    send_below_keeper(trial, attempt, signal.SIGSTOP)
    if read_run(trial / "run", Metric()).state == "running":
        return True
    let_go(trial, attempt)
    return False


def let_go(trial: Path, attempt: int) -> None:
    """The inverse of `hold`."""
    send_below_keeper(trial, attempt, signal.SIGCONT)


def send_below_keeper(trial: Path, attempt: int, number: int) -> None:
    """A signal to all that the keeper of an attempt has started."""
    keeper = json.loads((trial / f"attempts/{attempt:04d}.beat.json").read_text())["keeper"]["pid"]
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(keeper).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def hold_in_the_middle(study: Path, pid: int, steps: int) -> Path | None:
    """A trial that a process runs, begun and saved, suspended before its end."""
    trial = trial_in_the_middle(study, pid, steps)
    return trial if trial is not None and hold(trial, 1) else None


def step_of(trial: Path) -> int:
    """How far its run has come."""
    return read_run(trial / "run", Metric()).step


def test_three_processes_one_of_them_killed(place: Path, forks: Forks, tmp_path: Path) -> None:
    """Every trial ends exactly once, with the value that it has in an undisturbed sweep, and so has the best one."""
    space = write_space(place, "grid", GRID, search={"method": "grid", "seed": 3})
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    code, text = forks.run(tmp_path / "calm.log", *arguments(space, calm, "--slots", "3"))
    assert code == 0, text
    three = [forks.start(tmp_path / f"hit{n}.log", *arguments(space, hit, "--lease", "20")) for n in range(3)]
    trial = wait_for(lambda: next((t for p in three if (t := hold_in_the_middle(hit, p.pid, 8))), None))
    owner = json.loads((trial / "attempts/0001.claim.json").read_text())["owner"]["pid"]
    victim = next(p for p in three if p.pid == owner)
    victim.kill()
    wait_for(lambda: not processes_of(trial) or (trial / "attempts/0002.claim.json").exists())
    assert victim.code() == 137
    assert [p.code() for p in three if p is not victim] == [0, 0], "".join(p.log.read_text() for p in three)
    undisturbed, results = read_results(Study(calm)), read_results(Study(hit))
    assert len(results) == 12
    assert [r.value for r in results] == [r.value for r in undisturbed]
    assert len({r.value for r in results}) > 6  # the settings matter
    finals = [[end["state"] for end in ends_of(r) if end.get("final")] for r in results]
    assert finals == [["complete"]] * 12
    again = [r for r in results if r.attempts > 1]
    assert str(trial) in [str(r.trial.folder) for r in again]
    for result in again:
        assert [end["state"] for end in ends_of(result)] == ["lost", "complete"]
    assert "going on from" in (trial / "attempts/0002.log").read_text()
    best = min(undisturbed, key=lambda r: r.value)
    code, text = forks.run(tmp_path / "best.log", "best", "--study", str(hit), "--export", str(tmp_path / "best.yaml"))
    assert code == 0
    assert f"trial {best.trial.number}:" in text
    config, _ = parse(["--config", str(tmp_path / "best.yaml")])
    assert config.graft is not None
    assert config.graft.memory.step_size == best.trial.point["graft.memory.step_size"]
    assert config.deepspeed is None
    assert config.run.dir == "runs/best"


def test_adaptive_search_with_pruning(place: Path, forks: Forks, tmp_path: Path) -> None:
    """Two processes; bad trials end early; Optuna's journal and the folders agree; the report shows all of it."""
    parameters = {
        "graft.memory.step_size": {"low": 0.001, "high": 2.0, "log": True},
        "graft.memory.inner_steps": {"low": 1, "high": 3},
        "graft.memory.write": ["pooled", "token"],
        "graft.memory.rule.chunk_size": {"values": [4, 8], "when": {"graft.memory.write": "token"}},
    }
    search = {"method": "adaptive", "trials": 12, "pruning": "median", "startup_trials": 3, "seed": 1}
    settings = {"training.steps": 24, "evaluation.interval": 3, "checkpoint.interval": 100}
    space = write_space(place, "adaptive", parameters, search=search, settings=settings)
    study = tmp_path / "adaptive"
    two = [forks.start(tmp_path / f"adaptive{n}.log", *arguments(space, study)) for n in range(2)]
    assert [p.code() for p in two] == [0, 0], "".join(p.log.read_text() for p in two)
    results = read_results(Study(study))
    states = [r.state for r in results]
    assert len(states) == 12
    assert {"complete", "pruned"} <= set(states) <= {"complete", "pruned", "diverged"}
    assert states.count("complete") >= 3
    assert all(r.run.step < 24 for r in results if r.state == "pruned")
    for result in results:
        wanted = result.trial.point["graft.memory.write"] == "token"
        assert ("graft.memory.rule.chunk_size" in result.trial.point) == wanted
    path = str(study / "journal.log")
    journal = JournalStorage(JournalFileBackend(path))
    known = {t.number: t for t in optuna.load_study(study_name=Study(study).id, storage=journal).get_trials()}
    for result in results:
        in_journal = known.pop(result.trial.optuna)
        assert in_journal.params == result.trial.point
        assert (in_journal.state.name == "COMPLETE") == (result.state == "complete")
        assert in_journal.state.is_finished()
    assert {t.state.name for t in known.values()} <= {"FAIL"}  # asked at the same time as another process, and dropped
    code, text = forks.run(tmp_path / "report.log", "report", "--study", str(study))
    assert code == 0, text
    page = (study / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "http-equiv" not in page
    assert 'src="' not in page
    code, text = forks.run(tmp_path / "status.log", "status", "--study", str(study), "--once")
    assert code == 0
    assert "12 trials" in text


def test_ends_that_are_no_crash_of_the_sweep(place: Path, forks: Forks, tmp_path: Path) -> None:
    """Out of memory and divergence are results; a failure is tried again and kept with its reason."""
    outcomes = {
        "fine": {"graft.memory.dim": 8},
        "huge": {"graft.memory.dim": 10**12},
        "wild": {"graft.memory.step_size": 1e30, "training.nonfinite_limit": 2},
        "nowhere": {"data.corpus": str(tmp_path / "absent")},
    }
    space = write_space(place, "ends", {"case": {"pairs": outcomes}}, retries=1)
    study = tmp_path / "ends"
    code, text = forks.run(tmp_path / "ends.log", *arguments(space, study, "--slots", "2"))
    assert code == 0, text
    results = {r.trial.point["case"]: r for r in read_results(Study(study))}
    states = {case: r.state for case, r in results.items()}
    assert states == {"fine": "complete", "huge": "out_of_memory", "wild": "diverged", "nowhere": "failed"}
    assert {case: r.attempts for case, r in results.items()} == {"fine": 1, "huge": 1, "wild": 1, "nowhere": 2}
    assert "memory" in results["huge"].reason
    assert "not finite" in results["wild"].reason
    assert "absent does not exist" in results["nowhere"].reason
    code, text = forks.run(tmp_path / "ends_report.log", "report", "--study", str(study))
    assert code == 0, text
    assert "out_of_memory" in (study / "report.html").read_text()


def test_a_broken_machine_does_not_fail_the_study(place: Path, forks: Forks, tmp_path: Path) -> None:
    """The process stops after some failures; once the cause is mended, the study goes on to its end."""
    corpus = tmp_path / "corpus"
    settings = {"data.corpus": str(corpus), "training.steps": 1, "evaluation.interval": 1}
    space = write_space(place, "broken", {"training.seed": [0, 1, 2, 3, 4]}, settings=settings)
    study = tmp_path / "broken"
    code, text = forks.run(tmp_path / "broken1.log", *arguments(space, study))
    assert code == 2
    assert "8 attempts in a row have failed here" in text
    assert "Traceback" not in text
    assert [r.state for r in read_results(Study(study))] == ["waiting"] * 5
    corpus.symlink_to(place / "corpus")
    code, text = forks.run(tmp_path / "broken2.log", *arguments(space, study))
    assert code == 0, text
    assert [r.state for r in read_results(Study(study))] == ["complete"] * 5


@pytest.mark.flaky(reruns=2, reruns_delay=5)  # a lease of seconds, beside other tests on two cores
def test_stopped_and_hanging_trials_go_on(place: Path, forks: Forks, tmp_path: Path) -> None:
    """SIGTERM saves the trial; a keeper that hangs is replaced, and its trial killed first."""
    settings = {"training.steps": 1000, "evaluation.interval": 1000, "checkpoint.interval": 20}
    space = write_space(place, "long", {"training.seed": [0]}, settings=settings)
    study = tmp_path / "long"
    first = forks.start(tmp_path / "first.log", *arguments(space, study))
    trial = wait_for(lambda: trial_in_the_middle(study, first.pid, 1000))
    first.kill(signal.SIGTERM)
    assert first.code() == 143
    assert "goes on with it" in first.log.read_text()
    assert [end["state"] for end in ends_of(read_results(Study(study))[0])] == ["stopped"]
    stopped_at = json.loads((trial / "run/status.json").read_text())["step"]
    assert 0 < stopped_at < 998
    second = forks.start(tmp_path / "second.log", *arguments(space, study, "--lease", "6"))
    wait_for(lambda: step_of(trial) > stopped_at + 1)
    keeper = json.loads((trial / "attempts/0002.beat.json").read_text())["keeper"]["pid"]
    os.kill(keeper, signal.SIGSTOP)
    unwatched = step_of(trial)
    wait_for(lambda: step_of(trial) > unwatched + 5)
    assert hold(trial, 2)  # or it might end before its keeper is found out
    third = forks.start(tmp_path / "third.log", *arguments(space, study, "--lease", "6"))
    assert [second.code(), third.code()] == [0, 0]
    assert "was taken over by another sweep process" in second.log.read_text()
    (result,) = read_results(Study(study))
    assert [end["state"] for end in ends_of(result)] == ["stopped", "lost", "complete"]
    metrics = [json.loads(line) for line in (trial / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in metrics if line["kind"] == "train"]
    assert steps == list(range(1, 1001))  # no step lost, none twice


def test_hostfile_group_under_the_deepspeed_launcher(place: Path, forks: Forks, tmp_path: Path) -> None:
    """Two ranks; when the sweep process is killed, nothing that the launcher started runs on; then it is run again."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    settings = {
        "training.steps": 300,
        "evaluation.interval": 300,
        "checkpoint.interval": 10,
        "deepspeed": str(ROOT / "ds_configs/zero2.json"),
    }
    space = write_space(place, "hosts", {"training.seed": [0]}, settings=settings)
    study = tmp_path / "hosts_study"
    where = ["--executor", "hostfile", "--hostfile", str(tmp_path / "hosts")]
    options = [*where, "--launcher-args", "--no_ssh_check --master_addr 127.0.0.1", "--lease", "30"]
    command = ["--space", space, "--study", str(study), *options]
    first = forks.start(tmp_path / "hosts1.log", *command)
    trial = wait_for(lambda: hold_in_the_middle(study, first.pid, 300))
    ranks = [p for p in processes_of(trial) if any("local_rank" in word for word in p.cmdline())]
    assert len(ranks) == 2
    busy, text = forks.run(tmp_path / "busy.log", *command)
    assert busy == 2
    assert "no slot" in text
    let_go(trial, 1)
    first.kill()
    wait_for(lambda: not processes_of(trial))
    assert not any(Identity.of(p.pid).start and p.is_running() for p in ranks)
    code, text = forks.run(tmp_path / "hosts2.log", *command)
    assert code == 0, text + (trial / "attempts/0002.log").read_text()[-3000:]
    (result,) = read_results(Study(study))
    assert [end["state"] for end in ends_of(result)] == ["lost", "complete"]
    assert "going on from" in (trial / "attempts/0002.log").read_text()
    assert "deepspeed.launcher.runner" in " ".join(result.trial.claims.read(2).details["command"])
