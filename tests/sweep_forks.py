"""Starts processes of launch/sweep.py for the tests, by forking one that has imported everything.

    python tests/sweep_forks.py

reads lines of JSON, {"arguments": […], "log": FILE, "cwd": FOLDER}, and answers each with the process id. When a
process ends, its exit code is in FILE.code. Ends with its standard input.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.clean_environment import without_ranks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Started:
    """A sweep process."""

    pid: int
    log: Path

    def code(self, seconds: float = 900) -> int:
        """Its exit code, 128 + signal where it was killed, after it has ended."""
        limit, path = time.monotonic() + seconds, self.log.with_suffix(".code")
        while not path.exists():
            assert time.monotonic() < limit, f"still running: {self.log.read_text()}"
            time.sleep(0.02)
        return int(path.read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


class Forks:
    """The other end of this program."""

    def __init__(self) -> None:
        environment = without_ranks(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, log: Path, *arguments: str) -> Started:
        """Fork a process of launch/sweep.py."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": list(arguments), "log": str(log), "cwd": str(log.parent)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Started(int(self._process.stdout.readline()), log)

    def run(self, log: Path, *arguments: str) -> tuple[int, str]:
        """Run one to its end: its exit code, and what it printed."""
        code = self.start(log, *arguments).code()
        return code, log.read_text()

    def close(self) -> None:
        """End the program, and with it all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=180)


def _import_all() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import launch.sweep
    import launch.sweeping.adaptive
    import launch.sweeping.report
    import launch.sweeping.worker
    import launch.train  # noqa: F401


def _fork(order: dict[str, object]) -> tuple[int, Path]:
    log = Path(str(order["log"]))
    pid = os.fork()
    if pid:
        return pid, log
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for target in (1, 2):
            os.dup2(descriptor, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(str(order["cwd"]))
        from launch import sweep

        code = sweep.main([str(a) for a in order["arguments"]])  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _reap(running: dict[int, Path]) -> None:
    for pid, log in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            partial = log.with_suffix(".part")
            partial.write_text(str(code if code >= 0 else 128 - code))
            os.replace(partial, log.with_suffix(".code"))
            del running[pid]


def main() -> None:
    """Serve until standard input ends."""
    _import_all()
    running: dict[int, Path] = {}
    while True:
        _reap(running)
        if not select.select([0], [], [], 0.02)[0]:
            continue
        line = _read_line()
        if not line:
            break
        pid, log = _fork(json.loads(line))
        running[pid] = log
        print(pid, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _read_line() -> str:
    """Unbuffered, so that select sees what is left."""
    text = b""
    while not text.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        text += byte
    return text.decode()


if __name__ == "__main__":
    main()
