"""StarCoderData: parquet with one row a file.

Columns: max_stars_repo_name, max_stars_repo_path, max_stars_count (null counts as 0), content. The content may
begin with <reponame>, <filename> and <gh_stars> tags, which are stripped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..duplicates import connect, parquet_scan, stream_sql
from ..errors import DataPrepError
from ..hashing import hash64
from ..output import atomic_file
from ..settings import CorpusSettings
from .base import Source, SourceFile, Unit
from .listing import listing_hash

COLUMNS = ("max_stars_repo_name", "max_stars_repo_path", "max_stars_count", "content")
_TAGS = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")
_ROWS_PER_BATCH = 512


@dataclass(frozen=True)
class StarCoderData(Source):
    """`paths`: parquet files, or folders of them. `candidates`: a file of hashes that `prepare` writes."""

    paths: tuple[str, ...]
    candidates: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the files and a hash of their listing."""
        files = self._files()
        return {"kind": "starcoderdata", "files": [path.name for path in files], "listing": listing_hash(files)}

    def prepare(self, folder: Path, settings: CorpusSettings) -> StarCoderData:
        """Find the repositories with enough files and stars, so that no other content is read.

        Later filters only take files away: a repository that fails here would fail there.
        """
        target = folder / "candidates.npy"
        if not target.exists():
            with atomic_file(target) as temporary, open(temporary, "wb") as handle:
                np.save(handle, self._candidates(folder, settings))
        return dataclasses.replace(self, candidates=str(target))

    def _candidates(self, folder: Path, settings: CorpusSettings) -> np.ndarray:
        query = f"""SELECT max_stars_repo_name AS repo FROM {parquet_scan(self._files())} GROUP BY repo
                    HAVING count(*) >= {settings.min_files}
                    AND max(coalesce(max_stars_count, 0)) >= {settings.min_stars}"""
        hashes = [np.zeros(0, np.uint64)]
        for batch in stream_sql(connect(folder), query, 100_000):
            hashes.append(np.array([hash64(repo or "") for repo in batch["repo"].to_pylist()], dtype=np.uint64))
        return np.sort(np.concatenate(hashes))

    def list_units(self) -> list[Unit]:
        """Return one unit a row group. Raises DataPrepError for a file that is cut short or lacks a column."""
        return [
            Unit(f"{index}:{group}", metadata.row_group(group).total_byte_size)
            for index, metadata in enumerate(map(_checked_metadata, self._files()))
            for group in range(metadata.num_row_groups)
        ]

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield a row group's files."""
        index, group = map(int, unit.key.split(":"))
        path = self._files()[index]
        candidates = np.load(self.candidates, mmap_mode="r") if self.candidates else None
        try:
            parquet = pq.ParquetFile(path)
            for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=list(COLUMNS)):
                yield from _files_of(batch, candidates)
        except (pa.ArrowException, OSError) as error:
            raise DataPrepError(f"{path}, row group {group}, cannot be read: {error}. Fetch the file again.") from error

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for name in self.paths:
            path = Path(name)
            found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
            if not found or not found[0].is_file():
                raise DataPrepError(f"{path}: no parquet there. Expected a parquet file or a folder of them.")
            files += found
        return files


def _checked_metadata(path: Path) -> pq.FileMetaData:
    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataPrepError(f"{path} is not a whole parquet file: {error}. Fetch it again.") from error
    names = parquet.schema_arrow.names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataPrepError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(names)}. Expected StarCoderData's columns; for "
            f"other "
            "data use --dataset with --columns."
        )
    return parquet.metadata


def _files_of(batch: pa.RecordBatch, candidates: np.ndarray | None) -> Iterator[SourceFile]:
    repos, paths, stars = (batch[name].to_pylist() for name in COLUMNS[:3])
    content = batch["content"]
    wanted = _are_candidates(repos, candidates)
    for row, (repo, path, star) in enumerate(zip(repos, paths, stars, strict=True)):
        if not repo or not path:
            yield SourceFile(repo or "", path or "", None, problem="no_name")
        elif not wanted[row]:
            yield SourceFile(repo, path, None, problem="repository_small_or_few_stars")
        else:
            text = strip_tags(content[row].as_py() or "")
            yield SourceFile(repo, path, text.encode("utf-8", "surrogatepass"), "", star or 0)


def _are_candidates(repos: list[str | None], candidates: np.ndarray | None) -> np.ndarray:
    if candidates is None:
        return np.ones(len(repos), dtype=bool)
    if not len(candidates):
        return np.zeros(len(repos), dtype=bool)
    hashes = np.array([hash64(repo or "") for repo in repos], dtype=np.uint64)
    places = np.minimum(np.searchsorted(candidates, hashes), len(candidates) - 1)
    return np.asarray(candidates[places] == hashes)


def strip_tags(text: str) -> str:
    """Return the content without StarCoderData's leading <reponame>, <filename> and <gh_stars> tags."""
    return _TAGS.sub("", text, count=1) if text.startswith("<") else text
