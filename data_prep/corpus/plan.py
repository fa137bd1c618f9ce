"""The plan of a corpus: its source cut into chunks, the settings, and the folder in which unfinished work is kept.

The chunks depend on the source alone, never on the number of shards or workers. That is why a stopped run can go
on, and why shards give the same corpus whatever their number.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from titans_ds.files import start_work, write_json
from titans_ds.reading import read_json, strict_record

from ..errors import DataPrepError
from ..settings import WORK, CorpusSettings, fingerprint
from ..sources.base import Source, Unit

FORMAT_VERSION = 1
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4 * 2**20, 128 * 2**20
BUCKET_BYTES = 64 * 2**20
_MAX_BUCKET_BITS = 10


@strict_record
class _PlanFile(TypedDict):
    identity: str


@dataclass(frozen=True)
class Plan:
    """What every process of a build needs to know.

    `folder` holds the unfinished work; `identity` is a hash of everything that decides the corpus.
    """

    source: Source
    settings: CorpusSettings
    chunks: tuple[tuple[Unit, ...], ...]
    bucket_bits: int
    folder: Path
    source_description: dict[str, Any]
    identity: str

    @property
    def num_buckets(self) -> int:
        """A bucket holds whole repositories: those whose hash begins with the bucket's number."""
        return 1 << self.bucket_bits

    def bucket_of(self, repo_hash: int) -> int:
        """Return the bucket of a repository's 64-bit hash."""
        return repo_hash >> (64 - self.bucket_bits)

    def describe(self) -> dict[str, object]:
        """Return the plan as written to plan.json."""
        return {
            "identity": self.identity,
            "chunks": len(self.chunks),
            "source": self.source_description,
            "settings": self.settings.to_json(),
        }


def make_plan(source: Source, settings: CorpusSettings, work_folder: Path) -> Plan:
    """List the source and cut it into chunks; nothing is written yet. DataPrepError when the source is empty."""
    description = source.describe()
    units = source.list_units()
    if not units:
        raise DataPrepError(f"The source has nothing to read: {description}. Check the path or the options.")
    total = sum(unit.num_bytes for unit in units)
    chunks = tuple(_chunks(units, min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, total // 16))))
    identity = fingerprint([FORMAT_VERSION, description, settings.to_json(), [[u.key for u in c] for c in chunks]])
    # One bit at least, so that a shift by 64 never occurs.
    bits = min(_MAX_BUCKET_BITS, max(1, (total // BUCKET_BYTES).bit_length()))
    return Plan(source, settings, chunks, bits, work_folder, description, identity)


def _chunks(units: Sequence[Unit], chunk_bytes: int) -> list[tuple[Unit, ...]]:
    chunks: list[tuple[Unit, ...]] = []
    current: list[Unit] = []
    size = 0
    for unit in units:
        if current and size + unit.num_bytes > chunk_bytes:
            chunks.append(tuple(current))
            current, size = [], 0
        current.append(unit)
        size += unit.num_bytes
    return [*chunks, tuple(current)]


def claim(plan: Plan, restart: bool = False) -> Plan:
    """Write plan.json into the work folder, and return the plan with its source prepared there.

    Raises DataPrepError when the folder belongs to another build, unless `restart`, which throws that away.
    """
    start_work(plan.folder, WORK)
    path = plan.folder / "plan.json"
    if restart:
        for name in ("scan", "assembled", "signatures"):
            shutil.rmtree(plan.folder / name, ignore_errors=True)
        for part in [*plan.folder.glob("*.parquet"), *plan.folder.glob("*.npy"), path]:
            part.unlink(missing_ok=True)
    if path.exists():
        if read_json(path, _PlanFile)["identity"] != plan.identity:
            raise DataPrepError(
                f"{plan.folder} holds unfinished work with another source or other settings (see its plan.json). "
                "Run that command again to finish it, or pass --restart to throw it away, or give another --out."
            )
    else:
        write_json(path, plan.describe())
    return replace(plan, source=plan.source.prepare(plan.folder, plan.settings))
