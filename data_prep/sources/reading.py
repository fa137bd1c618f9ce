"""What comes from data of unknown origin and meets the file system: its files, its links, and its names."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from functools import lru_cache
from pathlib import Path

_MAX_COMPONENT = 120
_NOT_PLAIN = re.compile(r"[^\w.+-]")


def read_regular_file(path: Path, max_bytes: int, root: Path) -> tuple[bytes | None, str]:
    """Return (content, "") or (None, problem): "missing", "link", "not_a_file", "too_large" or "unreadable".

    Nothing outside `root` is read: "link" also where a folder on the way is a link that leaves it.
    """
    try:
        real_root = _real(root)
        if os.path.commonpath([_real(path.parent), real_root]) != real_root:
            return None, "link"
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
    except (OSError, ValueError):  # a null character in the path is a ValueError
        return None, "unreadable"


@lru_cache(maxsize=4096)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)


def path_component(text: str) -> str:
    """Return a name for one file or folder, whatever the text: the text itself where that is safe.

    Letters, digits and "._+-" stay, anything else becomes "_"; no leading dot, 120 characters at most. Where something
    was changed, eight digits of a hash follow, so that two texts don't share a name.
    """
    plain = _NOT_PLAIN.sub("_", text).lstrip(".")
    if plain == text and 0 < len(plain.encode()) <= _MAX_COMPONENT:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    short = plain.encode("ascii", "replace").decode().replace("?", "_")[: _MAX_COMPONENT - 9]
    return f"{short or '_'}-{digest}"
