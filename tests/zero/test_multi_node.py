"""Two nodes (namespaces with their own network, host name and sshd) train together under DeepSpeed's own launchers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import deepspeed_env, universal_checkpoint
from tests.support.braked_run import brake_of
from tests.support.kill_and_resume import prepare
from tests.support.namespaces import Node, environment, nodes, port_on, why_not

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
MANY, BRAKED = (str(ROOT / "tests" / "support" / name) for name in ("many_runs.py", "braked_run.py"))
BIN = Path(sys.executable).parent
STEPS = 16
SAME = 1e-6  # relative
REASON = why_not("pdsh")

# Real daemons and deadlines beside other tests on two cores: what comes too late once is tried again.
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.flaky(reruns=2, reruns_delay=5),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, a hostfile, and the losses of one process."""
    folder = tmp_path_factory.mktemp("nodes")
    prepare(folder, deepspeed=None)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["lora"], config["evaluation"], config["checkpoint"]["keep"] = None, {"interval": 0}, 9
    config["training"]["steps"], config["checkpoint"]["interval"] = STEPS, 5
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    (folder / "one").write_text("node1 slots=2\n")
    given = ["GLOO_SOCKET_IFNAME=eth0", "TITANS_HEARTBEAT_SECONDS=12", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    assert deepspeed_env.main(["--out", str(folder / ".deepspeed_env"), "--set", *given]) == 0
    done = subprocess.run(
        [sys.executable, TRAIN, "--config", str(folder / "config.yaml"), "--run.dir", str(folder / "alone")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """node1 and node2."""
    with nodes(tmp_path_factory.mktemp("ns") / "n") as found:
        yield found


@pytest.fixture
def two(started: list[Node]) -> Iterator[list[Node]]:
    """The same, on which nothing runs on after a test, as one that failed may leave it."""
    yield started
    for node in started:
        node.clear()


def losses(run: Path) -> dict[int, float]:
    """Of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def launcher(node: Node, hostfile: str, *options: str) -> list[str]:
    """DeepSpeed's, started on a node."""
    address = ["--master_addr", node.address, "--master_port", str(port_on(node))]
    return [str(BIN / "deepspeed"), "--hostfile", hostfile, *address, *options]


def arguments(place: Path, run: Path, stage: int) -> list[str]:
    """Of one run of the program."""
    files = ["--config", str(place / "config.yaml"), "--run.dir", str(run)]
    return [*files, "--deepspeed", f"ds_configs/zero{stage}.json"]


def assert_same(run: Path, alone: Path) -> None:
    """The losses of one process, at every step."""
    ours, theirs = losses(run), losses(alone)
    assert sorted(ours) == list(range(1, STEPS + 1))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=SAME), (run.name, step)


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a run has come to a step."""
    metrics, limit = run / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "the run does not come on"
        time.sleep(0.05)


def start(node: Node, *command: str) -> subprocess.Popen[str]:
    """On a node; its ssh notices within 15 s where another is gone (see tests/support/namespaces.py)."""
    pipe = subprocess.PIPE
    return subprocess.Popen(node.command(*command), env=environment(), stdout=pipe, stderr=pipe, text=True)


def test_two_nodes_equal_one_node_and_one_process(
    place: Path, two: list[Node], tmp_path: Path, monkeypatch: Any
) -> None:
    """ZeRO-2 and ZeRO-3 under pdsh: 2 nodes, and 2 ranks of one node, in one launch each."""
    monkeypatch.chdir(place)
    for where, options in (("hostfile", []), ("one", ["--force_multi"])):
        runs = [["", *arguments(place, tmp_path / f"{where}{stage}", stage)] for stage in (2, 3)]
        (tmp_path / f"{where}.json").write_text(json.dumps(runs))
        done = two[0].run(*launcher(two[0], where, *options), MANY, str(tmp_path / f"{where}.json"))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert ("node2: " in done.stdout) == (where == "hostfile")
        for stage in (2, 3):
            assert_same(tmp_path / f"{where}{stage}", place / "alone")
    for stage in (2, 3):
        assert losses(tmp_path / f"hostfile{stage}") == losses(
            tmp_path / f"one{stage}"
        )  # the same sums in the same order
    assert losses(place / "alone")[1] - losses(place / "alone")[STEPS] > 0.1  # a path that goes somewhere


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun; apt-get install openmpi-bin libopenmpi-dev")
def test_two_nodes_under_open_mpi(place: Path, two: list[Node], tmp_path: Path, monkeypatch: Any) -> None:
    """Ranks find themselves through mpi4py, by host name."""
    monkeypatch.chdir(place)
    # Both nodes are this machine: mpirun would bind the ranks of both to its first core.
    mpi = "--bind-to none --allow-run-as-root --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 -x PATH"
    options = ["--launcher", "openmpi", "--launcher_args", mpi]
    done = two[0].run(*launcher(two[0], "hostfile", *options), TRAIN, *arguments(place, tmp_path / "run", 2))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " GiB, " in done.stdout  # peak memory of two ranks
    assert_same(tmp_path / "run", place / "alone")


def test_torchrun_finds_its_ranks_by_rendezvous(place: Path, two: list[Node], tmp_path: Path, monkeypatch: Any) -> None:
    """One torchrun on every node; neither is told its number."""
    monkeypatch.chdir(place)
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=node1:{port_on(two[0])}", "--rdzv_id=test"]
    torchrun = [str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1", *meeting, TRAIN]
    given = {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu"}
    second = subprocess.Popen(
        two[1].command(*torchrun, *arguments(place, tmp_path / "run", 3)),
        env=environment(**given),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = two[0].run(*torchrun, *arguments(place, tmp_path / "run", 3), **given)
    assert (done.returncode, second.wait(timeout=300)) == (0, 0), done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(tmp_path / "run", place / "alone")


@pytest.mark.parametrize(("stage", "way"), [(2, "killed"), (3, "unplugged")])
def test_a_lost_node(place: Path, tmp_path: Path, monkeypatch: Any, stage: int, way: str) -> None:
    """The other stops within 60 s and says why; the run goes on on one node (ZeRO-3: then on two again) as if nothing
    had been."""
    monkeypatch.chdir(place)
    run = tmp_path / "run"
    program = [BRAKED, *arguments(place, run, stage), "--resume", "auto"]
    with nodes(tmp_path / "n") as (first, second):
        brake_of(run).write_text("8")
        process = start(first, *launcher(first, "hostfile"), *program)
        wait_for(run, 8, process)
        before = time.monotonic()
        second.stop() if way == "killed" else second.unplug()
        brake_of(run).unlink()
        out, err = process.communicate(timeout=300)  # a collective alone would wait for two hours
        assert time.monotonic() - before < 60
        assert process.returncode != 0
        said = "lost contact with another rank" if way == "killed" else "rank 1 on node2 has given no sign of life for "
        assert said in err, err[-3000:]
        assert "Traceback" not in err
        assert "launch/universal_checkpoint.py" in err
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], said in status["error"] or way == "killed") == ("failed", True)
        first.wait_until_gone(str(run))
        lost_at = max(losses(run))

        assert universal_checkpoint.main([str(run)]) == 0
        if way == "unplugged":
            brake_of(run).write_text(str(lost_at + 3))
        process = start(first, sys.executable, *program)
        if way == "unplugged":
            wait_for(run, lost_at + 3, process)
            (run / "stop").touch()
            brake_of(run).unlink()
        out, err = process.communicate(timeout=300)
        assert "going on from" in out
        state = json.loads((run / "status.json").read_text())["state"]
        assert state == ("stopped" if way == "unplugged" else "finished"), err[-3000:]
        if way == "unplugged":
            assert max(losses(run)) == lost_at + 4
            assert universal_checkpoint.main([str(run)]) == 0
            second.plug()
            done = first.run(*launcher(first, "hostfile"), *program)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(run, place / "alone")
