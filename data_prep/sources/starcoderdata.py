"""StarCoderData: parquet with one row a file.

Columns: max_stars_repo_name, max_stars_repo_path, max_stars_count (null counts as 0), content. The content may
begin with <reponame>, <filename> and <gh_stars> tags, which are stripped.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from titans_ds.errors import DataError
from titans_ds.files import atomic_file

from ..corpus.duplicates import connect, parquet_scan, stream_sql
from ..errors import DataPrepError
from ..hashing import hash64
from ..settings import CorpusSettings
from .base import Source, SourceFile, Unit, source_file
from .listing import listing_hash

logger = logging.getLogger("titans_ds")
COLUMNS = ("max_stars_repo_name", "max_stars_repo_path", "max_stars_count", "content")
_TAGS = re.compile(rb"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")
_ROWS_PER_BATCH = 512
_STARS = "TRY_CAST(max_stars_count AS DOUBLE)"


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
                    AND max(CASE WHEN isfinite({_STARS}) THEN {_STARS} ELSE 0 END) >= {settings.min_stars}"""
        hashes = [np.zeros(0, np.uint64)]
        for batch in stream_sql(connect(folder), query, 100_000):
            names = map(_name, batch["repo"].to_pylist())
            hashes.append(np.array([hash64(name) for name in names], dtype=np.uint64))
        return np.sort(np.concatenate(hashes))

    def list_units(self) -> list[Unit]:
        """Return one unit a row group. Raises DataPrepError for a file that is cut short or lacks a column."""
        return [
            Unit(f"{index}:{group}", metadata.row_group(group).total_byte_size)
            for index, metadata in enumerate(map(_checked_metadata, self._files()))
            for group in range(metadata.num_row_groups)
        ]

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield a row group's files; what a damaged page holds is one file with problem "damaged_page"."""
        index, group = map(int, unit.key.split(":"))
        path = self._files()[index]
        candidates = np.load(self.candidates, mmap_mode="r") if self.candidates else None
        try:
            parquet = pq.ParquetFile(path)
            for batch in parquet.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=list(COLUMNS)):
                yield from _files_of(batch, candidates)
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s, row group %d, is left out from where it is damaged: %s", path, group, error)
            yield SourceFile("", f"{path.name}:{group}", None, problem="damaged_page")

    def _files(self) -> list[Path]:
        files: list[Path] = []
        for name in self.paths:
            path = Path(name)
            found = sorted(p for p in path.rglob("*.parquet") if p.is_file()) if path.is_dir() else [path]
            if not found or not found[0].is_file():
                raise DataPrepError(f"{path}: no parquet there. Expected a parquet file or a folder of them.")
            files += found
        return files


def _checked_metadata(path: Path) -> pq.FileMetaData:
    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file: {error}. Fetch it again.") from error
    names = parquet.schema_arrow.names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(names)}. Expected StarCoderData's columns; for "
            "other data use --dataset with --columns."
        )
    return parquet.metadata


def _files_of(batch: pa.RecordBatch, candidates: np.ndarray | None) -> Iterator[SourceFile]:
    repos, paths, contents = (_as_bytes(batch[name]) for name in (COLUMNS[0], COLUMNS[1], COLUMNS[3]))
    names = [_name(repo.as_py()) for repo in repos]
    wanted = _are_candidates(names, candidates)
    for row, (repo, stars) in enumerate(zip(names, batch["max_stars_count"].to_pylist(), strict=True)):
        path = _name(paths[row].as_py())
        if repo and path and not wanted[row]:
            yield SourceFile(repo, path, None, problem="repository_small_or_few_stars")
        else:
            content = contents[row].as_py()
            content = strip_tags(content) if isinstance(content, bytes) else content
            yield source_file(repo, path, content, stars=0 if stars is None else stars)


def _as_bytes(column: pa.Array) -> pa.Array:
    """Texts as bytes: Arrow does not look whether they are UTF-8, and would raise an error for the whole batch."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary())
    return column


def _name(value: Any) -> str:
    """A name of text; what is none is "", and what is not UTF-8 stays recognisable as such."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else ""


def _are_candidates(repos: list[str], candidates: np.ndarray | None) -> np.ndarray:
    if candidates is None:
        return np.ones(len(repos), dtype=bool)
    if not len(candidates):
        return np.zeros(len(repos), dtype=bool)
    hashes = np.array([hash64(repo) for repo in repos], dtype=np.uint64)
    places = np.minimum(np.searchsorted(candidates, hashes), len(candidates) - 1)
    return np.asarray(candidates[places] == hashes)


def strip_tags(text: bytes) -> bytes:
    """Return the content without StarCoderData's leading <reponame>, <filename> and <gh_stars> tags."""
    return _TAGS.sub(b"", text, count=1) if text.startswith(b"<") else text
