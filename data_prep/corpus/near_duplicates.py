"""Files that are almost the same: MinHash signatures (rensa), banded and joined out of core in DuckDB.

Two files are compared when they agree on one of 16 bands of 8 values (a pair of Jaccard similarity 0.85 is missed with
probability 0.006); they count as duplicates when at least `threshold` of their 128 values agree. Of every group of
files linked in this way the preferred one stays (`duplicates.PREFERENCE`). Shingles are runs of five words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from titans_ds.files import atomic_file

from ..console import map_parallel
from ..errors import DataPrepError
from .duplicates import PREFERENCE, parquet_scan, run_sql, stream_sql
from .plan import Plan
from .scan import hash_paths, run_paths

NUM_VALUES = 128
NUM_BANDS = 16
_NUM_ROWS = NUM_VALUES // NUM_BANDS
_SEED = 20_260_101
_SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")
_EDGES_PER_BATCH = 50_000

_SCHEMA = pa.schema(
    [
        ("file_id", pa.uint64()),
        ("signature", pa.binary(4 * NUM_VALUES)),
        ("bands", pa.list_(pa.uint64(), NUM_BANDS)),
    ]
)


@dataclass(frozen=True, slots=True)
class _Job:
    run: Path
    exact: Path
    target: Path


def signature(text: str) -> np.ndarray | None:
    """Return the MinHash signature of a text, uint32 [128]; None where it has fewer words than one shingle."""
    words = _WORD.findall(text)
    if len(words) < _SHINGLE_WORDS:
        return None
    shifted = [words[i:] for i in range(_SHINGLE_WORDS)]
    minhash = _rensa().RMinHash(num_perm=NUM_VALUES, seed=_SEED)
    minhash.update({" ".join(shingle) for shingle in zip(*shifted, strict=False)})
    return np.array(minhash.digest(), dtype="<u4")


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise DataPrepError(
            "The search for near-duplicates needs the package rensa. Install it (pip install 'titans-ds[data]'), "
            "or pass --no-near-duplicates to leave the search out."
        ) from error
    return rensa


def find_near_duplicates(
    connection: duckdb.DuckDBPyConnection, plan: Plan, exact: Path, target: Path, num_workers: int
) -> None:
    """Write the files to drop, because a preferred file is almost the same, to parquet `target` (file_id,
    repo_hash)."""
    _rensa()
    folder = plan.folder / "signatures"
    jobs = [_Job(run, exact, folder / f"{run.stem}.parquet") for run in run_paths(plan)]
    map_parallel(_sign_run, jobs, num_workers, "fingerprints")
    signed = parquet_scan([job.target for job in jobs])
    run_sql(
        connection,
        f"""CREATE OR REPLACE TABLE ranked AS
            SELECT file_id, repo_hash, row_number() OVER (ORDER BY {PREFERENCE}) AS rank
            FROM {parquet_scan(hash_paths(plan))}
            WHERE file_id NOT IN (SELECT file_id FROM {parquet_scan([exact])})""",
    )
    _find_edges(connection, signed)
    dropped = _lesser_members(_verified(connection, signed, plan.settings.near_duplicate_threshold))
    connection.register("dropped", pa.table({"rank": pa.array(dropped, type=pa.int64())}))
    path = str(target).replace("'", "''")
    run_sql(
        connection,
        f"""COPY (SELECT file_id, repo_hash FROM ranked JOIN dropped USING (rank) ORDER BY repo_hash, file_id)
            TO '{path}' (FORMAT parquet)""",
    )


def _sign_run(job: _Job) -> None:
    if job.target.exists():
        return
    duplicates = pq.read_table(job.exact, columns=["file_id"])["file_id"].to_numpy()
    rows: list[tuple[int, bytes, list[int]]] = []
    with pa.memory_map(str(job.run)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            fresh = ~np.isin(batch["file_id"].to_numpy(), duplicates)
            for row in np.flatnonzero(fresh).tolist():
                values = signature(batch["content"][row].as_py())
                if values is not None:
                    rows.append((batch["file_id"][row].as_py(), values.tobytes(), band_hashes(values)))
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_SCHEMA)
    arrays = [pa.array(column, type=kind.type) for column, kind in zip(columns, _SCHEMA, strict=True)]
    with atomic_file(job.target) as temporary:
        pq.write_table(pa.table(arrays, schema=_SCHEMA), temporary)


def band_hashes(values: np.ndarray) -> list[int]:
    """Return one 64-bit hash for each band of a signature (a polynomial of its values, modulo 2^64)."""
    bands = values.reshape(NUM_BANDS, _NUM_ROWS).astype(np.uint64)
    factors = np.array([0x9E3779B97F4A7C15 ** (i + 1) % 2**64 for i in range(_NUM_ROWS)], dtype=np.uint64)
    return [int(value) for value in ((bands + 1) * factors).sum(axis=1, dtype=np.uint64)]


def _find_edges(connection: duckdb.DuckDBPyConnection, signed: str) -> None:
    """Table `edges`: in every band, each file with the preferred one of those that share its hash."""
    run_sql(
        connection,
        f"""CREATE OR REPLACE TABLE edges AS
            WITH banded AS (
                SELECT rank, unnest(bands) AS hash, unnest(range({NUM_BANDS})) AS band
                FROM {signed} JOIN ranked USING (file_id)),
            groups AS (SELECT band, hash, min(rank) AS best FROM banded GROUP BY band, hash HAVING count(*) > 1)
            SELECT DISTINCT best, rank FROM banded JOIN groups USING (band, hash) WHERE rank <> best""",
    )


def _verified(connection: duckdb.DuckDBPyConnection, signed: str, threshold: float) -> list[tuple[int, int]]:
    """Return the edges whose signatures agree in at least `threshold` of the values."""
    run_sql(
        connection,
        f"""CREATE OR REPLACE TABLE signatures AS
            SELECT rank, signature FROM {signed} JOIN ranked USING (file_id)
            WHERE rank IN (SELECT best FROM edges UNION SELECT rank FROM edges)""",
    )
    query = """SELECT edges.best, edges.rank, a.signature, b.signature AS other
               FROM edges JOIN signatures a ON a.rank = edges.best JOIN signatures b ON b.rank = edges.rank"""
    kept: list[tuple[int, int]] = []
    for batch in stream_sql(connection, query, _EDGES_PER_BATCH):
        left, right = (_matrix(batch[name]) for name in ("signature", "other"))
        near = (left == right).mean(axis=1) >= threshold
        pairs = zip(batch["best"].to_pylist(), batch["rank"].to_pylist(), near.tolist(), strict=True)
        kept += [(best, rank) for best, rank, similar in pairs if similar]
    return kept


def _matrix(column: pa.Array) -> np.ndarray:
    return np.frombuffer(b"".join(column.to_pylist()), dtype="<u4").reshape(-1, NUM_VALUES)


def _lesser_members(edges: Sequence[tuple[int, int]]) -> list[int]:
    """Return every member of a connected group but its smallest (union-find)."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = parent[above]
            node = parent[node]
        return node

    for left, right in edges:
        a, b = root(left), root(right)
        parent[max(a, b)] = min(a, b)
    return sorted(node for node in parent if root(node) != node)
