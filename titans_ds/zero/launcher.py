"""A rank ends with its launcher: one that is killed ends nobody, and its ranks would go on unseen, on the same GPUs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

logger = logging.getLogger("titans_ds")
_LOOK = 0.5  # seconds between looks
_GRACE = 30.0  # seconds for a checkpoint, as launchers give after a SIGTERM
_DEEPSPEED = b"deepspeed.launcher.launch"


def watch_launcher() -> None:
    """Give this process a SIGTERM when its launcher is gone, and end it with code 75 where it is there 30 s later.

    The launcher is the parent process: torchrun, mpirun, srun's step, or DeepSpeed's launcher of this node. The last
    is itself a child of `deepspeed`, whose end counts, too. Called by a rank that a launcher started; one whose
    launcher has ended since this module was imported gets the SIGTERM at once.
    """
    if not any(thread.name == "watch_launcher" for thread in threading.enumerate()):
        process, launchers = _STARTED
        launchers = launchers if process == os.getpid() else _launchers()  # a fork was started by another one
        threading.Thread(target=_watch, args=(launchers,), name="watch_launcher", daemon=True).start()


def _watch(launchers: tuple[int, ...]) -> None:
    while _launchers() == launchers:
        time.sleep(_LOOK)
    gone = f"the launcher of this rank (process {', child of '.join(map(str, launchers))}) is gone"
    logger.warning("%s: stopping", gone)
    from titans_ds.zero.heartbeat import LOST, say_lost  # not before: it imports torch

    os.kill(os.getpid(), signal.SIGTERM)  # training saves itself after the step at hand
    time.sleep(_GRACE)
    try:
        say_lost(gone)
    finally:  # also where the output led to the launcher, and is closed
        os._exit(LOST)


def _launchers() -> tuple[int, ...]:
    """The processes that started this one, by id; an orphan's parent is another one."""
    parent = os.getppid()
    try:
        if _DEEPSPEED not in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"):
            return (parent,)
        # "pid (name) state ppid …", where the name may hold anything
        return parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has just ended, or the system has no such files
        return (parent,)


_STARTED = os.getpid(), _launchers()
