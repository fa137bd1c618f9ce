"""Save and restore a run: everything that its next step depends on, by all ranks together."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titans_ds.errors import CheckpointError
from titans_ds.training import ranks
from titans_ds.training.checkpoints import files
from titans_ds.training.checkpoints.lane_states import load_lane_states, save_lane_states
from titans_ds.training.checkpoints.random_state import load_random_state, save_random_state
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.engine import Engine
from titans_ds.training.step import Carried

logger = logging.getLogger("titans_ds")


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from.

    Args:
        path: its folder.
        marker: its completion marker.
    """

    path: Path
    marker: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were done when the checkpoint was written."""
        return int(self.marker["progress"]["step"])

    @property
    def universal(self) -> bool:
        """Whether its engine part is in DeepSpeed's universal format, for any number of ranks."""
        return bool(self.marker["universal"])


class Checkpoints:
    """Writes checkpoints of one run. Every rank has one; all methods are collectives.

    Args:
        root: RUN/checkpoints, the same folder on all ranks.
        keep: checkpoints that stay; older ones are removed.
        identity: what a run must share with a checkpoint to go on from it, see titans_ds.training.checkpoints.resume.
        config_yaml: the run's configuration, stored beside.
        vocab_size: the corpus's, which a base model of random weights takes.
    """

    def __init__(self, root: Path, keep: int, identity: dict[str, Any], config_yaml: str, vocab_size: int) -> None:
        self.root, self.keep, self.identity = root, keep, identity
        self.config_yaml, self.vocab_size = config_yaml, vocab_size

    def save(self, engine: Engine, progress: dict[str, int], lanes: Lanes, carried: Carried) -> str | None:
        """Write a checkpoint. Whatever goes wrong on any rank, the checkpoints before it stay as they are.

        Returns:
            None, or on every rank alike what went wrong.
        """
        folder = files.partial_folder(self.root, progress["step"])
        described: files.Files = {}
        problem = (
            _together(lambda: self._start(folder) if ranks.rank() == 0 else None)
            or _together(lambda: self._write_rank(folder, engine, lanes, carried))
            or _together(lambda: described.update(_describe_share(folder)))
        )
        described = {name: entry for part in ranks.gather(described) for name, entry in part.items()}
        finish = ranks.rank() == 0 and not problem
        problem = problem or _together(lambda: self._finish(folder, progress, lanes, described) if finish else None)
        if problem and ranks.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return problem

    def _start(self, folder: Path) -> None:
        files.sweep(self.root)
        (folder / files.ENGINE).mkdir(parents=True)
        newest = next(iter(files.candidates(self.root)), None)
        marker = files.read_marker(newest) if newest else None
        needed = sum(int(f["bytes"]) for f in marker["files"].values()) if marker else 0
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise OSError(f"{free:,} bytes are free, the checkpoint before took {needed:,}")

    def _write_rank(self, folder: Path, engine: Engine, lanes: Lanes, carried: Carried) -> None:
        try:
            save_lane_states(folder, carried, lanes.owned)
            save_random_state(folder / f"rng_{ranks.rank():05d}.safetensors")
            if ranks.rank() == 0:
                (folder / files.CONFIG).write_text(self.config_yaml, encoding="utf-8")
        finally:
            engine.save(folder / files.ENGINE)  # also where this rank has failed already: the others wait for it

    def _finish(self, folder: Path, progress: dict[str, int], lanes: Lanes, described: files.Files) -> None:
        marker = {
            "format": 1,
            "progress": progress,
            "lanes": lanes.state_dict(),
            "world_size": ranks.world_size(),
            "universal": False,
            "vocab_size": self.vocab_size,
            "identity": self.identity,
            "files": dict(sorted(described.items())),
        }
        files.write_marker(folder, marker)
        files.publish(folder, self.root, progress["step"])
        try:
            files.prune(self.root, self.keep)
        except OSError as error:
            logger.warning("an old checkpoint in %s can't be removed: %s", self.root, error)


def restore(found: Found, engine: Engine, lanes: Lanes) -> Carried:
    """Set engine, lanes and random states to those of a checkpoint; returns the lane states. A collective.

    Raises:
        CheckpointError: a file can't be read, or does not fit the model.
    """
    try:
        engine.load(found.path / files.ENGINE, found.universal)
        lanes.load_state_dict(found.marker["lanes"])
        carried = load_lane_states(found.path, lanes.owned, engine.device)
        _restore_random_state(found.path)
    except Exception as error:  # safetensors, DeepSpeed and the lanes each have their own
        raise CheckpointError(
            f"the checkpoint {found.path} can't be loaded: {type(error).__name__}: {error}. Remove it to go on from "
            "the one before, or set run.resume to none"
        ) from error
    return carried


def _restore_random_state(folder: Path) -> None:
    path = folder / f"rng_{ranks.rank():05d}.safetensors"
    if path.is_file():
        load_random_state(path)
    else:  # more ranks than wrote the checkpoint: a state of its own, not a copy of another rank's
        torch.manual_seed(torch.initial_seed() + ranks.rank())


def _describe_share(folder: Path) -> files.Files:
    """Flush and hash this rank's share of the files: hashing all of a large checkpoint takes one rank minutes."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return files.describe(folder, paths[ranks.rank() :: ranks.world_size()])


def _together(task: Callable[[], None]) -> str | None:
    """Run a task on every rank; returns what went wrong on the first that failed, the same on all of them."""
    problem = None
    try:
        task()
    except Exception as error:  # a full disk is an OSError, a RuntimeError of torch.save, or safetensors' own
        problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    found = [f"rank {number}: {text}" for number, text in enumerate(ranks.gather(problem)) if text]
    return found[0] if found else None
