"""launch/preflight.py on two nodes that are fit, and on two of which one is not; .deepspeed_env."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from launch import deepspeed_env
from launch.nodes.checks import judge
from tests.support.kill_and_resume import prepare
from tests.support.namespaces import Node, environment, nodes, port_on, why_not
from titans_ds.zero.engine import import_deepspeed
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PREFLIGHT = str(ROOT / "launch" / "preflight.py")
REASON = why_not("pdsh")
LIMITS = argparse.Namespace(min_bandwidth=1.0, max_skew=5.0, min_free=1.0, min_accelerator=0.9, mib=64)
FACTS: dict[str, Any] = {
    "packages": {"torch": "2.11.0", "deepspeed": "0.19.8"},
    "commit": "abc",
    "variables": {},
    "config": "c1",
    "deepspeed": "d1",
    "corpus": "e1",
    "base": "f1",
    "accelerator": {"name": "H100", "free": 0.99, "total": 80 << 30},
    "probe": True,
    "all_reduce": {"right": True, "gb_s": 40.0},
    "skew": 0.0,
    "disk": 100 << 30,
    "checkpoints": 10 << 30,
    "run_dir": "/shared/run",
}


def two_ranks(**changes: Any) -> list[dict[str, Any]]:
    """Facts of two nodes, with changes on the second."""
    return [
        {**copy.deepcopy(FACTS), "host": "node1", "rank": 0},
        {**copy.deepcopy(FACTS), "host": "node2", "rank": 1, **changes},
    ]


def test_good_facts_are_ready() -> None:
    assert {check.verdict for check in judge(two_ranks(), LIMITS)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"packages": {"torch": "2.10.0", "deepspeed": "0.19.8"}}, "package versions", "node2: 2.10.0"),
        ({"commit": "def"}, "code", "node2: def"),
        ({"variables": {"NCCL_ALGO": "Ring"}}, "environment", "node2: {"),
        ({"config": "c2"}, "configuration", "node2: c2"),
        ({"config": {"error": "lr is unknown"}}, "configuration", "node2: lr is unknown"),
        ({"deepspeed": "d2"}, "DeepSpeed configuration", "node2: d2"),
        ({"corpus": {"error": "no such folder"}}, "corpus readable", "node2: no such folder"),
        ({"base": "f2"}, "base model", "node2: f2"),
        ({"accelerator": {"name": "H100", "free": 0.5, "total": 1}}, "accelerators free", "rank 1: 50%"),
        ({"all_reduce": {"right": False, "gb_s": 40.0}}, "all-reduce", "wrong on rank 1"),
        ({"all_reduce": {"right": True, "gb_s": 0.5}}, "all-reduce", "below --min_bandwidth 1"),
        ({"skew": -7.0}, "clocks", "node2 -7.000 s"),
        ({"probe": False}, "run folder shared", "node2: does not see"),
    ],
)
def test_what_is_wrong_on_one_node_is_named(changes: dict[str, Any], name: str, says: str) -> None:
    """That check alone fails, and says where."""
    checks = {check.name: check for check in judge(two_ranks(**changes), LIMITS)}
    assert [n for n, check in checks.items() if check.verdict == "FAILED"] == [name]
    assert says in checks[name].found


def test_a_full_disk_fails() -> None:
    facts = two_ranks()
    facts[0]["disk"] = 10 << 30
    assert [c.name for c in judge(facts, LIMITS) if c.verdict == "FAILED"] == ["disk space"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, a configuration and a hostfile."""
    folder = tmp_path_factory.mktemp("preflight")
    prepare(folder, deepspeed="ds_configs/zero2.json")
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    variables = ["GLOO_SOCKET_IFNAME=eth0", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    assert deepspeed_env.main(["--out", str(folder / ".deepspeed_env"), "--set", *variables]) == 0
    return folder


def settings(place: Path, runs: Path) -> list[str]:
    """Of the run."""
    return ["--config", str(place / "config.yaml"), "--run.dir", str(runs / "r")]


def as_ranks(found: list[Node], *command: str) -> tuple[int, str, str]:
    """Rank 0's exit code and output, and what rank 1 says as error: a rank on each node, by torch's variables."""
    address = {"MASTER_ADDR": found[0].address, "MASTER_PORT": str(port_on(found[0])), "WORLD_SIZE": "2"}
    address |= {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            node.command(sys.executable, *command), env=environment(RANK=str(rank), **address), stdout=pipe,
            stderr=pipe, text=True,
        )
        for rank, node in enumerate(found)
    ]  # fmt: skip
    (out, _), (_, error) = (process.communicate(timeout=600) for process in started)
    return started[0].returncode, out, error


@pytest.mark.long
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.flaky(reruns=2, reruns_delay=5)  # deadlines beside other tests on two cores
def test_two_real_nodes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready; then the second has no corpus, another version of a package, and a run folder of its own."""
    monkeypatch.chdir(place)
    runs = tmp_path / "runs"
    runs.mkdir()
    looked = [PREFLIGHT, *settings(place, runs), "--mib", "4", "--wait", "240"]
    with nodes(tmp_path / "n") as found:
        first, second = found
        address = ["--master_addr", first.address, "--master_port", str(port_on(first))]
        done = first.run(str(Path(sys.executable).parent / "deepspeed"), "--hostfile", "hostfile", *address, *looked)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "READY (2 ranks on 2 nodes)" in done.stdout
        assert "NOT READY" not in done.stdout
        assert list(runs.iterdir()) == []

        installed = metadata.distribution("safetensors")
        path = Path(str(installed.locate_file(f"safetensors-{installed.version}.dist-info/METADATA")))
        other = tmp_path / "METADATA"
        other.write_text(
            path.read_text().replace(f"\nVersion: {installed.version}\n", f"\nVersion: {installed.version}.post1\n")
        )
        for mount in (
            ["--bind", str(other), str(path)],
            ["-t", "tmpfs", "none", str(place / "corpus")],
            ["-t", "tmpfs", "none", str(runs)],
        ):
            assert second.run("mount", *mount).returncode == 0
        code, said, error = as_ranks(found, *looked)
        train = [str(ROOT / "launch" / "train.py"), *settings(place, runs), "--run.check_memory", "false"]
        trained, _, alone = as_ranks(found, *train)
    assert trained != 0  # who starts all the same is told so by the one rank that can't go on
    assert "is not a packed corpus" in alone, alone[-3000:]
    assert "(rank 1 on node2 alone)" in alone
    assert "Traceback" not in alone
    assert code == 1, error[-3000:]
    assert "NOT READY: package versions, corpus readable, run folder shared (2 ranks on 2 nodes)" in said
    assert f"node2: {installed.version}.post1" in said
    assert "Traceback" not in error


def test_a_missing_rank_is_waited_for_and_named(place: Path) -> None:
    """One of two comes."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    command = [sys.executable, PREFLIGHT, "--config", str(place / "config.yaml"), "--wait", "3"]
    given = environment(DS_ACCELERATOR="cpu", **alone)
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "error: the 2 ranks did not find one another at 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_deepspeed_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What training reads, without secrets, as DeepSpeed's own parser takes it; what it can't take is refused."""
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_HOME", "/data/hf=1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path = tmp_path / ".deepspeed_env"
    assert deepspeed_env.main(["--out", str(path), "--set", "GLOO_SOCKET_IFNAME=eth0"]) == 0
    values = dict(line.split("=", maxsplit=1) for line in path.read_text().splitlines())  # as the launcher does
    wanted = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/data/hf=1",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert wanted.items() <= values.items()
    assert "HF_TOKEN" not in values
    assert "looks like a secret: HF_TOKEN" in capsys.readouterr().out
    import_deepspeed()
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner(argparse.Namespace(user_args=[], user_script="x", launcher_args=""), "")
    for name, value in values.items():
        runner.add_export(name, value)
    shell = "".join(f"export {k}={v}; " for k, v in runner.exports.items()) + "echo $HF_HOME $NCCL_DEBUG"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == "/data/hf=1 INFO\n"
    for wrong in ("A=$(id)", "A=", "no equals"):
        assert deepspeed_env.main(["--out", str(path), "--set", wrong]) == 2
    assert "DeepSpeed can't pass on a value" in capsys.readouterr().err
