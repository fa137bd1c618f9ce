"""Last pass: choose repositories, write the splits as sharded parquet, and say in the manifest what was done."""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from titans_ds.files import atomic_folder, sha256_of, write_json

from ..errors import DataPrepError
from ..hashing import hash64
from ..shards import CORPUS
from ..splits import SPLITS, require_filled
from .assemble import CORPUS_SCHEMA, assembled_path
from .plan import FORMAT_VERSION, Plan

SHARD_BYTES = 256 * 2**20
_ROW_GROUP_BYTES = 16 * 2**20


def choose_repositories(records: Sequence[dict[str, Any]], max_repos: int | None, seed: int) -> list[dict[str, Any]]:
    """Return `max_repos` of the repositories, chosen by a hash of name and seed; all of them where it is None.

    A larger `max_repos` adds to the choice and removes none.
    """
    if max_repos is None or len(records) <= max_repos:
        return list(records)
    ranked = sorted(records, key=lambda record: (hash64(record["repo"], f"choice{seed}"), record["repo"]))
    chosen = {record["repo"] for record in ranked[:max_repos]}
    return [record for record in records if record["repo"] in chosen]


class SplitWriter:
    """Writes one split as parquet shards of about SHARD_BYTES; their final names need the number of shards."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.paths: list[Path] = []
        self.writer: pq.ParquetWriter | None = None
        self.batches: list[pa.Table] = []
        self.num_buffered = self.num_in_shard = 0

    def add(self, table: pa.Table) -> None:
        """Buffer rows; write a row group when there are enough bytes of content."""
        self.batches.append(table)
        self.num_buffered += pc.sum(table["n_bytes"]).as_py()
        if self.num_buffered >= _ROW_GROUP_BYTES:
            self._write_group()
        if self.num_in_shard >= SHARD_BYTES:
            self._end_shard()

    def close(self) -> list[Path]:
        """Finish the last shard, give all shards their names, and return them."""
        self._write_group()
        self._end_shard()
        names = [f"{self.split}-{i:05d}-of-{len(self.paths):05d}.parquet" for i in range(len(self.paths))]
        return [path.rename(self.folder / name) for path, name in zip(self.paths, names, strict=True)]

    def _write_group(self) -> None:
        if not self.batches:
            return
        if self.writer is None:
            self.paths.append(self.folder / f".{self.split}-{len(self.paths):05d}")
            self.writer = pq.ParquetWriter(self.paths[-1], CORPUS_SCHEMA, compression="zstd")
        table = pa.concat_tables(self.batches).combine_chunks()
        self.writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.num_in_shard += self.num_buffered
        self.batches, self.num_buffered = [], 0

    def _end_shard(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer, self.num_in_shard = None, 0


def write_corpus(
    plan: Plan, chosen: Sequence[dict[str, Any]], out: Path, report: dict[str, Any], command: str
) -> dict[str, Any]:
    """Write the chosen repositories to folder `out`, whole or not at all, and return the manifest.

    report: the counts of the passes before this one (`filters`, `rejected`, `seconds`).
    """
    require_filled(Counter(record["split"] for record in chosen), plan.settings.split_ratios)
    split_by_repo = {record["repo"]: record["split"] for record in chosen}
    with atomic_folder(out, CORPUS) as folder:
        writers = {split: SplitWriter(folder, split) for split in SPLITS}
        for bucket in range(plan.num_buckets):
            _write_bucket(assembled_path(plan, bucket), split_by_repo, writers)
        paths = {split: writer.close() for split, writer in writers.items()}
        manifest = _manifest(plan, chosen, paths, report, command)
        write_json(folder / "manifest.json", manifest)
    return manifest


def _write_bucket(path: Path, split_by_repo: dict[str, str], writers: dict[str, SplitWriter]) -> None:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            table = pa.Table.from_batches([reader.get_batch(number)])
            splits = pa.array([split_by_repo.get(repo) for repo in table["repo"].to_pylist()], type=pa.string())
            for split, writer in writers.items():
                part = table.filter(pc.equal(splits, split))
                if part.num_rows:
                    writer.add(part)


def _manifest(
    plan: Plan,
    chosen: Sequence[dict[str, Any]],
    paths: dict[str, list[Path]],
    report: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "identity": plan.identity,
        "command": command,
        "made_with": made_with(),
        "source": plan.source_description,
        "settings": plan.settings.to_json(),
        **report,
        "splits": {split: _split_record(split, chosen, files) for split, files in paths.items()},
        "licenses": dict(Counter(record["license"] for record in chosen).most_common()),
        "repositories": sorted(chosen, key=lambda record: record["repo"]),
    }


def _split_record(split: str, chosen: Sequence[dict[str, Any]], paths: list[Path]) -> dict[str, Any]:
    records = [record for record in chosen if record["split"] == split]
    return {
        "repositories": len(records),
        "files": sum(record["files"] for record in records),
        "shards": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
    }


def made_with() -> dict[str, str]:
    """Return the versions of what can change the result."""
    versions = {}
    for name in ("duckdb", "numpy", "packaging", "pyarrow", "rensa"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"python": platform.python_version(), **versions}


def require_left(filters: Sequence[dict[str, Any]]) -> None:
    """Raise DataPrepError naming the first filter that left nothing."""
    before = None
    for entry in filters:
        if not entry["repositories"]:
            found = f" of {before['files']} files in {before['repositories']} repositories" if before else ""
            raise DataPrepError(
                f"Nothing is left after the filter {entry['filter']!r}{found}. Relax that filter "
                "(`--help` lists the options) or give another source."
            )
        before = entry
