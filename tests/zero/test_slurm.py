"""The Slurm templates on a real one-machine cluster: two nodes train, are asked to stop, are requeued, and go on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import kill_and_resume
from tests.support.kill_and_resume import prepare
from tests.support.slurm_cluster import Cluster, slurm_cluster, why_not
from titans_ds.errors import ConfigError
from titans_ds.zero import slurm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
REASON = why_not()
GIVEN = {
    "PYTHON": sys.executable,
    "MASTER_ADDR": "127.0.0.1",  # the nodes have no name of their own in this machine's network
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "GPUS": "1",
}
SIZE = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none"]
# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
needs_slurm = pytest.mark.skipif(REASON is not None, reason=str(REASON))
pytestmark = pytest.mark.flaky(reruns=2, reruns_delay=5)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """node1 and node2, without what a test before has left on them."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "c") as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, a configuration, and the losses of one process."""
    folder = tmp_path_factory.mktemp("place")
    prepare(folder, deepspeed="ds_configs/zero2.json")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["lora"], config["evaluation"] = None, {"interval": 0}
    config["training"]["steps"], config["checkpoint"]["interval"] = STEPS, 10
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "deepspeed": None}))
    assert kill_and_resume.finish(kill_and_resume.start(folder, "alone", 1)), (folder / "alone.log").read_text()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def submit(cluster: Cluster, logs: Path, template: str, *arguments: str, **given: str) -> str:
    """The number of a job."""
    out = ["--parsable", "--output", str(logs / "%j.out"), *SIZE]
    script = str(ROOT / "launch" / "slurm" / template)
    return cluster.run("sbatch", *out, script, *arguments, cwd=ROOT, **{**GIVEN, **given}).strip()


def losses(run: Path) -> dict[int, float]:
    """Of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def wait_for(run: Path, step: int, log: Path) -> None:
    """Until a run has come to a step."""
    metrics, limit = run / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < limit, log.read_text() if log.is_file() else "the job does not start"
        time.sleep(0.1)


@pytest.mark.long
@needs_slurm
def test_a_job_is_requeued_before_its_limit_and_goes_on(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """The signal that Slurm sends before the time limit, sent by hand; the losses are those of one process."""
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "train.sbatch", "--config", str(place / "config.yaml"), "--run.dir", str(run))
    log = tmp_path / f"{job}.out"
    wait_for(run, 6, log)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    limit = time.monotonic() + 180
    while cluster.job(job)["Restarts"] == "0":
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.2)
    assert json.loads((run / "status.json").read_text())["state"] == "stopped", log.read_text()
    cluster.wait(job, "PENDING")
    cluster.wait_idle(2)
    time.sleep(
        2
    )  # Slurm lets a requeued job wait for two minutes, so that no late word of its first life ends its second
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    ended = cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    said = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert "the time limit comes near" in said
    assert "going on from" in said
    assert said.count("READY (2 ranks") == 2  # before each start
    assert losses(run) == pytest.approx(losses(place / "alone"), rel=1e-6)


@pytest.mark.long
@needs_slurm
def test_one_torchrun_a_node(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """They meet by rendezvous."""
    run = tmp_path / "run"
    arguments = ["--config", str(place / "config.yaml"), "--run.dir", str(run)]
    job = submit(cluster, tmp_path, "train_torchrun.sbatch", *arguments, PREFLIGHT="0")
    ended = cluster.wait(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    said = (tmp_path / f"{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert " GiB, " in said  # peak memory of two ranks
    assert losses(run) == pytest.approx(losses(place / "alone"), rel=1e-6)


@pytest.mark.long
@needs_slurm
def test_a_mistake_is_not_tried_again(cluster: Cluster, place: Path, tmp_path: Path) -> None:
    """Neither is a job without a run folder."""
    jobs = [submit(cluster, tmp_path, "train.sbatch", "--config", str(place / "config.yaml"))]
    given = ["--config", str(place / "config.yaml"), "--run.dir", str(tmp_path / "run"), "--trainin.steps", "3"]
    jobs.append(submit(cluster, tmp_path, "train.sbatch", *given, PREFLIGHT="0"))
    for job, expected in zip(jobs, ("error: give --run.dir", "did you mean training.steps?"), strict=True):
        ended = cluster.wait(job, "COMPLETED", "FAILED")
        assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
        assert expected in (tmp_path / f"{job}.out").read_text()


def test_places_of_tasks() -> None:
    """Out of what srun says, for lists of nodes as Slurm writes them."""
    assert slurm.first_node("gpu[003-006,009],big1") == "gpu003"
    assert slurm.first_node("gpu7") == "gpu7"
    assert slurm.first_node("rack[1-2]n,x") == "rack1n"
    with pytest.raises(ConfigError, match="no list of Slurm's nodes"):
        slurm.first_node("[1]")
    step = {"SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "7"}
    step |= {"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,2,1", "SLURM_STEP_NODELIST": "a[2-4]"}
    assert slurm.under_srun(step)
    placed = slurm.place({**step, "SLURM_JOB_ID": "77"})
    assert {k: v for k, v in placed.items() if k != "MASTER_PORT"} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a2",
    }
    assert slurm.place({**step, "SLURM_JOB_ID": "77"})["MASTER_PORT"] == placed["MASTER_PORT"]
    assert slurm.place({**step, "SLURM_JOB_ID": "78"})["MASTER_PORT"] != placed["MASTER_PORT"]
    assert slurm.place({**step, "MASTER_ADDR": "b", "MASTER_PORT": "9"})["MASTER_ADDR"] == "b"
    for other in ({"RANK": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        assert not slurm.under_srun({**step, **other})
    assert not slurm.under_srun({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})  # the batch script itself
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        slurm.place({**step, "SLURM_STEP_NODELIST": ""})
