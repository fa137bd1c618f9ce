"""Ports that ranks meet on: chosen here, and bound some seconds later by a process that is only then started."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections import deque

from titans_ds.errors import ConfigError

# Below those that Linux gives to outgoing connections and to sockets that ask for any; 20000 on are Slurm's (slurm.py).
_PORTS = range(10_000, 20_000)
_KEPT = 32
_marks: deque[socket.socket] = deque()


def free_port() -> int:
    """A port that nobody listens on here, and that no other process gets from this function, while this one lives.

    Raises:
        ConfigError: there is none.
    """
    candidates = random.SystemRandom().sample(_PORTS, len(_PORTS))  # forked processes share the state of others
    port = next((port for port in candidates if _nobody_listens(port) and _mark(port)), None)
    if port is None:
        raise ConfigError(f"all ports from {_PORTS.start} to {_PORTS.stop - 1} of {socket.gethostname()} are in use")
    return port


def _nobody_listens(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def _mark(port: int) -> bool:
    """Take a name that the kernel gives to one process alone, until that closes it or ends; whether it was free.

    The newest of this process's are kept: ranks that are to meet on an older port have done so.
    """
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0titans_ds/port/{port}")  # an abstract name, which leaves no file
    except OSError as error:
        mark.close()
        return error.errno != errno.EADDRINUSE  # a system without such names
    _marks.append(mark)
    if len(_marks) > _KEPT:
        _marks.popleft().close()
    return True
