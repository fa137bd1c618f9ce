"""Between a sweep process and the trial that it runs: no trial runs on without one.

    python guard.py MARK SECONDS COMMAND …      # with a pipe as standard input

runs the command and leaves with its exit code (128 + signal where one ended it). The sweep process writes a byte to the
pipe whenever the database has told it that the trial is still its own. When the pipe closes, since that process has
ended in whatever way, or nothing has come for SECONDS, the guard ends the command. Either way it then kills
everything that carries the mark: launchers leave ranks behind, in sessions of their own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

import psutil

MARK = "TITANS_SWEEP_TRIAL"  # in the environment of everything that a trial starts
_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # to the command, where they come to it
_TICK = 0.05  # seconds
_GRACE = 5.0  # at most, for a launcher to end its ranks on other machines


def main() -> int:
    """Run the program."""
    mark, seconds, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
    # Slurm signals all processes of a task; this is for the sweep process, which then asks the trial to save itself.
    for number in (*_PASSED, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env={**os.environ, MARK: mark}, start_new_session=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in _PASSED],
    )  # fmt: skip
    heard = time.monotonic()
    while child.poll() is None and time.monotonic() - heard < seconds:
        if select.select([0], [], [], _TICK)[0]:
            if not os.read(0, 4096):
                break
            heard = time.monotonic()
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(min(_GRACE, seconds / 4))
    kill_marked(mark)
    code = child.wait()
    return code if code >= 0 else 128 - code


def kill_marked(mark: str, seconds: float = 20.0) -> None:
    """SIGKILL every process on this machine with this mark, or this and a further word, until none runs."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # those of others, and those that have just ended
                found_mark = process.environ().get(MARK, "")
                if process.pid != os.getpid() and (found_mark == mark or found_mark.startswith(f"{mark} ")):
                    process.kill()
                    found = True
        if not found:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
