"""First pass: read every chunk once, filter its files one by one, and lay them out by bucket of repositories.

A chunk becomes `scan/chunk-00012.json` (counts; its presence means that the chunk is done), `scan/chunk-00012.parquet`
(hashes only: what the duplicate search reads) and runs `scan/chunk-00012-000.arrow`: Arrow files whose batch number b
holds the files of bucket b, so that the second pass reads one bucket of all runs without touching the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from titans_ds.files import atomic_file, write_json
from titans_ds.reading import read_json, strict_record

from ..hashing import hash64, hash128
from ..sources.base import SourceFile
from .file_filters import rejection
from .plan import Plan

RUN_BYTES = 128 * 2**20

# What a file brings along from its source to the corpus.
FILE_FIELDS = [
    ("repo", pa.string()),
    ("path", pa.string()),
    ("content", pa.large_string()),
    ("license", pa.string()),
    ("stars", pa.int64()),
    ("version", pa.string()),
]
RUN_SCHEMA = pa.schema([("file_id", pa.uint64()), ("repo_hash", pa.uint64()), *FILE_FIELDS, ("home_page", pa.string())])
HASH_SCHEMA = pa.schema(
    [
        ("file_id", pa.uint64()),
        ("repo_hash", pa.uint64()),
        ("path_hash", pa.uint64()),
        ("stars", pa.int64()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
    ]
)
_BOM = b"\xef\xbb\xbf"


@strict_record
class _Counts(TypedDict):
    read: int
    rejected: dict[str, int]
    runs: int


@dataclass
class _Scan:
    """What one chunk has produced so far."""

    plan: Plan
    number: int
    rejected: Counter[str] = field(default_factory=Counter)
    hashes: list[tuple[Any, ...]] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    num_bytes: int = 0
    num_read: int = 0
    num_runs: int = 0
    repo_hashes: dict[str, int] = field(default_factory=dict)

    def add(self, file: SourceFile) -> None:
        self.num_read += 1
        reason = rejection(file, self.plan.settings)
        if reason or file.content is None:
            self.rejected[reason or "unreadable"] += 1
            return
        content = file.content.removeprefix(_BOM)
        repo_hash = self.repo_hashes.setdefault(file.repo, hash64(file.repo))
        file_id = (self.number << 32) | self.num_read
        self.hashes.append((file_id, repo_hash, hash64(file.path), file.stars, *hash128(content)))
        origin = (file.license, file.stars, file.version, file.home_page)
        self.rows.append((file_id, repo_hash, file.repo, file.path, content, *origin))
        self.num_bytes += len(content) + 200
        if self.num_bytes >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        path = chunk_folder(self.plan) / f"chunk-{self.number:05d}-{self.num_runs:03d}.arrow"
        with atomic_file(path) as temporary:
            write_run(temporary, self.rows, self.plan)
        self.num_runs += 1
        self.rows, self.num_bytes = [], 0


def chunk_folder(plan: Plan) -> Path:
    """Return the folder of the first pass's output."""
    return plan.folder / "scan"


def chunk_done_path(plan: Plan, number: int) -> Path:
    """Return the file whose presence means that chunk `number` is finished."""
    return chunk_folder(plan) / f"chunk-{number:05d}.json"


def hash_paths(plan: Plan) -> list[Path]:
    """Return the parquet files of hashes, one a chunk."""
    return [chunk_folder(plan) / f"chunk-{number:05d}.parquet" for number in range(len(plan.chunks))]


def run_paths(plan: Plan) -> list[Path]:
    """Return all runs, in the order of chunks."""
    folder = chunk_folder(plan)
    return [
        folder / f"chunk-{number:05d}-{run:03d}.arrow"
        for number in range(len(plan.chunks))
        for run in range(read_json(chunk_done_path(plan, number), _Counts)["runs"])
    ]


def scan_chunk(job: tuple[Plan, int]) -> dict[str, Any]:
    """Scan one chunk unless it is done, and return its counts."""
    plan, number = job
    done = chunk_done_path(plan, number)
    if done.exists():
        return dict(read_json(done, _Counts))
    scan = _Scan(plan, number)
    for unit in plan.chunks[number]:
        for file in plan.source.read(unit, plan.settings.max_file_bytes):
            scan.add(file)
    scan.flush()
    columns = zip(*scan.hashes, strict=True) if scan.hashes else [()] * len(HASH_SCHEMA)
    arrays = [pa.array(values, type=kind.type) for values, kind in zip(columns, HASH_SCHEMA, strict=True)]
    with atomic_file(done.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.table(arrays, schema=HASH_SCHEMA), temporary)
    counts = {"read": scan.num_read, "rejected": dict(sorted(scan.rejected.items())), "runs": scan.num_runs}
    write_json(done, counts)
    return counts


def write_run(path: Path, rows: list[tuple[Any, ...]], plan: Plan) -> None:
    """Write rows (RUN_SCHEMA's order) as one Arrow file with a batch for every bucket."""
    rows.sort(key=lambda row: row[1])
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, RUN_SCHEMA, options=options) as writer:
        start = 0
        for bucket in range(plan.num_buckets):
            end = start
            while end < len(rows) and plan.bucket_of(rows[end][1]) == bucket:
                end += 1
            writer.write_batch(_batch(rows[start:end]))
            start = end


def _batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(RUN_SCHEMA)
    arrays = []
    for values, kind in zip(columns, RUN_SCHEMA, strict=True):
        if kind.name == "content":
            # The bytes are valid UTF-8 (the filter has decoded them): reinterpret, do not decode again.
            arrays.append(pa.array(values, type=pa.large_binary()).view(pa.large_string()))
        else:
            arrays.append(pa.array(values, type=kind.type))
    return pa.record_batch(arrays, schema=RUN_SCHEMA)


def read_bucket(paths: list[Path], bucket: int) -> Iterator[pa.RecordBatch]:
    """Yield one bucket's batch of every run."""
    for path in paths:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(bucket)
            if batch.num_rows:
                yield batch
