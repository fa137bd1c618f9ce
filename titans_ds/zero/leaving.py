"""The end of a process that was a rank of torch.distributed."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, NoReturn, cast

import torch

from titans_ds.zero.heartbeat import stop_heartbeat


def stop_ranks() -> None:
    """Leave torch.distributed, all ranks together."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a rank that leaves while another still talks to it can abort
        stop_heartbeat()
        torch.distributed.destroy_process_group()


def leave_at_once(code: int) -> NoReturn:
    """End this process where another rank is gone: to take leave of torch.distributed would wait for that one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End this process with an exit code, once all that was registered for its end has run.

    Python's own end is left out: gloo's threads free the tensors of a collective some time after it, and one that does
    so while the interpreter is taken down aborts the process ("terminate called without an active exception", SIGABRT).
    """
    cast(Any, threading)._shutdown()  # as Python does before its atexit functions
    atexit._run_exitfuncs()
    mpi = cast(Any, sys.modules.get("mpi4py.MPI"))
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # else mpirun reports a rank that died
    leave_at_once(code)
