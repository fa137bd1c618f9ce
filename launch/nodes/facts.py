"""What every rank finds on its node, for launch/preflight.py. Nothing here fails: what goes wrong is a fact, too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from launch.arguments import parse
from launch.memory import footprint
from launch.train import read_deepspeed
from titans_ds.training import ranks
from titans_ds.training.data.packed import open_corpus
from titans_ds.training.run_folder import versions
from titans_ds.training.settings import TrainConfig

Facts = dict[str, Any]
# Variables that must be the same on all nodes; which network card is a node's own affair.
_VARIABLES = ("NCCL_", "GLOO_", "TITANS_", "DS_", "TORCH_NCCL_", "OMP_NUM_THREADS")
_OWN = ("IFNAME", "_HCA", "DIR")
_ERROR = "error"


def collect(arguments: Sequence[str], device: torch.device, mib: int) -> list[Facts]:
    """The facts of all ranks, by rank. A collective.

    Args:
        arguments: of launch/train.py.
        device: of this rank.
        mib: size of the tensor that is all-reduced.
    """
    facts = {"host": socket.gethostname(), "rank": ranks.rank(), **_versions(), "variables": _variables()}
    config = _attempt(lambda: parse(arguments))
    facts["config"] = config if isinstance(config, dict) else _digest(config[1])
    if not isinstance(config, dict):
        facts |= _of_run(config[0])
    facts["accelerator"] = _accelerator(device)
    facts["probe"] = _shared_folder(None if isinstance(config, dict) else config[0])
    facts["all_reduce"], facts["skew"] = _all_reduce(device, mib), _skew()
    return ranks.gather(facts)


def _versions() -> Facts:
    found = versions()
    machine = {"python": found["machine"]["python"], "cuda": torch.version.cuda}
    return {"packages": {**found["packages"], **machine}, "commit": found["git_commit"]}


def _variables() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not name.endswith(_OWN)
    }


def _of_run(config: TrainConfig) -> Facts:
    """What this node sees of the run's files."""
    return {
        "deepspeed": _attempt(lambda: _digest(json.dumps(read_deepspeed(config), sort_keys=True))),
        "corpus": _attempt(lambda: _corpus(config)),
        "base": _attempt(lambda: _base(config)),
        "disk": _attempt(lambda: shutil.disk_usage(_existing(Path(str(config.run.dir)))).free),
        "checkpoints": _attempt(lambda: _checkpoint_bytes(config)),
        "run_dir": str(config.run.dir),
    }


def _corpus(config: TrainConfig) -> str:
    """A packed corpus is opened and one file of it read; of parquet files names and sizes count."""
    folder = Path(config.data.corpus)
    if (folder / "packed.json").is_file():
        split = open_corpus(folder).split(config.data.train_split, 1)
        return _digest((folder / "packed.json").read_text() + str(split.file(0)[:64].tolist()))
    files = sorted((p.name, p.stat().st_size) for p in folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither packed.json nor parquet files")
    return _digest(json.dumps(files))


def _base(config: TrainConfig) -> str:
    """A base model's folder by its configuration and the sizes of its weights; a hub id as it is."""
    base = config.model.base
    if base is None:
        return "random weights"
    if not Path(base).is_dir():
        return base
    weights = sorted((p.name, p.stat().st_size) for p in Path(base).glob("*.safetensors"))
    return _digest((Path(base) / "config.json").read_text() + json.dumps(weights))


def _checkpoint_bytes(config: TrainConfig) -> int:
    """Of all checkpoints that stay, and one that is being written: parameter and two moments in fp32 each."""
    if not config.checkpoint.interval:
        return 0
    model, _ = footprint(config, read_deepspeed(config) or {}, ranks.world_size())
    return model.trained * 12 * (config.checkpoint.keep + 1)


def _accelerator(device: torch.device) -> Facts:
    if device.type != "cuda":
        return {"name": f"{device.type} ({os.cpu_count()} cores)", "free": 1.0, "total": 0}
    free, total = torch.cuda.mem_get_info(device)
    return {"name": torch.cuda.get_device_name(device), "free": free / total, "total": total}


def _shared_folder(config: TrainConfig | None) -> Any:
    """Whether this rank sees a file that rank 0 has just written where the run folder will be."""
    name = f".preflight-{os.getpid()}-{time.time_ns()}"
    folder = _existing(Path(str(config.run.dir))).resolve() if config else None

    def write() -> str | None:
        if folder is not None:
            (folder / name).write_text(name)
        return str(folder / name) if folder is not None else None

    wrote = _attempt_on_rank_zero(write)
    if not isinstance(wrote, str):
        return wrote
    time.sleep(0.2)  # a network file system may take its time
    seen = _attempt(lambda: Path(wrote).read_text() == Path(wrote).name)
    ranks.gather(None)
    if ranks.rank() == 0:
        Path(wrote).unlink(missing_ok=True)
    return seen


def _attempt_on_rank_zero(task: Callable[[], Any]) -> Any:
    return ranks.on_rank_zero(lambda: _attempt(task))


def _all_reduce(device: torch.device, mib: int) -> Facts:
    """Whether the sum is right, everywhere in the tensor, and the bandwidth of each rank's link in GB/s.

    A ring sends 2 (n - 1) / n of the tensor over every link; that, over the time, is the bandwidth.
    """
    world = ranks.world_size()
    if world == 1:
        return {"right": True, "gb_s": None}
    count = mib * 2**20 // 4
    pattern = torch.arange(count, device=device, dtype=torch.float32) % 1024
    tensor, expected = pattern * (ranks.rank() + 1), pattern * (world * (world + 1) // 2)
    dist.all_reduce(tensor)  # the first one also sets connections up
    right = bool(torch.equal(tensor, expected))
    repeats, start = 4, _now(device)
    for _ in range(repeats):
        dist.all_reduce(tensor)
    seconds = (_now(device) - start) / repeats
    return {"right": right, "gb_s": 2 * (world - 1) / world * count * 4 / seconds / 1e9}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _skew() -> float:
    """Seconds by which this rank's clock is ahead of rank 0's: the least of several readings after a barrier."""
    readings = []
    for _ in range(5):
        ranks.gather(None)
        own = time.time()
        readings.append(own - ranks.gather(own)[0])
    return min(readings, key=abs)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _attempt(task: Callable[[], Any]) -> Any:
    """What a task gives, or {"error": why not}."""
    try:
        return task()
    except Exception as error:
        return {_ERROR: str(error).strip() or type(error).__name__}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
