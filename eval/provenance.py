"""Where a result comes from: versions, git commit, machine, command. Part of every run folder."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "titans-ds", "rapidfuzz", "tree-sitter", "tree-sitter-python", "scipy", "numpy")


def describe_environment() -> dict[str, Any]:
    """Return versions, git_commit (None outside a checkout), machine and command."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "git_commit": _git_commit(),
        "machine": _machine(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
