"""Why ranks can't start, in words that say what to do."""

from __future__ import annotations

import os

from torch import distributed as dist

from titans_ds.errors import ConfigError

_PORT_IN_USE = ("EADDRINUSE", "Address already in use", "address already in use")


def check_mpi() -> None:
    """Raise ConfigError where mpirun started this process, and mpi4py or its libmpi is missing."""
    try:
        from mpi4py import MPI  # noqa: F401
    except Exception as error:  # mpi4py raises ImportError or RuntimeError, by its version
        raise ConfigError(
            f"mpirun started this process, but mpi4py can't be used ({_first_line(error)}). Install an MPI library and "
            "mpi4py (Debian: apt-get install openmpi-bin libopenmpi-dev; then pip install mpi4py), or start with "
            "deepspeed or torchrun"
        ) from error


def explain(error: Exception) -> Exception:
    """A ConfigError in place of an error of torch.distributed that a user can mend; else the error itself."""
    if any(text in str(error) for text in _PORT_IN_USE):
        port = os.environ.get("MASTER_PORT", "29500")
        return ConfigError(
            f"port {port} of {os.environ.get('MASTER_ADDR', 'this host')} is in use, perhaps by another run; choose a "
            "free one: deepspeed --master_port N, torchrun --master_port N, accelerate launch --main_process_port N, "
            "or for mpirun the environment variable MASTER_PORT"
        )
    if isinstance(error, dist.DistError):
        world, master = os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_ADDR")
        return ConfigError(
            f"the {world} ranks did not find one another at {master}, port {os.environ.get('MASTER_PORT')} "
            f"({_first_line(error)}). Look whether every node started its ranks, whether that address can be reached "
            "from all of them (firewall), and whether NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, if set, names a "
            "network card that all of them have"
        )
    return error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
