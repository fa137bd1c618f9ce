"""What the benchmark programs share: a report that says where it was made, times and peaks of memory, one table."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from titans_ds.errors import TitansError
from titans_ds.files import check_file, write_json
from titans_ds.program import whole_number
from titans_ds.training.run_folder import versions

many = whole_number(1, 10**9)  # the type of an option
_PEERS = ("triton", "flash-linear-attention", "liger-kernel", "titans-pytorch")


def new_report(name: str, argv: list[str], device: torch.device, out: Path | None) -> dict[str, Any]:
    """A report with hardware, commit, command and versions, to which a program adds its rows.

    Raises OutputError where `out`, the file that it will be saved as, is something else.
    """
    if out is not None:
        check_file(out, rb'\A\{\s*"device": ')
    found = versions()
    for package in _PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["packages"][package] = metadata.version(package)
    return {
        "device": device_name(device),
        "gpus": torch.cuda.device_count(),
        "command": " ".join([f"python -m benchmarks.{name}", *argv]),
        "versions": found,
        "rows": {},
    }


def save(report: dict[str, Any], path: Path | None) -> None:
    """Write a report as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        write_json(path, report)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown. A row with fewer cells than there are columns, such as one with an error, is filled up."""
    head = list(columns)
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [str(cell) for cell in row]
        lines.append(cells + [""] * (len(head) - len(cells)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def first_line(error: BaseException) -> str:
    """What an error says, for a cell of a table; of one of ours what was wrong, without what to do about it."""
    if isinstance(error, TitansError):
        return str(error).partition(". ")[0]
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]


def device_name(device: torch.device) -> str:
    """As a report names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(call: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Of one call: the median of three or more, as many as fit into `at_least` seconds, after two to warm up."""
    for _ in range(2):
        call()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < at_least and len(taken) < 50):
        start = now(device)
        call()
        taken.append(now(device) - start)
    return statistics.median(taken)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a large matrix product on random numbers."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2.0 * n**3 / median_seconds(lambda: a @ b, device, 0.5)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory held so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process's memory


def peak(device: torch.device) -> int:
    """The most memory held since `reset_peak`, in bytes: of the GPU, with what graphs keep, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + _graph_bytes()
    if sys.platform != "linux":
        from titans_ds.training.metrics import peak_host_bytes

        return peak_host_bytes()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _graph_bytes() -> int:
    """What CUDA graphs keep for themselves between replays, which no count of living tensors shows."""
    segments = torch.cuda.memory_snapshot()
    pools = [s for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in pools)


def kill_tree(root: int) -> None:
    """SIGKILL a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
