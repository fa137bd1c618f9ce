"""What decides which files and repositories enter a corpus. The same settings and source give the same corpus."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import DataPrepError

WORK = "a corpus"  # what start_work is told
ORDERS = ("depth", "imports")


@dataclass(frozen=True)
class CorpusSettings:
    """The filters, the order of files and the split.

    `min_stars` holds where stars are known; `licenses` (SPDX identifiers, empty: any) where the licence is known,
    or for every repository with `require_license`. `max_files_per_repo` keeps the first files in reading order.
    """

    min_files: int = 3
    min_stars: int = 5
    max_file_bytes: int = 1_000_000
    licenses: tuple[str, ...] = ()
    require_license: bool = False
    require_import: bool = True
    require_parse: bool = False
    keep_generated: bool = False
    near_duplicates: bool = True
    near_duplicate_threshold: float = 0.85
    order: str = "depth"
    max_repos: int | None = None
    max_files_per_repo: int | None = None
    seed: int = 0
    split_ratios: tuple[float, float, float] = (90.0, 5.0, 5.0)
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Check the values together, of which the options check each alone; DataPrepError names the option."""
        if self.max_files_per_repo is not None and self.max_files_per_repo < self.min_files:
            raise DataPrepError(
                f"--max-files-per-repo {self.max_files_per_repo} is below --min-files {self.min_files}: "
                "no repository could have so many files. Raise one or lower the other."
            )
        if self.require_license and not self.licenses:
            raise DataPrepError("--require-license needs --licenses, for example --licenses MIT,Apache-2.0.")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CorpusSettings:
        """Return the settings that `to_json` wrote."""
        tuples = {f.name for f in fields(cls) if isinstance(f.default, tuple)}
        return cls(**{key: tuple(v) if key in tuples else v for key, v in values.items()})


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
