"""Files that occur twice. One copy stays: of the repository with the most stars, then the smallest hash of its name.

The search joins hashes out of core in DuckDB, so that its memory does not grow with the corpus.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from titans_ds.errors import OutputError

# The order in which copies are preferred. Numbers only: the same whatever the chunks.
PREFERENCE = "coalesce(stars, 0) DESC, repo_hash, path_hash, file_id"
MEMORY_LIMIT = "1GB"


def connect(work_folder: Path, memory_limit: str = MEMORY_LIMIT) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB that spills to `work_folder` beyond `memory_limit`."""
    spill = work_folder / "duckdb"
    spill.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect()
    connection.execute(f"SET memory_limit = '{memory_limit}'")
    connection.execute(f"SET temp_directory = '{_quoted(spill)}'")
    connection.execute(f"SET threads = {min(os.cpu_count() or 1, 8)}")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET enable_progress_bar = false")
    return connection


def parquet_scan(paths: Sequence[Path]) -> str:
    """Return the SQL that reads these parquet files as one table."""
    listed = ", ".join(f"'{_quoted(path)}'" for path in paths)
    return f"read_parquet([{listed}])"


def run_sql(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyConnection:
    """Execute; a full disk or too little memory is a DataPrepError."""
    with _explained():
        return connection.execute(query)


def stream_sql(connection: duckdb.DuckDBPyConnection, query: str, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the result of a query in batches of at most `rows` rows."""
    with _explained():
        yield from connection.sql(query).to_arrow_reader(rows)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise OutputError(
            f"The search over all files could not finish: {error}. Free disk space for the work folder (it holds what "
            "does not fit in memory) and run the same command again: finished parts are kept."
        ) from error


def find_exact_duplicates(connection: duckdb.DuckDBPyConnection, hash_paths: Sequence[Path], target: Path) -> None:
    """Write the files to drop, because a preferred file has the same bytes, to parquet `target` (file_id,
    repo_hash)."""
    run_sql(
        connection,
        f"""COPY (
            SELECT file_id, repo_hash FROM (
                SELECT file_id, repo_hash,
                       row_number() OVER (PARTITION BY hash_high, hash_low ORDER BY {PREFERENCE}) AS rank
                FROM {parquet_scan(hash_paths)})
            WHERE rank > 1 ORDER BY repo_hash, file_id
        ) TO '{_quoted(target)}' (FORMAT parquet)""",
    )


def count_left(
    connection: duckdb.DuckDBPyConnection, hash_paths: Sequence[Path], dropped: Sequence[Path]
) -> tuple[int, int]:
    """Return (files, repositories) that are left when the files listed in the parquets `dropped` are taken out."""
    table = f"SELECT file_id, repo_hash FROM {parquet_scan(hash_paths)}"
    if dropped:
        table += f" WHERE file_id NOT IN (SELECT file_id FROM {parquet_scan(dropped)})"
    row = run_sql(connection, f"SELECT count(*), count(DISTINCT repo_hash) FROM ({table})").fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("'", "''")  # a `~` in front would be the home folder
