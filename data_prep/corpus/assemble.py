"""Second pass: one bucket at a time, put repositories together, filter them as wholes and order their files.

A bucket becomes `assembled/bucket-0007.arrow` (CORPUS_SCHEMA and the split; a repository's rows together, in reading
order) and `assembled/bucket-0007.json` (its repositories, and what each filter left).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from titans_ds.files import atomic_file, write_json
from titans_ds.reading import read_json, strict_record

from ..settings import CorpusSettings
from ..splits import split_of
from .imports import ImportResolver, scan_imports
from .plan import Plan
from .reading_order import order_by_depth, order_by_imports
from .scan import FILE_FIELDS, RUN_SCHEMA, read_bucket, run_paths

CORPUS_SCHEMA = pa.schema([*FILE_FIELDS, ("file_index", pa.int32()), ("n_bytes", pa.int64())])
# In the order in which they are applied.
REPOSITORY_FILTERS = ("same_path", "min_files", "min_stars", "import_inside", "max_files_per_repo")


@strict_record
class _Bucket(TypedDict):
    filters: dict[str, list[int]]
    repositories: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class AssembleJob:
    """One bucket, and the parquet files that list the files to leave out (file_id, repo_hash)."""

    plan: Plan
    bucket: int
    dropped: tuple[Path, ...]


def assembled_path(plan: Plan, bucket: int) -> Path:
    """Return the Arrow file of a finished bucket; beside it lies the JSON whose presence means that it is done."""
    return plan.folder / "assembled" / f"bucket-{bucket:04d}.arrow"


def assemble_bucket(job: AssembleJob) -> dict[str, Any]:
    """Assemble one bucket unless it is done, and return its record: `filters` and `repositories`."""
    path = assembled_path(job.plan, job.bucket)
    done = path.with_suffix(".json")
    if done.exists():
        return dict(read_json(done, _Bucket))
    table = _load(job)
    counts = {name: [0, 0] for name in REPOSITORY_FILTERS}
    repositories: list[dict[str, Any]] = []
    kept: list[int] = []
    index: list[int] = []
    for rows in _repositories(table):
        ordered = _Repository(table, rows, job.plan.settings).filtered(counts)
        if ordered:
            kept += ordered
            index += range(len(ordered))
            repositories.append(_record(table, ordered, job.plan.settings))
    _write(path, table.take(pa.array(kept, type=pa.int64())), index)
    record = {"filters": counts, "repositories": repositories}
    write_json(done, record)
    return record


def _load(job: AssembleJob) -> pa.Table:
    batches = list(read_bucket(run_paths(job.plan), job.bucket))
    table = pa.Table.from_batches(batches, schema=RUN_SCHEMA)
    first = job.bucket << (64 - job.plan.bucket_bits)
    last = first + (1 << (64 - job.plan.bucket_bits)) - 1
    # As scalars: Arrow takes a plain Python number for a signed one.
    here = pc.field("repo_hash") >= pa.scalar(first, pa.uint64())
    here &= pc.field("repo_hash") <= pa.scalar(last, pa.uint64())
    for path in job.dropped:
        ids = pq.read_table(path, columns=["file_id"], filters=here)["file_id"].combine_chunks()
        table = table.filter(pc.invert(pc.is_in(table["file_id"], value_set=ids)))
    return table.sort_by([("repo_hash", "ascending"), ("repo", "ascending"), ("file_id", "ascending")])


def _repositories(table: pa.Table) -> Iterable[range]:
    """Yield the row numbers of each repository."""
    names = table["repo"].to_pylist()
    start = 0
    for row in range(1, len(names) + 1):
        if row == len(names) or names[row] != names[start]:
            yield range(start, row)
            start = row


class _Repository:
    """One repository's rows, on their way through the filters."""

    def __init__(self, table: pa.Table, rows: range, settings: CorpusSettings) -> None:
        self.table = table
        self.settings = settings
        self.name = table["repo"][rows[0]].as_py()
        self.row_of: dict[str, int] = {}
        for row in rows:
            self.row_of.setdefault(table["path"][row].as_py(), row)

    def filtered(self, counts: dict[str, list[int]]) -> list[int]:
        """Return the rows that stay, in reading order; adds to `counts` (files, repositories) what each filter
        leaves."""
        settings = self.settings
        self._passed(counts["same_path"])
        if len(self.row_of) < settings.min_files:
            return []
        self._passed(counts["min_files"])
        stars = self.table["stars"][next(iter(self.row_of.values()))].as_py()
        if stars is not None and stars < settings.min_stars:
            return []
        self._passed(counts["min_stars"])
        needs = self._needs() if settings.require_import or settings.order == "imports" else {}
        if settings.require_import and not any(needs.values()):
            return []
        self._passed(counts["import_inside"])
        ordered = self._ordered(needs)[: settings.max_files_per_repo]
        counts["max_files_per_repo"][0] += len(ordered)
        counts["max_files_per_repo"][1] += 1
        return [self.row_of[path] for path in ordered]

    def _passed(self, count: list[int]) -> None:
        count[0] += len(self.row_of)
        count[1] += 1

    def _needs(self) -> dict[str, list[str]]:
        resolver = ImportResolver(self.row_of, self.name)
        needs: dict[str, list[str]] = {}
        for path in order_by_depth(list(self.row_of)):
            text = self.table["content"][self.row_of[path]].as_py()
            needs[path] = resolver.resolve(path, scan_imports(text))
            # For the paper's order one import is enough to know.
            if needs[path] and self.settings.order == "depth":
                break
        return needs

    def _ordered(self, needs: dict[str, list[str]]) -> list[str]:
        if self.settings.order == "imports":
            return order_by_imports(list(self.row_of), needs)
        return order_by_depth(list(self.row_of))


def _record(table: pa.Table, rows: Sequence[int], settings: CorpusSettings) -> dict[str, Any]:
    first = {name: table[name][rows[0]].as_py() for name in ("repo", "license", "version", "stars", "home_page")}
    split = split_of(first["repo"], settings.split_ratios, settings.split_seed)
    return {**first, "split": split, "files": len(rows)}


def _write(path: Path, table: pa.Table, file_index: list[int]) -> None:
    sizes = pc.cast(pc.binary_length(table["content"]), pa.int64())
    columns = [table[name] for name in CORPUS_SCHEMA.names[:6]]
    table = pa.table([*columns, pa.array(file_index, type=pa.int32()), sizes], schema=CORPUS_SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        atomic_file(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, CORPUS_SCHEMA, options=options) as writer,
    ):
        writer.write_table(table, max_chunksize=4096)
