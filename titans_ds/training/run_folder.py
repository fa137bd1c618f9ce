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
STOP = "stop"  # a file of this name asks the run to save and end
_README = """# A run of titans-ds

`config.yaml` is the whole configuration; `launch/train.py --config config.yaml --run.dir NEW` runs it again.
`status.json` says how the run stands, `versions.json` what it ran on. `metrics.jsonl` has one line per logged step and
per evaluation (losses in nats a token); `tensorboard/` the same as curves. `evaluation/` has the losses by repository.
`checkpoints/` is what the run goes on from with `--resume auto`. A file `stop` made here ends it after a checkpoint.
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
        if folder.exists() and (not folder.is_dir() or any(p.suffix != ".part" for p in folder.iterdir())):
            if not (folder / "status.json").is_file():
                raise ConfigError(f"{folder} exists and is no run folder; choose another run.dir")
            if not overwrite:
                raise ConfigError(
                    f"{folder} holds a run already; choose another run.dir, set run.resume to auto to go on from its "
                    "newest checkpoint, or run.overwrite to true"
                )
            _clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.status("running", step=0)
        run._describe(config_yaml)
        return run

    @classmethod
    def reopen(cls, path: str | Path, config_yaml: str, step: int, evaluate_again: bool) -> RunFolder:
        """The folder of a run that goes on from the checkpoint of `step`: what came after it is dropped.

        Args:
            path: of the folder.
            config_yaml: the configuration that it goes on with.
            step: of the checkpoint.
            evaluate_again: the evaluation of this step is made anew.
        """
        run = cls(Path(path))
        (run.path / STOP).unlink(missing_ok=True)
        run._cut_metrics(step, evaluate_again)
        run.status("running", step=step)
        run._describe(config_yaml)
        return run

    @property
    def asked_to_stop(self) -> bool:
        """Whether somebody made a file `stop` in the folder: a signal for launchers that pass none on."""
        return (self.path / STOP).exists()

    @property
    def unfinished(self) -> bool:
        """Whether there is a run in the folder that did not come to its end."""
        try:
            state = json.loads((self.path / "status.json").read_text(encoding="utf-8"))["state"]
        except (OSError, ValueError, KeyError):
            return False
        return bool(state != "finished")

    def _describe(self, config_yaml: str) -> None:
        self.write("config.yaml", config_yaml)
        self.write("versions.json", json.dumps(versions(), indent=2) + "\n")
        self.write("README.md", _README)

    def _cut_metrics(self, step: int, evaluate_again: bool) -> None:
        """Keep the lines up to `step`; a line that a killed run left torn goes, too."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            self.write("metrics.jsonl", "".join(line for line in lines if _belongs(line, step, evaluate_again)))

    def status(self, state: str, **details: Any) -> None:
        """Write status.json: state is running, finished, stopped or failed."""
        self.write("status.json", json.dumps({"state": state, **details}, indent=2) + "\n")

    def read_json(self, name: str) -> Any | None:
        """A JSON file that the run wrote; None where there is none."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, text: str) -> None:
        """Write a text file."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)


def _belongs(line: str, step: int, evaluate_again: bool) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    again = evaluate_again and values["kind"] == "evaluation"
    return bool(line.endswith("\n") and values["step"] <= step - again)


def _clear(folder: Path) -> None:
    """Remove all but status.json, which tells a run folder, also where this is interrupted."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "status.json":
            entry.unlink()


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
