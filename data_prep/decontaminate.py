"""Remove from a corpus what a benchmark holds.

    python -m data_prep.decontaminate --corpus DIR --benchmark FILE_OR_DIR … --out DIR

Goes: every repository of the benchmark (by name, by home page, and by content: where it holds half of the token
runs of a benchmark row), and every file that shares a run of 50 tokens with a row's file or its retrieved chunks.
Repositories that are left with too few files go too. The result is a corpus folder like the one it was made from;
removed.jsonl in it lists what went and why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from titans_ds.files import atomic_file, check_folder, sha256_of, work_folder, write_json
from titans_ds.program import program, real_number, whole_number
from titans_ds.reading import read_json, strict_record

from .console import GO_ON, STDERR, command_line, map_parallel
from .corpus.benchmark_names import BenchmarkNames
from .corpus.clean import rewrite_corpus
from .corpus.token_runs import run_hashes
from .crosscodeeval import CrossCodeEvalRow, load_rows
from .errors import DataPrepError
from .settings import fingerprint
from .shards import CORPUS, Removal, read_group, read_manifest, row_groups

RUN_TOKENS = 50
REPOSITORY_SHARE = 0.5


_COLUMNS = ("repo", "path", "content")


@strict_record
class _Match(TypedDict):
    repo: str
    path: str
    runs: list[int]


@dataclass(frozen=True, slots=True)
class _Job:
    """One row group, compared with the benchmark's runs at `runs`."""

    parquet: str
    row_group: int
    run_tokens: int
    runs: str
    target: str


def find_rows(paths: Iterable[Path]) -> tuple[list[CrossCodeEvalRow], list[Path]]:
    """Return all rows of the jsonl files, and of the line_completion*.jsonl files below the folders, with the files."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("line_completion*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise DataPrepError(f"{path} has no line_completion*.jsonl. Expected CrossCodeEval files.")
        files += found
    return [row for file in files for row in load_rows(file)], files


def decontaminate(
    corpus: Path,
    benchmark: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str] = (),
    run_tokens: int = RUN_TOKENS,
    repository_share: float = REPOSITORY_SHARE,
    num_workers: int = 1,
    command: str = "",
) -> tuple[list[Removal], bool]:
    """Write the cleaned corpus to folder `out`. Returns what went, and whether `out` was there already.

    names: further repositories to remove ("owner/name"). Raises DataPrepError for what a user can mend.
    """
    check_folder(out, CORPUS)
    manifest = read_manifest(corpus)
    rows, files = find_rows(benchmark)
    inputs = [manifest["identity"], sorted(map(sha256_of, files)), sorted(names), run_tokens, repository_share]
    identity = fingerprint(["decontaminate", *inputs])
    if (out / "manifest.json").exists():
        return _finished(out, identity), True
    groups = row_groups(corpus, _COLUMNS)
    if not groups:
        raise DataPrepError(f"{corpus} has no parquet. Expected a folder that data_prep.build_corpus wrote.")
    with work_folder(out, identity) as work:
        removals = _by_name(manifest, BenchmarkNames([*names, *(row.repository for row in rows)]))
        owners, lengths = _write_runs(rows, work / "runs.npy", run_tokens)
        jobs = [
            _Job(str(path), group, run_tokens, str(work / "runs.npy"), str(work / f"{path.stem}-{group:05d}.json"))
            for path, group in groups
        ]
        matches = [match for part in map_parallel(_compare_group, jobs, num_workers, "comparing") for match in part]
        removals += _by_content(matches, owners, lengths, rows, repository_share, {r["repo"] for r in removals})
        record = {"command": command, "benchmark": [str(path) for path in files], "identity": identity}
        rewrite_corpus(corpus, out, removals, {**record, "run_tokens": run_tokens})
    return removals, False


def _finished(out: Path, identity: str) -> list[Removal]:
    manifest = read_manifest(out)
    if manifest["identity"] != identity or "decontamination" not in manifest:
        raise DataPrepError(f"{out} is there already, and was made from something else. Give another --out.")
    return list(manifest["decontamination"]["removed"])


def _by_name(manifest: dict[str, Any], names: BenchmarkNames) -> list[Removal]:
    removals = []
    for record in manifest["repositories"]:
        reason, label = names.match(record["repo"], record.get("home_page") or "")
        if reason:
            removals.append(Removal(repo=record["repo"], path="", reason=reason, matched=label))
    return removals


def _texts(row: CrossCodeEvalRow) -> list[str]:
    return [row.prompt + row.groundtruth + row.right_context, *(c.retrieved_chunk for c in row.crossfile_list)]


def _write_runs(rows: Sequence[CrossCodeEvalRow], target: Path, run_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Write the sorted distinct run hashes. Returns the row that each belongs to, and each row's number of own runs."""
    parts: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for number, row in enumerate(rows):
        hashes = np.concatenate([run_hashes(text, run_tokens) for text in _texts(row)])
        parts.append(hashes)
        owners.append(np.full(len(hashes), number))
    empty = np.zeros(0, np.uint64)
    runs, first = np.unique(np.concatenate([*parts, empty]), return_index=True)
    owner = np.concatenate([*owners, np.zeros(0, np.int64)]).astype(np.int64)[first]
    with atomic_file(target) as temporary, open(temporary, "wb") as handle:
        np.save(handle, runs)
    return owner, np.bincount(owner, minlength=len(rows))


def _compare_group(job: _Job) -> list[dict[str, Any]]:
    """Return, for every file that shares a run, its repo, path and the numbers of the shared runs."""
    if Path(job.target).exists():
        return list(read_json(job.target, list[_Match]))
    runs = np.load(job.runs)
    table = read_group(Path(job.parquet), job.row_group, _COLUMNS)
    matches = []
    for row in range(table.num_rows):
        hashes = run_hashes(table["content"][row].as_py(), job.run_tokens)
        places = np.minimum(np.searchsorted(runs, hashes), max(0, len(runs) - 1))
        shared = np.unique(places[runs[places] == hashes]) if len(runs) else places[:0]
        if len(shared):
            name = {"repo": table["repo"][row].as_py(), "path": table["path"][row].as_py()}
            matches.append({**name, "runs": shared.tolist()})
    write_json(job.target, matches)
    return matches


def _by_content(
    matches: Sequence[dict[str, Any]],
    owners: np.ndarray,
    lengths: np.ndarray,
    rows: Sequence[CrossCodeEvalRow],
    repository_share: float,
    gone: set[str],
) -> list[Removal]:
    """Whole repositories first, then single files of those that stay."""
    held: dict[str, set[int]] = defaultdict(set)
    for match in matches:
        held[match["repo"]].update(match["runs"])
    removals = []
    for repo, runs in held.items():
        counts = np.bincount(owners[sorted(runs)], minlength=len(rows))
        shares = counts / np.maximum(lengths, 1)
        if repo not in gone and shares.max() >= repository_share:
            nearest = rows[int(shares.argmax())].repository
            removals.append(Removal(repo=repo, path="", reason="content", matched=nearest))
    gone = gone | {removal["repo"] for removal in removals}
    for match in matches:
        if match["repo"] not in gone:
            row = rows[int(owners[match["runs"][0]])]
            removals.append(Removal(repo=match["repo"], path=match["path"], reason="shared_run", matched=row.task_id))
    return removals


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.decontaminate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="a folder that build_corpus wrote")
    parser.add_argument("--benchmark", type=Path, nargs="+", required=True, help="CrossCodeEval files or folders")
    parser.add_argument("--names", type=Path, help="a text file of further repositories, one a line")
    parser.add_argument("--out", type=Path, required=True, help="the cleaned corpus folder")
    parser.add_argument("--run-tokens", type=whole_number(5, 10_000), default=RUN_TOKENS, help="default %(default)s")
    parser.add_argument(
        "--repository-share",
        type=real_number(0, 1, above=True),
        default=REPOSITORY_SHARE,
        help="of a row's runs in one repository that removes it whole (default %(default)s)",
    )
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    return parser


def _read_names(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataPrepError(f"Cannot read --names {path}: {error}. Expected one repository a line.") from error


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's). Prints what went on stdout."""
    options = _parser().parse_args(arguments)
    removals, reused = decontaminate(
        options.corpus,
        options.benchmark,
        options.out,
        names=_read_names(options.names),
        run_tokens=options.run_tokens,
        repository_share=options.repository_share,
        num_workers=options.workers,
        command=command_line(),
    )
    for removal in removals:
        whole = removal["path"] or "(whole repository)"
        print("\t".join((removal["reason"], removal["repo"], whole, removal["matched"])))
    counts = Counter((removal["reason"], "file" if removal["path"] else "repository") for removal in removals)
    STDERR.print(f"{options.out}: " + ("already complete" if reused else "written"))
    for (reason, what), number in counts.items():
        STDERR.print(f"  removed by {reason}: {what} x {number}")


if __name__ == "__main__":
    sys.exit(main())
