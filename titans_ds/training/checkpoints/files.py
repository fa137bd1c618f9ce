"""Checkpoint folders on disk: written whole or not at all, and recognised where they are torn.

    RUN/checkpoints/
        latest                    name of the newest checkpoint, written last
        step_0000500/
            checkpoint.json       the completion marker: what the checkpoint is of, and size and SHA-256 of its files
            config.yaml           the run's configuration
            lanes_*.safetensors   fast weights by global lane number, one file per rank
            rng_*.safetensors     random states, one file per rank
            engine/               parameters and optimizer, in the engine's own format
        step_0000500.universal/   the same for any number of ranks (launch/universal_checkpoint.py)

A checkpoint is written under a hidden name, flushed to the disk, and renamed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from titans_ds.errors import DataError
from titans_ds.files import sha256_of, sync, write_json, write_text
from titans_ds.reading import read_json, strict_record

MARKER, LATEST, CONFIG, ENGINE = "checkpoint.json", "latest", "config.yaml", "engine"
UNIVERSAL_SUFFIX = ".universal"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL, _DELETED = ".part", ".deleted"

Files = dict[str, dict[str, Any]]  # relative path -> bytes, sha256


@dataclass
class Progress:
    """Where a run stands; with the lanes' state_dict and Carried everything that a resumed run needs beside weights.

    Args:
        step: optimizer steps done (skipped ones included).
        skipped: steps without an update, because a loss or gradient was not finite.
        bad_in_a_row: steps in a row with a loss, gradient or state that was not finite.
        tokens: target tokens seen.
    """

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    tokens: int = 0


@strict_record
class _File(TypedDict):
    bytes: int
    sha256: str


@with_config(ConfigDict(extra="forbid", strict=True))
class _Progress(TypedDict):
    step: int
    skipped: int
    bad_in_a_row: int
    tokens: int


@strict_record
class _Lanes(TypedDict):
    num_lanes: int
    positions: list[Annotated[list[int], Field(min_length=2, max_length=2)]]


@strict_record
class _Marker(TypedDict):
    progress: _Progress
    lanes: _Lanes
    world_size: int
    universal: bool
    vocab_size: int
    identity: dict[str, Any]
    files: dict[str, _File]


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:07d}"


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it is renamed."""
    return root / f".{name_of(step)}{_PARTIAL}"


def describe(folder: Path, paths: Iterable[Path]) -> Files:
    """Flush files to the disk; their sizes and hashes by path relative to the folder."""
    described = {}
    for path in paths:
        sync(path)
        described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return described


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Write the completion marker and flush it: the last file of a checkpoint."""
    write_json(folder / MARKER, content)
    for child in folder.rglob("*"):
        if child.is_dir():
            sync(child)
    sync(folder)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the completion marker says, or None where there is none that can be read, or a field is missing."""
    try:
        return dict(read_json(folder / MARKER, _Marker))
    except DataError:
        return None


def damage(folder: Path, marker: dict[str, Any] | None) -> str | None:
    """Why a checkpoint can't be used, or None where all of it is as it was written, and nothing else is there.

    What lies in the folder counts, not what the marker says: a file that it does not list would be loaded, too.
    """
    if marker is None:
        return f"it has no complete {MARKER}"
    listed = marker["files"]
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    for name, path in there.items():
        if path.is_symlink() or not path.is_file():
            return f"{name} is a link or no file"
        if name not in listed and name != MARKER:
            return f"it holds {name}, which its {MARKER} does not list; take it out"
    for name, expected in listed.items():
        if name not in there:
            return f"{name} is missing"
        path = there[name]
        try:
            size, digest = path.stat().st_size, sha256_of(path)
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if digest != expected["sha256"]:
            return f"the content of {name} has changed"
    return None


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the one that `latest` names first, then from the newest to the oldest."""
    if not root.is_dir():
        return []
    found = sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)
    latest = root / LATEST
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return sorted(found, key=lambda p: p.name != named)


def publish(partial: Path, root: Path, step: int) -> Path:
    """Rename a finished checkpoint to its own name, in place of an older one of the same step; then point at it."""
    final = root / name_of(step)
    _remove(final)
    _remove(final.with_name(final.name + UNIVERSAL_SUFFIX))
    os.rename(partial, final)
    write_text(root / LATEST, final.name + "\n")
    return final


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed runs have left half-written or half-deleted."""
    for folder in sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)[keep:]:
        _remove(folder)
        _remove(folder.with_name(folder.name + UNIVERSAL_SUFFIX))
    sweep(root)


def sweep(root: Path) -> None:
    """Remove what killed runs have left half-written or half-deleted."""
    for leftover in root.iterdir() if root.is_dir() else ():
        if leftover.is_dir() and leftover.name.startswith(".") and leftover.suffix in (_PARTIAL, _DELETED, ".tmp"):
            shutil.rmtree(leftover)


def _remove(folder: Path) -> None:
    """Rename first: a folder that is being deleted is never taken for a checkpoint."""
    if folder.is_dir():
        doomed = folder.with_name(f".{folder.name}{_DELETED}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _step(folder: Path) -> int:
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else -1
