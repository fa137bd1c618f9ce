"""Names, sizes and times of files, so that a changed source is noticed before an old result is used again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataPrepError
from ..settings import fingerprint

# Folders of tools and environments: not the repository's own code.
_SKIPPED_FOLDERS = frozenset(
    {".git", ".hg", ".svn", ".tox", ".nox", ".venv", "venv", "__pycache__", "node_modules", "site-packages"}
)


def walk_files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below `root` with one of the suffixes, sorted. Links to folders are not followed (they may
    loop)."""
    waiting = [str(root)]
    while waiting:  # os.walk calls itself, and fails a thousand folders deep
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # not readable, or a path longer than the system takes
            continue
        below = [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]
        waiting += reversed([path for path in below if os.path.basename(path) not in _SKIPPED_FOLDERS])
        for entry in found:
            if entry.name.endswith(suffixes) and not entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def listing_hash(paths: Iterable[Path]) -> str:
    """Return a hash of the files' names, sizes and modification times."""
    entries = []
    for path in paths:
        with contextlib.suppress(OSError):  # it has vanished, or its path is too long: it will be counted as such
            status = path.lstat()
            entries.append([str(path), status.st_size, status.st_mtime_ns])
    return fingerprint(entries)


def size_of(path: Path) -> int:
    """Return the size in bytes, 0 for what has vanished."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def require_folder(path: Path, expected: str) -> None:
    """Raise DataPrepError unless `path` is a folder; `expected` says what it should hold."""
    if not path.is_dir():
        raise DataPrepError(f"{path} is not a folder. Expected {expected}.")
