"""Files in a folder that machines share, over NFS too: whole or absent, and named by one process alone."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from launch.sweeping.errors import SweepError

_FIXED = 1024  # bytes


def publish_once(path: Path, content: dict[str, Any]) -> bool:
    """Write a JSON file under a name that nobody has taken. Returns whether this process did; of many, one does.

    link(2) is atomic on NFS as well. Its reply may be lost and the call repeated, which then fails although it worked:
    the number of links of the file tells.

    Raises:
        SweepError: the file system has no hard links.
    """
    partial = _partial(path, content)
    problem = None
    try:
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError as error:
            problem = error
        won = os.stat(partial).st_nlink == 2
    finally:
        partial.unlink()
    if problem is not None and not won:
        raise SweepError(f"{path.parent}: hard links are needed, and can't be made there ({problem}); move the study")
    return won


def replace(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, in place of one that is there."""
    os.replace(_partial(path, content), path)


def overwrite(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file in place, in one call and always at the same length.

    An NFS client sees a change inside a file when it opens it; that a name means another file, up to a minute later.
    """
    text = json.dumps(content).ljust(_FIXED).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text, 0)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None where there is none, or none that can be read now."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def publish_folder(partial: Path, final: Path) -> bool:
    """Give a folder its name, if nobody has given it to another: of many processes one succeeds."""
    _flush(partial)
    try:
        os.rename(partial, final)  # fails on a folder that is not empty
    except OSError:
        return False
    _flush(final.parent)
    return True


def _partial(path: Path, content: dict[str, Any]) -> Path:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return partial


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
