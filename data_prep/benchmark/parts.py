"""Finished repositories of a benchmark build, kept beside its output, so that a stopped build goes on with the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from titans_ds.files import write_json
from titans_ds.reading import read_json

from .repository import Repository


class Parts:
    """Results by repository and stage, each named by a hash of everything that decides it.

    So a part made with other files or settings is never found again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = json.dumps(settings, sort_keys=True, default=str)

    def get(self, stage: str, repository: Repository, *decided_by: Any) -> Any | None:
        """Return what was `put` for the same repository, files, settings and `decided_by`; None where nothing was."""
        path = self._path(stage, repository, decided_by)
        return read_json(path, Any) if path.is_file() else None

    def put(self, value: Any, stage: str, repository: Repository, *decided_by: Any) -> None:
        """Keep a JSON value."""
        write_json(self._path(stage, repository, decided_by), value)

    def _path(self, stage: str, repository: Repository, decided_by: tuple[Any, ...]) -> Path:
        digest = hashlib.sha256(json.dumps([self._settings, stage, repository.label, decided_by]).encode())
        for path, text in repository.files.items():
            digest.update(f"\0{path}\0{text}".encode("utf-8", "surrogatepass"))
        return self.folder / f"{stage}-{digest.hexdigest()[:32]}.json"
