"""A corpus folder as programs read it: its manifest and its parquet shards, both checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import NotRequired, TypedDict

from titans_ds.errors import DataError
from titans_ds.files import Kind
from titans_ds.reading import read_json, strict_record

from .splits import SPLITS

CORPUS = Kind("a corpus", "manifest.json", rb'"identity":\s*"[0-9a-f]{64}"')
_REMEDY = "Expected a folder that data_prep.build_corpus wrote; build it again."
_IS = {
    "repo": pa.types.is_string,
    "path": pa.types.is_string,
    "content": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "n_bytes": pa.types.is_integer,
}


@strict_record
class _Repository(TypedDict):
    repo: str
    split: str
    files: int
    license: str | None
    version: str | None
    stars: int | None
    home_page: NotRequired[str | None]


@strict_record
class _Settings(TypedDict):
    min_files: int
    split_ratios: list[float]


@strict_record
class Removal(TypedDict):
    """A repository (path "") or a file that decontamination takes out. `matched`: what in the benchmark it matched."""

    repo: str
    path: str
    reason: str
    matched: str


@strict_record
class _Decontamination(TypedDict):
    removed: list[Removal]


@strict_record
class _Manifest(TypedDict):
    identity: str
    format_version: int
    command: str
    made_with: dict[str, str]
    settings: _Settings
    repositories: list[_Repository]
    filters: NotRequired[list[dict[str, Any]]]
    splits: dict[str, dict[str, Any]]
    made_by: NotRequired[str]
    decontamination: NotRequired[_Decontamination]


def read_manifest(corpus: Path) -> dict[str, Any]:
    """Return the manifest of a corpus folder; DataError naming the field where there is none that is whole."""
    return dict(read_json(corpus / "manifest.json", _Manifest, _REMEDY))


def shard_paths(corpus: Path, split: str) -> list[Path]:
    """Return the split's shards in their order; empty where it has none."""
    return sorted(corpus.glob(f"{split}-*-of-*.parquet"))


def row_groups(corpus: Path, columns: Sequence[str], splits: Sequence[str] = SPLITS) -> list[tuple[Path, int]]:
    """Return (shard, row group) of the splits. DataError for a shard that is damaged or lacks a column."""
    shards = [path for split in splits for path in shard_paths(corpus, split)]
    return [(path, group) for path in shards for group in range(open_shard(path, columns).metadata.num_row_groups)]


def open_shard(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    """Open a parquet file that has these columns, in the types that a corpus has them in."""
    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file ({_line(error)}). {_REMEDY}") from error
    schema = shard.schema_arrow
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(schema.names)}. {_REMEDY}")
    wrong = [name for name in columns if name in _IS and not _IS[name](schema.field(name).type)]
    if wrong:
        raise DataError(f"{path}: {wrong[0]} is {schema.field(wrong[0]).type}; expected text or a number. {_REMEDY}")
    return shard


def read_batches(
    path: Path, columns: Sequence[str], batch_size: int = 1024, group: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield a shard's rows, or one row group's. DataError for a page that is damaged, and for null or no UTF-8."""
    shard, first = open_shard(path, columns), 0
    groups = range(shard.metadata.num_row_groups) if group is None else [group]
    try:
        for batch in shard.iter_batches(batch_size=batch_size, row_groups=list(groups), columns=list(columns)):
            batch.validate(full=True)  # also that texts are UTF-8
            for name in columns:
                if name in _IS and batch[name].null_count:
                    row = first + batch[name].is_null().to_pylist().index(True)
                    raise DataError(f"{path}, row {row}: {name} is null. {_REMEDY}")
            first += batch.num_rows
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({_line(error)}). {_REMEDY}") from error


def read_group(path: Path, group: int, columns: Sequence[str]) -> pa.Table:
    """Return one row group as a table; DataError as `read_batches` raises it."""
    batches = list(read_batches(path, columns, group=group))
    return pa.Table.from_batches(batches, schema=batches[0].schema if batches else None)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
