"""Where files come from. One module a kind of source; `base.py` says what a source is."""

from __future__ import annotations

from .archives import ArchiveFolder
from .base import Source, SourceFile, Unit
from .folders import RepositoryFolders
from .installed import InstalledPackages
from .local_dataset import DatasetFiles, open_dataset
from .starcoderdata import StarCoderData

__all__ = [
    "ArchiveFolder",
    "DatasetFiles",
    "InstalledPackages",
    "RepositoryFolders",
    "Source",
    "SourceFile",
    "StarCoderData",
    "Unit",
    "open_dataset",
]
