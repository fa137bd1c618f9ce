"""Where files come from. One module a kind of source; `base.py` says what a source is."""

from __future__ import annotations

from .base import Source, SourceFile, Unit
from .installed import InstalledPackages

__all__ = ["InstalledPackages", "Source", "SourceFile", "Unit"]
