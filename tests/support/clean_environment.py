"""The environment of a process that a test starts: without what a run in the test itself has left of its ranks."""

from __future__ import annotations

import os

_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def without_ranks(**more: str) -> dict[str, str]:
    """os.environ without torch.distributed's variables, and with these."""
    return {name: value for name, value in os.environ.items() if name not in _RANKS} | more
