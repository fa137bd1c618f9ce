"""Sweep processes for the tests: forked from the test's own, which has imported everything."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import yaml

from launch import sweep
from launch.sweeping.guard import MARK

ROOT = Path(__file__).resolve().parents[2]
TRAINER = f"{sys.executable} {ROOT / 'tests' / 'support' / 'sweep_trainer.py'}"


class Process:
    """A process of launch/sweep.py.

    Args:
        log: file that takes what it prints.
        arguments: of the program.
        environment: variables beside the test's own.
    """

    running: ClassVar[list[Process]] = []

    def __init__(self, log: Path, *arguments: object, **environment: str) -> None:
        self.log = log
        log.touch()
        self.pid = os.fork()
        if self.pid:
            self.running.append(self)
            return
        code = 1
        # A connection that the test has dropped must not be closed here, where its number is another file's by then.
        gc.freeze()
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.closerange(3, 1024)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.update(environment)
            code = sweep.main([str(argument) for argument in arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def code(self, seconds: float = 120) -> int:
        """Its exit code, 128 + signal where it was killed, after it has ended."""

        def ended() -> list[int]:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return [os.waitstatus_to_exitcode(status)] if pid else []

        (code,) = wait_for(ended, seconds)
        self.running.remove(self)
        return code if code >= 0 else 128 - code

    @classmethod
    def end_all(cls) -> None:
        """Kill those that a test that failed has left."""
        for process in list(cls.running):
            process.send(signal.SIGKILL)
            process.code()

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Its first value that is true."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)
    return value


def processes_of(folder: Path) -> list[psutil.Process]:
    """What runs of a trial, or of all trials of a study."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        if mark.startswith((f"{folder}/", f"{folder} ")):
            found.append(process)
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL each."""
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)


def write_space(path: Path, parameters: dict[str, Any], **others: Any) -> Path:
    """A space over a configuration that ships, with a network as the memory, whose settings depend on each other."""
    settings = {"graft.memory.preset": "paper", **others.pop("settings", {})}
    config = str(ROOT / "launch/configs/quickstart.yaml")
    content = {"config": config, "parameters": parameters, "settings": settings, **others}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
