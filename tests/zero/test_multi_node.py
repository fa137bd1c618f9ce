"""Two nodes (namespaces with their own network, host name and sshd) train together under DeepSpeed's own launchers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import deepspeed_env, universal_checkpoint
from tests.support import kill_and_resume
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
    assert kill_and_resume.finish(kill_and_resume.start(folder, "alone", 1)), (folder / "alone.log").read_text()
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
        node.plug()
        node.clear()


@pytest.fixture(scope="module")
def one_node(place: Path, started: list[Node]) -> Path:
    """A folder with runs of two ranks of one node, under pdsh: zero2 and zero3, in one launch."""
    runs = [["", *arguments(place, place / "one_node" / f"zero{stage}", stage)] for stage in (2, 3)]
    (place / "one_node").mkdir()
    (place / "one_node" / "runs.json").write_text(json.dumps(runs))
    launch = launcher(started[0], str(place / "one"), "--force_multi")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done = started[0].run(*launch, MANY, str(place / "one_node" / "runs.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "node1: " in done.stdout
    assert "node2: " not in done.stdout
    return place / "one_node"


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


def start(node: Node, *command: str, **given: str) -> subprocess.Popen[str]:
    """On a node; its ssh notices within 15 s where another is gone (see tests/support/namespaces.py)."""
    pipe = subprocess.PIPE
    return subprocess.Popen(node.command(*command), env=environment(**given), stdout=pipe, stderr=pipe, text=True)


def test_two_ranks_of_one_node_equal_one_process(place: Path, one_node: Path) -> None:
    """ZeRO-2 and ZeRO-3. What two nodes lose is compared with these, below."""
    for stage in (2, 3):
        assert_same(one_node / f"zero{stage}", place / "alone")
    assert losses(place / "alone")[1] - losses(place / "alone")[STEPS] > 0.1  # a path that goes somewhere


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun; apt-get install openmpi-bin libopenmpi-dev")
def test_two_nodes_under_open_mpi(
    place: Path, one_node: Path, two: list[Node], tmp_path: Path, monkeypatch: Any
) -> None:
    """Ranks find themselves through mpi4py, by host name; every loss is that of two ranks of one node, to the bit."""
    monkeypatch.chdir(place)
    # Both nodes are this machine: mpirun would bind the ranks of both to its first core.
    mpi = "--bind-to none --allow-run-as-root --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 -x PATH"
    options = ["--launcher", "openmpi", "--launcher_args", mpi]
    done = two[0].run(*launcher(two[0], "hostfile", *options), TRAIN, *arguments(place, tmp_path / "run", 2))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " GiB, " in done.stdout  # peak memory of two ranks
    assert losses(tmp_path / "run") == losses(one_node / "zero2")


def lose_the_second(found: list[Node], run: Path, program: list[str], lose: Callable[[], None], said: str) -> int:
    """Train on two nodes under pdsh, and lose the second in the middle; the last step that was made.

    The first stops within 60 s, says why and what to do, and leaves nothing running.
    """
    brake_of(run).write_text("8")
    process = start(found[0], *launcher(found[0], "hostfile"), *program)
    wait_for(run, 8, process)
    before = time.monotonic()
    lose()
    brake_of(run).unlink()
    out, err = process.communicate(timeout=300)  # a collective alone would wait for two hours
    assert time.monotonic() - before < 60
    assert process.returncode != 0
    assert "node2: " in out
    assert said in err, err[-3000:]
    assert "Traceback" not in err
    assert "launch/universal_checkpoint.py" in err
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    found[0].wait_until_gone(str(run))
    return max(losses(run))


def test_a_node_without_power(place: Path, one_node: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """ZeRO-2. The run goes on on the other node, to its end, as if nothing had been."""
    monkeypatch.chdir(place)
    run = tmp_path / "run"
    program = [BRAKED, *arguments(place, run, 2), "--resume", "auto"]
    with nodes(tmp_path / "n") as found:
        lost_at = lose_the_second(found, run, program, found[1].stop, "lost contact with another rank")
        assert losses(run) == dict(list(losses(one_node / "zero2").items())[:lost_at])  # the same sums, in order
        assert universal_checkpoint.main([str(run)]) == 0
        done = found[0].run(sys.executable, *program)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "going on from" in done.stdout
    assert_same(run, place / "alone")


def test_a_node_without_network(place: Path, one_node: Path, two: list[Node], tmp_path: Path, monkeypatch: Any) -> None:
    """ZeRO-3. The run goes on on the other node, and then on both again: under torchrun, by rendezvous."""
    monkeypatch.chdir(place)
    first, second = two
    run = tmp_path / "run"
    program = [BRAKED, *arguments(place, run, 3), "--resume", "auto"]
    said = "rank 1 on node2 has given no sign of life for "
    lost_at = lose_the_second(two, run, program, second.unplug, said)
    assert said in json.loads((run / "status.json").read_text())["error"]
    assert losses(run) == dict(list(losses(one_node / "zero3").items())[:lost_at])

    assert universal_checkpoint.main([str(run)]) == 0
    brake_of(run).write_text(str(lost_at + 3))
    process = start(first, sys.executable, *program)
    wait_for(run, lost_at + 3, process)
    (run / "stop").touch()
    brake_of(run).unlink()
    out, err = process.communicate(timeout=300)
    assert "going on from" in out
    assert json.loads((run / "status.json").read_text())["state"] == "stopped", err[-3000:]
    assert max(losses(run)) == lost_at + 4

    assert universal_checkpoint.main([str(run)]) == 0
    second.plug()
    # The same command on every node; neither is told its number.
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=node1:{port_on(first)}", "--rdzv_id=test"]
    torchrun = [str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1", *meeting]
    given = {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu"}
    started = [start(node, *torchrun, *program, **given) for node in two]
    said_by = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said_by
    assert "going on from" in said_by[0][0] + said_by[1][0]
    assert_same(run, place / "alone")
