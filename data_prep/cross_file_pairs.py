"""Make pairs of a definitions file and a usage file from the real files of a corpus, with two controls.

    python -m data_prep.cross_file_pairs --corpus DIR --out DIR

Writes three corpora with the same pairs, each of which pack_corpus takes: OUT/pairs; OUT/renamed, where the shared
symbols have new names, the same in both files; and OUT/broken, where the definitions are those of another pair of
the split. In each a pair is a repository of two files: definitions first. OUT/pairs.jsonl says for each pair which
symbols it shares and where they are used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from titans_ds.files import Kind, atomic_folder, check_folder, sha256_of, work_folder, write_json, write_jsonl
from titans_ds.program import program, whole_number
from titans_ds.reading import read_json, strict_record

from .benchmark.pairs import Pair, make_pairs
from .console import GO_ON, STDERR, command_line, map_parallel
from .corpus.assemble import CORPUS_SCHEMA
from .corpus.publish import SplitWriter
from .errors import DataPrepError
from .settings import fingerprint
from .shards import read_group, read_manifest, row_groups
from .splits import SPLITS

VARIANTS = ("pairs", "renamed", "broken")
PAIRS = Kind("a folder of pairs", "pairs.jsonl", rb'\A\{"pair": ')
_COLUMNS = ("repo", "path", "content")


@strict_record
class _Record(TypedDict):
    """A `Pair` on disk."""

    repo: str
    definitions_path: str
    usage_path: str
    symbols: list[str]
    definitions: str
    usage: str


@dataclass(frozen=True, slots=True)
class _Job:
    """One row group of a corpus. A repository that spans two row groups gives pairs from each part."""

    parquet: str
    row_group: int
    max_pairs: int
    max_characters: int
    target: str


def make_corpora(
    corpus: Path,
    out: Path,
    *,
    max_pairs_per_repo: int = 8,
    max_characters: int = 20_000,
    seed: int = 0,
    num_workers: int = 1,
    command: str = "",
) -> tuple[dict[str, Any], bool]:
    """Write the three corpora to folder `out`. Returns the manifest of OUT/pairs, and whether it was there already."""
    check_folder(out, PAIRS)
    manifest = read_manifest(corpus)
    identity = fingerprint(["pairs", manifest["identity"], max_pairs_per_repo, max_characters, seed])
    if (out / PAIRS.marker).exists():
        found = read_manifest(out / "pairs")
        if found.get("made_by") != identity:
            raise DataPrepError(f"{out} is there already, and was made from something else. Give another --out.")
        return dict(found), True
    with work_folder(out, identity) as work:
        pairs = {
            split: _split_pairs(corpus, split, work, max_pairs_per_repo, max_characters, num_workers)
            for split in SPLITS
        }
        _require_pairs(pairs)
        with atomic_folder(out, PAIRS) as folder:
            header = {"command": command, "made_from": manifest["identity"], "made_by": identity}
            licenses = {entry["repo"]: entry for entry in manifest["repositories"]}
            for variant in VARIANTS:
                _write_variant(folder, variant, pairs, seed, {**manifest, **header}, licenses)
            write_jsonl(
                folder / "pairs.jsonl", [record for split in SPLITS for record in _records(split, pairs[split])]
            )
    return read_manifest(out / "pairs"), False


def _split_pairs(
    corpus: Path, split: str, work: Path, max_pairs: int, max_characters: int, num_workers: int
) -> list[Pair]:
    jobs = [
        _Job(str(path), group, max_pairs, max_characters, str(work / f"{path.stem}-{group:05d}.json"))
        for path, group in row_groups(corpus, _COLUMNS, [split])
    ]
    found = map_parallel(_group_pairs, jobs, num_workers, f"pairs of {split}")
    return [Pair(**{**record, "symbols": tuple(record["symbols"])}) for part in found for record in part]


def _group_pairs(job: _Job) -> list[dict[str, Any]]:
    if Path(job.target).exists():
        return list(read_json(job.target, list[_Record]))
    records = [
        vars(pair)
        for repo, files in _repositories(job)
        for pair in make_pairs(repo, files, job.max_pairs, job.max_characters)
    ]
    write_json(job.target, records)
    return records


def _repositories(job: _Job) -> Iterator[tuple[str, dict[str, str]]]:
    current, files = "", dict[str, str]()
    for row in read_group(Path(job.parquet), job.row_group, _COLUMNS).to_pylist():
        if row["repo"] != current:
            if files:
                yield current, files
            current, files = row["repo"], {}
        files[row["path"]] = row["content"]
    if files:
        yield current, files


def _require_pairs(pairs: dict[str, list[Pair]]) -> None:
    if not pairs["train"]:
        raise DataPrepError(
            "No pair was found in the train split: no file there uses by name what another one defines. Give a "
            "corpus of more repositories, or raise --max-characters."
        )


def _variant_files(variant: str, pairs: Sequence[Pair], number: int, seed: int) -> Pair:
    pair = pairs[number]
    if variant == "renamed":
        return pair.renamed(seed)
    if variant == "broken":
        other = _stranger(pairs, number)
        return Pair(pair.repo, other.definitions_path, pair.usage_path, pair.symbols, other.definitions, pair.usage)
    return pair


def _stranger(pairs: Sequence[Pair], number: int) -> Pair:
    """Return the next pair whose definitions hold none of this pair's symbols; other repositories are preferred."""
    pair = pairs[number]
    others = [pairs[(number + step) % len(pairs)] for step in range(1, len(pairs))]
    fitting = [other for other in others if not any(symbol in other.definitions for symbol in pair.symbols)]
    foreign = [other for other in fitting if other.repo != pair.repo]
    if not fitting:
        raise DataPrepError(
            f"The control `broken` has no other definitions for {pair.symbols[0]!r} of {pair.repo}: its split has "
            f"{len(pairs)} pairs. Give a corpus of more repositories, or other --split-ratios."
        )
    return (foreign or fitting)[0]


def _pair_name(pair: Pair, number: int) -> str:
    return f"{pair.repo}#pair-{number}"


def _records(split: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    for number, pair in enumerate(pairs):
        record = {"pair": _pair_name(pair, number), "split": split, "repo": pair.repo, "symbols": list(pair.symbols)}
        paths = {"definitions_path": pair.definitions_path, "usage_path": pair.usage_path}
        yield {**record, **paths, "uses": [{"offset": offset, "symbol": name} for offset, name in pair.uses()]}


def _write_variant(
    folder: Path,
    variant: str,
    pairs: dict[str, list[Pair]],
    seed: int,
    manifest: dict[str, Any],
    origins: dict[str, dict[str, Any]],
) -> None:
    target = folder / variant
    target.mkdir()
    splits: dict[str, Any] = {}
    repositories = []
    for split in SPLITS:
        writer = SplitWriter(target, split)
        for number, pair in enumerate(pairs[split]):
            name, origin = _pair_name(pair, number), origins[pair.repo]
            writer.add(_table(name, _variant_files(variant, pairs[split], number, seed), origin))
            repositories.append({**origin, "repo": name, "made_from": pair.repo, "split": split, "files": 2})
        shards = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in writer.close()}
        count = len(pairs[split])
        splits[split] = {"repositories": count, "files": 2 * count, "shards": shards}
    kept = {
        key: manifest[key] for key in ("format_version", "command", "made_with", "made_from", "made_by", "settings")
    }
    licenses = dict(Counter(entry["license"] for entry in repositories))
    identity = fingerprint([manifest["made_by"], variant])
    record = {**kept, "identity": identity, "variant": variant, "splits": splits, "licenses": licenses}
    write_json(target / "manifest.json", {**record, "repositories": repositories})


def _table(name: str, pair: Pair, origin: dict[str, Any]) -> pa.Table:
    rows = [
        {
            "repo": name,
            "path": path,
            "content": content,
            "license": origin["license"],
            "stars": origin["stars"],
            "version": origin["version"],
            "file_index": index,
            "n_bytes": len(content.encode()),
        }
        for index, (path, content) in enumerate(
            [(pair.definitions_path, pair.definitions), (pair.usage_path, pair.usage)]
        )
    ]
    return pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA)


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's)."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.cross_file_pairs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="a folder that build_corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the three corpora")
    parser.add_argument("--max-pairs-per-repo", type=whole_number(1, 10_000), default=8, help="default %(default)s")
    parser.add_argument(
        "--max-characters", type=whole_number(1, 10**9), default=20_000, help="of each file (default %(default)s)"
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="of the new names")
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    options = parser.parse_args(arguments)
    manifest, reused = make_corpora(
        options.corpus,
        options.out,
        max_pairs_per_repo=options.max_pairs_per_repo,
        max_characters=options.max_characters,
        seed=options.seed,
        num_workers=options.workers,
        command=command_line(),
    )
    STDERR.print(f"{options.out}: " + ("already complete, left as it is" if reused else "written"))
    for split, record in manifest["splits"].items():
        STDERR.print(f"  {split}: {record['repositories']} pairs")


if __name__ == "__main__":
    sys.exit(main())
