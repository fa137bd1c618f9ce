"""How building a corpus scales: time, peak memory, and what 12.8 million files would take.

    python benchmarks/corpus_scale.py --rows 10000 100000 1000000 --work DIR --out scale.json

Generates rows in StarCoderData's schema from the Python files installed here (files below 12 kB, in their packages'
folders, so that imports resolve; every copy gets a line of its own, one in ten is an exact duplicate; 30 % of the
repositories have no stars), shuffles them over all parquet files, and builds a corpus of each size: once without
and once with the search for near-duplicates. Memory is the resident memory of all processes together, sampled 10
times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

STARCODERDATA_ROWS = 12_800_000
_MAX_FILE_BYTES = 12_000
_ROWS_PER_FILE = 250_000
_ROWS_PER_GROUP = 1_000
_DUPLICATE_SHARE = 0.1
_NO_STARS_SHARE = 0.3
_SCHEMA = pa.schema(
    [
        ("max_stars_repo_path", pa.string()),
        ("max_stars_repo_name", pa.string()),
        ("max_stars_count", pa.int64()),
        ("id", pa.string()),
        ("content", pa.string()),
    ]
)


def real_folders() -> list[list[tuple[str, str]]]:
    """Return (path, content) of the installed packages' files, by folder; folders with 3 files or more."""
    folders: dict[str, list[tuple[str, str]]] = {}
    for dist in sorted(metadata.distributions(), key=lambda dist: str(dist.metadata["Name"])):
        for path in dist.files or ():
            source = Path(str(dist.locate_file(path)))
            if path.suffix != ".py" or ".." in path.parts or not source.is_file():
                continue
            if 0 < source.stat().st_size <= _MAX_FILE_BYTES:
                text = source.read_bytes().decode("utf-8", "ignore")
                folders.setdefault(str(PurePosixPath(path).parent), []).append((path.as_posix(), text))
    return [files for files in folders.values() if len(files) >= 3]


def plan_rows(folders: list[list[tuple[str, str]]], num_rows: int, seed: int) -> list[tuple[int, int, int, int]]:
    """Return shuffled rows (folder, file, number of the repository, number of the copy)."""
    generator = random.Random(seed)
    rows: list[tuple[int, int, int, int]] = []
    repo = 0
    while len(rows) < num_rows:
        folder = generator.randrange(len(folders))
        num_files = min(len(folders[folder]), 2 + int(generator.expovariate(1 / 6)))
        for file in generator.sample(range(len(folders[folder])), num_files):
            copy = 0 if generator.random() < _DUPLICATE_SHARE else repo + 1
            rows.append((folder, file, repo, copy))
        repo += 1
    del rows[num_rows:]
    generator.shuffle(rows)
    return rows


def write_rows(folders: list[list[tuple[str, str]]], rows: list[tuple[int, int, int, int]], target: Path) -> int:
    """Write the rows as parquet files and return the bytes of their content."""
    num_bytes = 0
    target.mkdir(parents=True)
    for start in range(0, len(rows), _ROWS_PER_FILE):
        with pq.ParquetWriter(target / f"train-{start:08d}.parquet", _SCHEMA) as writer:
            stop = min(start + _ROWS_PER_FILE, len(rows))
            for first in range(start, stop, _ROWS_PER_GROUP):
                group = [_row(folders, row) for row in rows[first : min(first + _ROWS_PER_GROUP, stop)]]
                num_bytes += sum(len(row["content"].encode()) for row in group)
                writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
    return num_bytes


def _row(folders: list[list[tuple[str, str]]], row: tuple[int, int, int, int]) -> dict[str, Any]:
    folder, file, repo, copy = row
    path, text = folders[folder][file]
    stars = None if random.Random(repo).random() < _NO_STARS_SHARE else 5 + repo % 995
    name = f"owner{repo % 9973}/repository{repo}"
    tags = f"<reponame>{name}<filename>{path}<gh_stars>10-100\n" if repo % 2 else ""
    own = f"# copy {copy}\n" if copy else ""
    return {
        "max_stars_repo_path": path,
        "max_stars_repo_name": name,
        "max_stars_count": stars,
        "id": f"{repo}-{folder}-{file}",
        "content": tags + own + text,
    }


def measure(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return seconds, processor seconds, and peak bytes of resident memory of it and its children
    together."""
    start, used = time.monotonic(), _processor_seconds()
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(root))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.monotonic() - start, _processor_seconds() - used, peak


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _resident(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def build(source: Path, out: Path, workers: int, near: bool) -> dict[str, Any]:
    """Build one corpus and return what it took; the corpus is removed."""
    command = [sys.executable, "-m", "data_prep.build_corpus", "--starcoderdata", str(source), "--out", str(out)]
    command += ["--workers", str(workers), "--order", "imports", *([] if near else ["--no-near-duplicates"])]
    seconds, processor_seconds, peak = measure(command)
    manifest = json.loads((out / "manifest.json").read_text())
    shutil.rmtree(out)
    figures = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": peak}
    return {**figures, "passes": manifest["seconds"], "filters": manifest["filters"]}


def run_size(folders: list[list[tuple[str, str]]], num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Generate one size, build it with and without near-duplicates, and return the figures."""
    source = options.work / f"rows-{num_rows}"
    shutil.rmtree(source, ignore_errors=True)
    num_bytes = write_rows(folders, plan_rows(folders, num_rows, options.seed), source)
    result: dict[str, Any] = {"rows": num_rows, "bytes": num_bytes}
    result["grouping"] = build(source, options.work / "corpus", options.workers, near=False)
    if num_rows <= options.max_near_rows:
        result["with_near_duplicates"] = build(source, options.work / "corpus", options.workers, near=True)
    shutil.rmtree(source)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table, the ratios and the extrapolation."""
    lines = [
        "| rows | content | seconds | rows/s | processor seconds | peak memory | near-duplicates, seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        took = result["grouping"]
        near = result.get("with_near_duplicates", {}).get("passes", {}).get("near_duplicates")
        cells = (
            f"{result['rows']:,}",
            f"{result['bytes'] / 1e6:,.0f} MB",
            f"{took['seconds']:,.1f}",
            f"{result['rows'] / took['seconds']:,.0f}",
            f"{took['processor_seconds']:,.1f}",
            f"{took['peak_bytes'] / 2**20:,.0f} MiB",
            "not run" if near is None else f"{near:,.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    last = results[-1]
    lines.append("")
    if len(results) > 1:
        before = results[-2]
        times, peaks = (last["grouping"][key] / before["grouping"][key] for key in ("seconds", "peak_bytes"))
        lines.append(
            f"{last['rows']:,} against {before['rows']:,} rows: time x {times:.1f}, peak memory x {peaks:.2f}."
        )
    minutes = last["grouping"]["seconds"] / last["rows"] * STARCODERDATA_ROWS / 60
    lines.append(f"At the rate of {last['rows']:,} rows, 12.8 million rows take {minutes:.0f} minutes.")
    return "\n".join(lines)


def main() -> None:
    """Run the sizes, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--max-near-rows", type=int, default=1_000_000, help="no near-duplicate search above this")
    parser.add_argument("--work", type=Path, required=True, help="a folder with 10 kB of free disk for each row")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    folders = real_folders()
    results = []
    for num_rows in sorted(options.rows):
        results.append(run_size(folders, num_rows, options))
        print(table(results), flush=True)
    if options.out:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
