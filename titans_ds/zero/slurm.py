"""This process's place among the ranks of a Slurm step, where srun itself starts one task a rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from titans_ds.errors import ConfigError

_FIRST = re.compile(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?")
_PORTS = range(20000, 28000)  # below those that Linux gives to outgoing connections


def under_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process as one of several, and no other launcher did so inside it."""
    others = ("RANK", "OMPI_COMM_WORLD_RANK")
    step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    return step and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and not any(n in environment for n in others)


def place(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """torch.distributed's variables out of Slurm's: the first node is the master, on a port by job and step.

    MASTER_ADDR and MASTER_PORT win where they are set.

    Raises:
        ConfigError: srun has not said which nodes the step has.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    if not nodes:
        raise ConfigError("srun started this process, but SLURM_STEP_NODELIST is not set; set MASTER_ADDR to a node")
    step = environment["SLURM_STEP_ID"]
    number = int(environment.get("SLURM_JOB_ID", "0")) * 7 + (int(step) if step.isdigit() else 0)
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": tasks_here(environment),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(_PORTS[number % len(_PORTS)])),
    }


def first_node(nodes: str) -> str:
    """The first host of Slurm's way of writing a list: gpu[003-006,9],big1 -> gpu003."""
    match = _FIRST.match(nodes)
    if match is None:
        raise ConfigError(f"{nodes!r} is no list of Slurm's nodes; set MASTER_ADDR to one of them")
    return "".join(part or "" for part in match.groups())


def tasks_here(environment: Mapping[str, str]) -> str:
    """Tasks of this node, out of a list such as 4(x2),3 and this node's number in the step."""
    number, counts = int(environment.get("SLURM_NODEID", "0")), []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(number, len(counts) - 1)]
