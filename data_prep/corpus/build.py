"""The passes of a corpus build, one after the other: scan, duplicates, assemble, publish.

Every pass leaves finished parts in the work folder and skips those that are there: a stopped build goes on. A shard is
the scan of a part of the chunks; the build without `shard` does the rest.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_ds.errors import OutputError, TitansError
from titans_ds.files import atomic_file, check_folder, unfinished

from ..console import map_parallel
from ..errors import DataPrepError
from ..settings import CorpusSettings
from ..shards import CORPUS, read_manifest
from ..sources.base import Source
from .assemble import REPOSITORY_FILTERS, AssembleJob, assemble_bucket
from .duplicates import connect, count_left, find_exact_duplicates
from .near_duplicates import find_near_duplicates
from .plan import Plan, claim, make_plan
from .publish import choose_repositories, require_left, write_corpus
from .scan import chunk_done_path, hash_paths, scan_chunk


@dataclass
class _Report:
    """Counts after every filter, and the seconds of every pass."""

    filters: list[dict[str, Any]] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def left(self, name: str, files: int, repositories: int | None) -> None:
        self.filters.append({"filter": name, "files": files, "repositories": repositories})
        if repositories is not None:
            require_left([entry for entry in self.filters if entry["repositories"] is not None])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)


def build(
    source: Source,
    settings: CorpusSettings,
    out: Path,
    *,
    num_workers: int = 1,
    command: str = "",
    restart: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Build the corpus in folder `out`. Returns its manifest, and whether it was there already.

    Raises DataPrepError for what a user can mend; the work folder then keeps the finished parts.
    """
    plan = _open(source, settings, out, restart)
    if plan is None:
        return read_manifest(out), True
    report = _Report()
    try:
        _scan(plan, range(len(plan.chunks)), num_workers, report)
        dropped = _drop_duplicates(plan, num_workers, report)
        records = _assemble(plan, dropped, num_workers, report)
        chosen = choose_repositories(records, settings.max_repos, settings.seed)
        report.left("max_repos", sum(record["files"] for record in chosen), len(chosen))
        manifest = write_corpus(plan, chosen, out, vars(report), command)
    except TitansError as error:
        if not isinstance(error, OutputError):  # the same settings would end so again
            shutil.rmtree(plan.folder, ignore_errors=True)
        raise
    shutil.rmtree(plan.folder)
    return manifest, False


def build_shard(
    source: Source, settings: CorpusSettings, out: Path, index: int, count: int, num_workers: int = 1
) -> int:
    """Scan the chunks of shard `index` of `count` into `out`'s work folder, and return how many there were.

    `build` without a shard, run when all shards are done, makes the corpus: the same one whatever `count`.
    """
    if not 0 <= index < count:
        raise DataPrepError(f"--shard {index}/{count}: expected i/n with i from 0 to n-1.")
    plan = _open(source, settings, out, restart=False)
    if plan is None:
        return 0
    numbers = range(index, len(plan.chunks), count)
    _scan(plan, numbers, num_workers, _Report())
    return len(numbers)


def _open(source: Source, settings: CorpusSettings, out: Path, restart: bool) -> Plan | None:
    """Return the plan, None where `out` is finished already with the same source and settings."""
    check_folder(out, CORPUS)
    plan = make_plan(source, settings, unfinished(out))
    if (out / CORPUS.marker).exists() and not restart:
        if read_manifest(out)["identity"] == plan.identity:
            return None
        raise DataPrepError(
            f"{out} is there already, and was made from another source or with other settings. "
            "Give another --out, or pass --restart to replace it."
        )
    return claim(plan, restart)


def _scan(plan: Plan, numbers: range, num_workers: int, report: _Report) -> None:
    with report.timed("scan"):
        counts = map_parallel(scan_chunk, [(plan, number) for number in numbers], num_workers, "reading files")
    rejected: Counter[str] = Counter()
    for count in counts:
        rejected.update(count["rejected"])
    report.rejected = dict(sorted(rejected.items()))
    report.left("read", sum(count["read"] for count in counts), None)


def _drop_duplicates(plan: Plan, num_workers: int, report: _Report) -> tuple[Path, ...]:
    missing = [number for number in range(len(plan.chunks)) if not chunk_done_path(plan, number).exists()]
    if missing:
        raise DataPrepError(f"Chunks {missing[:10]} have not been scanned. Run the command again without --shard.")
    connection = connect(plan.folder)
    hashes = hash_paths(plan)
    report.left("file_filters", *_counted(report, lambda: count_left(connection, hashes, ())))
    exact, near = plan.folder / "exact.parquet", plan.folder / "near.parquet"
    with report.timed("exact_duplicates"):
        if not exact.exists():
            with atomic_file(exact) as temporary:
                find_exact_duplicates(connection, hashes, temporary)
        report.left("exact_duplicates", *count_left(connection, hashes, (exact,)))
    if not plan.settings.near_duplicates:
        return (exact,)
    with report.timed("near_duplicates"):
        if not near.exists():
            with atomic_file(near) as temporary:
                find_near_duplicates(connection, plan, exact, temporary, num_workers)
        report.left("near_duplicates", *count_left(connection, hashes, (exact, near)))
    return exact, near


def _counted(report: _Report, count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """Where no file is left, the message names the reasons for which files were rejected."""
    files, repositories = count()
    if not files:
        reasons = ", ".join(f"{name}: {number}" for name, number in report.rejected.items()) or "no files were found"
        raise DataPrepError(
            f"No file is left after the file filters ({reasons}). Relax the filter that took most, or give another "
            f"source."
        )
    return files, repositories


def _assemble(plan: Plan, dropped: tuple[Path, ...], num_workers: int, report: _Report) -> list[dict[str, Any]]:
    jobs = [AssembleJob(plan, bucket, dropped) for bucket in range(plan.num_buckets)]
    with report.timed("assemble"):
        records = map_parallel(assemble_bucket, jobs, num_workers, "grouping repositories")
    for name in REPOSITORY_FILTERS:
        files, repositories = (sum(record["filters"][name][i] for record in records) for i in (0, 1))
        report.left(name, files, repositories)
    return [repository for record in records for repository in record["repositories"]]
