"""The same script under torchrun, accelerate and mpirun, on two ranks (test_launch.py has deepspeed); what they say."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.clean_environment import without_ranks
from tests.support.kill_and_resume import prepare
from titans_ds.errors import ConfigError
from titans_ds.zero.offload import check_checkpointable, place_nvme
from titans_ds.zero.ops import exclusive, extensions_dir, needed_ops
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
ACCELERATE = ["launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


def start(place: Path, launcher: list[str], name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of two steps."""
    options = ["--training.steps", "2", "--evaluation.interval", "0", "--checkpoint.interval", "0"]
    command = [*launcher, TRAIN, "--config", str(place / "config.yaml"), "--run.dir", str(place / name), *options]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    given = without_ranks(**{"OMP_NUM_THREADS": "1", "PATH": path, **environment})
    return subprocess.run(command, cwd=place, env=given, capture_output=True, text=True, timeout=900)


def losses(run: Path) -> list[float]:
    """Of every step."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, and the losses under plain DeepSpeed in one process."""
    folder = tmp_path_factory.mktemp("launchers")
    prepare(folder, deepspeed="ds_configs/zero1.json")
    done = start(folder, [sys.executable], "alone")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", ["torchrun", "accelerate", "mpirun"])
def test_two_ranks_under_every_launcher(place: Path, name: str) -> None:
    """Two ranks, by the world size that the launch shows, and a whole run folder."""
    if name == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("no mpirun; apt-get install openmpi-bin libopenmpi-dev")
    port = str(free_port())
    launcher = {
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port],
        "accelerate": [str(BIN / "accelerate"), *ACCELERATE, "--dynamo_backend", "no", "--main_process_port", port],
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
    }[name]
    environment = {"MASTER_PORT": port} if name == "mpirun" else {}
    done = start(place, launcher, name, **environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count(" GiB, ") == 1, done.stdout  # peak memory of two ranks
    assert losses(place / name)[0] == pytest.approx(losses(place / "alone")[0], rel=0.02)  # dropout differs by rank
    assert json.loads((place / name / "status.json").read_text())["state"] == "finished"


def test_a_port_in_use_is_named(place: Path) -> None:
    """And how to choose another."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place_of_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = start(place, [sys.executable], "port", MASTER_PORT=port, **place_of_rank)
    assert done.returncode == 2
    assert f"error: port {port} of 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_libmpi_is_named(place: Path) -> None:
    """mpi4py itself is there; the library that it loads is not."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "MPI4PY_LIBMPI": "/nonexistent.so"}
    done = start(place, [sys.executable], "libmpi", **mpi)
    assert done.returncode == 2
    assert "error: mpirun started this process, but mpi4py can't be used" in done.stderr
    assert "apt-get install openmpi-bin" in done.stderr


def test_a_stale_build_lock_does_not_hang(tmp_path: Path) -> None:
    """A killed build left it; whoever holds the operating system's lock removes it."""
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with exclusive(tmp_path):
        assert not lock.exists()


def test_ops_are_built_for_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another torch has its own folder, unless the user names one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = set()
    for version in (torch.__version__, "9.9.9"):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        found.add(extensions_dir())
    assert len(found) == 2
    assert all(tmp_path in folder.parents for folder in found)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/mine")
    assert extensions_dir() == Path("/mine")


@pytest.mark.long
def test_shipped_offload_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on NVMe need one op and a folder; an optimizer on NVMe allows no checkpoints."""
    shipped = {p.stem: json.loads(p.read_text()) for p in (ROOT / "ds_configs").glob("*offload*.json")}
    needs = {name: needed_ops(config) for name, config in shipped.items()}
    nvme = {"zero3_offload_nvme": ["async_io"], "zero3_offload_nvme_params": ["async_io"]}
    assert needs == {"zero2_offload_cpu": [], "zero3_offload_cpu": [], **nvme}
    monkeypatch.delenv("TITANS_NVME_DIR", raising=False)
    with pytest.raises(ConfigError, match="set the environment variable TITANS_NVME_DIR"):
        place_nvme(shipped["zero3_offload_nvme"])
    monkeypatch.setenv("TITANS_NVME_DIR", str(tmp_path))
    placed = place_nvme(shipped["zero3_offload_nvme"])["zero_optimization"]
    assert placed["offload_param"]["nvme_path"] == placed["offload_optimizer"]["nvme_path"] == str(tmp_path)
    check_checkpointable(shipped["zero3_offload_nvme_params"], 500, "auto")
    check_checkpointable(shipped["zero3_offload_nvme"], 0, "none")
    for interval, resume in ((500, "none"), (0, "auto"), (0, "runs/before")):
        with pytest.raises(ConfigError, match="does not restore an optimizer that is offloaded to NVMe"):
            check_checkpointable(shipped["zero3_offload_nvme"], interval, resume)
