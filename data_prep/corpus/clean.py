"""Write a corpus again without some of its repositories and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from titans_ds.files import atomic_folder, sha256_of, write_json, write_jsonl

from ..errors import DataPrepError
from ..shards import CORPUS, Removal, read_batches, read_manifest, shard_paths
from ..splits import SPLITS, require_filled
from .assemble import CORPUS_SCHEMA
from .publish import SplitWriter


def rewrite_corpus(corpus: Path, out: Path, removals: list[Removal], record: dict[str, Any]) -> None:
    """Write `corpus` without the removals to folder `out`, whole or not at all.

    Repositories left with fewer files than the corpus's own minimum are added to `removals`. Raises DataPrepError where
    nothing, or no repository of a split, is left.
    """
    manifest = read_manifest(corpus)
    gone = {removal["repo"] for removal in removals if not removal["path"]}
    files = {(removal["repo"], removal["path"]) for removal in removals if removal["path"]}
    left = {entry["repo"]: entry["files"] for entry in manifest["repositories"] if entry["repo"] not in gone}
    for repo, number in Counter(repo for repo, _ in files).items():
        left[repo] -= number
        if left[repo] < manifest["settings"]["min_files"]:
            removals.append(Removal(repo=repo, path="", reason="min_files", matched=""))
            del left[repo]
    if not left:
        raise DataPrepError("Nothing is left: every repository of the corpus is in the benchmark. Give another corpus.")
    kept = [{**entry, "files": left[entry["repo"]]} for entry in manifest["repositories"] if entry["repo"] in left]
    require_filled(Counter(entry["split"] for entry in kept), tuple(manifest["settings"]["split_ratios"]))
    with atomic_folder(out, CORPUS) as folder:
        splits = {split: _rewrite_split(corpus, folder, split, left, files, kept) for split in SPLITS}
        write_jsonl(folder / "removed.jsonl", removals)
        decontamination = {**record, "removed": removals}
        changed = {"identity": record["identity"], "made_from": manifest["identity"], "splits": splits}
        changed["filters"] = [*manifest.get("filters", []), _last_filter(kept)]
        changed["licenses"] = dict(Counter(entry["license"] for entry in kept).most_common())
        write_json(
            folder / "manifest.json",
            {**manifest, **changed, "repositories": kept, "decontamination": decontamination},
        )


def _last_filter(kept: Sequence[dict[str, Any]]) -> dict[str, Any]:
    files = sum(entry["files"] for entry in kept)
    return {"filter": "decontamination", "files": files, "repositories": len(kept)}


def _rewrite_split(
    corpus: Path,
    folder: Path,
    split: str,
    left: dict[str, int],
    files: set[tuple[str, str]],
    kept: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    writer = SplitWriter(folder, split)
    for table in _kept_rows(corpus, split, left, files):
        writer.add(table)
    shards = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in writer.close()}
    mine = [entry for entry in kept if entry["split"] == split]
    return {"repositories": len(mine), "files": sum(entry["files"] for entry in mine), "shards": shards}


def _kept_rows(corpus: Path, split: str, left: dict[str, int], files: set[tuple[str, str]]) -> Iterator[pa.Table]:
    """Yield what stays, with `file_index` counted anew. A repository's rows may span two batches."""
    number = -1
    current = ""
    for path in shard_paths(corpus, split):
        for batch in read_batches(path, CORPUS_SCHEMA.names):
            names = zip(batch["repo"].to_pylist(), batch["path"].to_pylist(), strict=True)
            keep = [repo in left and (repo, name) not in files for repo, name in names]
            table = pa.Table.from_batches([batch]).filter(pa.array(keep, type=pa.bool_())).cast(CORPUS_SCHEMA)
            index = []
            for repo in table["repo"].to_pylist():
                number, current = (number + 1, current) if repo == current else (0, repo)
                index.append(number)
            if index:
                place = CORPUS_SCHEMA.get_field_index("file_index")
                yield table.set_column(place, CORPUS_SCHEMA.field(place), pa.array(index, type=pa.int32()))
