"""The run folder: it explains itself."""

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
from typing_extensions import TypedDict

from titans_ds.errors import ConfigError, DataError
from titans_ds.files import Kind, check_folder, write_text
from titans_ds.reading import metric, read_json, strict_record

_PACKAGES = ("titans-ds", "torch", "transformers", "deepspeed", "safetensors", "numpy")
RUN = Kind("a run", "status.json", rb'\A\{\s*"state": "(running|finished|stopped|failed)"')
STOP = "stop"  # a file of this name asks the run to save and end
_FILES = ("config.yaml", "versions.json", "README.md", "metrics.jsonl", STOP)
_FOLDERS = ("tensorboard", "evaluation", "checkpoints", "adapter", "model")
_README = """# A run of titans-ds

`config.yaml` is the whole configuration; `launch/train.py --config config.yaml --run.dir NEW` runs it again.
`status.json` says how the run stands, `versions.json` what it ran on. `metrics.jsonl` has one line per logged step and
per evaluation (losses in nats a token); `tensorboard/` the same as curves. `evaluation/` has the losses by repository.
`checkpoints/` is what the run goes on from with `--resume auto`. A file `stop` made here ends it after a checkpoint.
`adapter/` is the trained memory: `titans_ds.TitansModel.from_pretrained(BASE, "adapter")`. `model/` is there where the
base model was trained, too.
"""


@strict_record
class _Status(TypedDict):
    state: str


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
            ConfigError: there is a run in it, and `overwrite` is off.
            OutputError: there is something else than a run in it, or it can't be written.
        """
        folder = cls.check(path, overwrite)
        if folder.exists():
            _clear(folder)
        run = cls(folder)
        run.status("running", step=0)
        run._describe(config_yaml)
        return run

    @staticmethod
    def check(path: str | Path, overwrite: bool) -> Path:
        """The folder, where `create` could make the run. Raises what `create` raises."""
        folder = check_folder(path, RUN)
        if (folder / RUN.marker).exists() and not overwrite:
            raise ConfigError(
                f"{folder} holds a run already; choose another run.dir, set run.resume to auto to go on from its "
                "newest checkpoint, or run.overwrite to true"
            )
        return folder

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
            return bool(read_json(self.path / RUN.marker, _Status)["state"] != "finished")
        except DataError:
            return False

    def _describe(self, config_yaml: str) -> None:
        self.write("config.yaml", config_yaml)
        self.write("versions.json", json.dumps(versions(), indent=2) + "\n")
        self.write("README.md", _README)

    def _cut_metrics(self, step: int, evaluate_again: bool) -> None:
        """Keep the lines up to `step`; a line that a killed run left torn goes, too."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            kept = [
                line for line in path.read_bytes().splitlines(keepends=True) if _belongs(line, step, evaluate_again)
            ]
            self.write("metrics.jsonl", b"".join(kept).decode())

    def status(self, state: str, **details: Any) -> None:
        """Write status.json: state is running, finished, stopped or failed."""
        self.write("status.json", json.dumps({"state": state, **details}, indent=2) + "\n")

    def read_json(self, name: str) -> Any | None:
        """A JSON file that the run wrote; None where there is none that can be read."""
        try:
            return read_json(self.path / name, Any)
        except DataError:
            return None

    def write(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        write_text(self.path / name, text)


def _belongs(line: bytes, step: int, evaluate_again: bool) -> bool:
    values = metric(line)
    if values is None or not line.endswith(b"\n"):
        return False
    again = evaluate_again and values["kind"] == "evaluation"
    return bool(values["step"] <= step - again)


def _clear(folder: Path) -> None:
    """Remove what a run made, but for status.json: it tells a run folder, also where this is interrupted."""
    for entry in (folder / name for name in (*_FILES, *_FOLDERS)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


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
