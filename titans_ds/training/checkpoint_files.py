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

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MARKER, LATEST, CONFIG, ENGINE = "checkpoint.json", "latest", "config.yaml", "engine"
UNIVERSAL_SUFFIX = ".universal"
_NAME = re.compile(r"step_(\d+)")
_PARTIAL, _DELETED = ".part", ".deleted"

Files = dict[str, dict[str, Any]]  # relative path -> bytes, sha256


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
        _flush(path)
        described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return described


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Write the completion marker and flush it: the last file of a checkpoint."""
    path = folder / MARKER
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _flush(path)
    for child in folder.rglob("*"):
        if child.is_dir():
            _flush(child)
    _flush(folder)


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the completion marker says, or None where there is none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "files" in content else None


def damage(folder: Path, marker: dict[str, Any] | None) -> str | None:
    """Why a checkpoint can't be used, or None where all of it is as it was written."""
    if marker is None:
        return f"it has no readable {MARKER}"
    for name, expected in marker["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if _sha256(path) != expected["sha256"]:
            return f"the content of {name} has changed"
    return None


def candidates(root: Path) -> list[Path]:
    """Checkpoint folders, the one that `latest` names first, then from the newest to the oldest."""
    if not root.is_dir():
        return []
    found = sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), key=_step, reverse=True)
    latest = root / LATEST
    named = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    return sorted(found, key=lambda p: p.name != named)


def publish(partial: Path, root: Path, step: int) -> Path:
    """Rename a finished checkpoint to its own name, in place of an older one of the same step; then point at it."""
    final = root / name_of(step)
    _remove(final)
    _remove(final.with_name(final.name + UNIVERSAL_SUFFIX))
    os.rename(partial, final)
    pointer = root / f".{LATEST}{_PARTIAL}"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _flush(pointer)
    os.replace(pointer, root / LATEST)
    _flush(root)
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
        if leftover.is_dir() and leftover.name.startswith(".") and leftover.suffix in (_PARTIAL, _DELETED):
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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
