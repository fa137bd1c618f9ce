"""Read a file of unknown origin without following links or running out of memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_regular_file(path: Path, max_bytes: int) -> tuple[bytes | None, str]:
    """Return (content, "") or (None, problem): "missing", "link", "not_a_file", "too_large" or "unreadable"."""
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            return None, "link"
        if not stat.S_ISREG(status.st_mode):
            return None, "not_a_file"
        if status.st_size > max_bytes:
            return None, "too_large"
        return path.read_bytes(), ""
    except FileNotFoundError:
        return None, "missing"
    except OSError:
        return None, "unreadable"
