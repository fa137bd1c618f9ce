"""The run folder: it explains itself. Every file is written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from titans_ds.errors import ConfigError

_PACKAGES = ("titans-ds", "torch", "transformers", "deepspeed", "safetensors", "numpy")
_README = """# A run of titans-ds

`config.yaml` is the whole configuration; `launch/train.py --config config.yaml --run.dir NEW` runs it again.
`status.json` says how the run stands, `versions.json` what it ran on. `metrics.jsonl` has one line per logged step and
per evaluation (losses in nats a token); `tensorboard/` the same as curves. `evaluation/` has the losses by repository.
`adapter/` is the trained memory: `titans_ds.TitansModel.from_pretrained(BASE, "adapter")`. `model/` is there where the
base model was trained, too.
"""


class RunFolder:
    """Files of one run. Only rank 0 has one.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config_yaml: str, overwrite: bool) -> RunFolder:
        """Make the folder, with its configuration, versions and status.

        Raises:
            ConfigError: there is a run in it, and `overwrite` is off; or something else than a run.
        """
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not (folder / "status.json").is_file():
                raise ConfigError(f"{folder} exists and is no run folder; choose another run.dir")
            if not overwrite:
                raise ConfigError(f"{folder} holds a run already; choose another run.dir, or set run.overwrite to true")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.status("running", step=0)
        run.write("config.yaml", config_yaml)
        run.write("versions.json", json.dumps(versions(), indent=2) + "\n")
        run.write("README.md", _README)
        return run

    def status(self, state: str, **details: Any) -> None:
        """Write status.json: state is running, finished, stopped or failed."""
        self.write("status.json", json.dumps({"state": state, **details}, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)


def versions() -> dict[str, Any]:
    """Versions of packages, the code's git commit, and the machine."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu, "python": sys.version.split()[0]}
    return {"packages": found, "git_commit": git_commit(), "machine": machine}


def git_commit() -> str | None:
    """The commit of the code that runs, marked where files have changed since; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + (" (changed)" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
