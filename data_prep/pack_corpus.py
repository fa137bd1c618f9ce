"""Tokenize a corpus into flat memory-mapped arrays.

    python -m data_prep.pack_corpus --corpus DIR --tokenizer PATH_OR_ID

Writes DIR/packed-<tokenizer hash>/: for each split `<split>.tokens.bin` (little-endian uint16, or uint32 from 65,536
tokens in the vocabulary: the tokens of all files, one after the other, each file closed by the end-of-sequence token if
the tokenizer has one), `<split>.index.npz` (file_start, file_length, file_repo, repo_names), and `packed.json`.
Finished shards are kept when the program is stopped; finished output is left as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_ds.files import Kind, atomic_file, atomic_folder, check_folder, sha256_of, work_folder, write_json
from titans_ds.program import program, some_text, whole_number
from titans_ds.reading import read_json

from .console import GO_ON, STDERR, map_parallel
from .errors import DataPrepError
from .settings import fingerprint
from .shards import read_group, row_groups, shard_paths
from .splits import SPLITS
from .tokenizers_io import LoadedTokenizer, load_tokenizer

FORMAT_VERSION = 1
PACKED = Kind("a packed corpus", "packed.json", rb'"tokenizer_sha256"')
_COLUMNS = ("repo", "content", "n_bytes")
_BATCH_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class _Job:
    """One row group of one parquet shard."""

    parquet: str
    row_group: int
    tokenizer: str
    dtype: str
    target: str


def pack(corpus: Path, tokenizer: str, out: Path | None = None, num_workers: int = 1) -> tuple[Path, dict[str, Any]]:
    """Pack the corpus and return the packed folder and what its packed.json holds.

    Raises DataPrepError where `corpus` is not a corpus folder or the tokenizer cannot be loaded.
    """
    if out is not None:
        check_folder(out, PACKED)
    splits = _splits(corpus)
    loaded = load_tokenizer(tokenizer)
    wanted = _header(corpus, tokenizer, loaded)
    out = out or corpus / f"packed-{loaded.sha256[:12]}"
    check_folder(out, PACKED)
    if (out / PACKED.marker).exists():
        return out, _existing(out, wanted)
    # The tokenizer's path may differ between two runs: its hash says which one it is.
    identity = fingerprint({key: value for key, value in wanted.items() if key != "tokenizer"})
    with work_folder(out, identity) as work:
        jobs = {split: _jobs(corpus, split, tokenizer, wanted["dtype"], work) for split in splits}
        map_parallel(_tokenize_group, [job for group in jobs.values() for job in group], num_workers, "tokenizing")
        with atomic_folder(out, PACKED) as folder:
            counts = {split: _join(folder, split, group, wanted["dtype"]) for split, group in jobs.items()}
            record = {**wanted, "splits": counts}
            write_json(folder / PACKED.marker, record)
    return out, record


def _splits(corpus: Path) -> list[str]:
    """Return the splits that have shards, all of which can be opened."""
    read_json(corpus / "manifest.json", dict[str, Any], "Expected a folder that data_prep.build_corpus wrote.")
    splits = [split for split in SPLITS if shard_paths(corpus, split)]
    if not row_groups(corpus, _COLUMNS, splits):
        raise DataPrepError(f"{corpus} has no train-, validation- or test-*.parquet with rows. Build it again.")
    return splits


def _header(corpus: Path, tokenizer: str, loaded: LoadedTokenizer) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "dtype": "uint16" if loaded.vocab_size < 65_536 else "uint32",
        "vocab_size": loaded.vocab_size,
        "tokenizer": tokenizer,
        "tokenizer_sha256": loaded.sha256,
        "eos_token_id": loaded.eos_token_id,
        "corpus_manifest_sha256": sha256_of(corpus / "manifest.json"),
    }


def _existing(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    found = read_json(out / PACKED.marker, dict[str, Any])
    if any(found.get(key) != value for key, value in wanted.items() if key != "tokenizer") or "splits" not in found:
        raise DataPrepError(
            f"{out} is there already, and was made from another corpus or tokenizer. Remove it or give another --out."
        )
    return dict(found)


def _jobs(corpus: Path, split: str, tokenizer: str, dtype: str, work: Path) -> list[_Job]:
    return [
        _Job(str(path), group, tokenizer, dtype, str(work / f"{path.stem}-{group:05d}.npz"))
        for path, group in row_groups(corpus, _COLUMNS, [split])
    ]


def _tokenize_group(job: _Job) -> None:
    """Tokenize a row group into an .npz of `tokens`, `lengths` and `repos` (one entry a file)."""
    if Path(job.target).exists():
        return
    loaded = load_tokenizer(job.tokenizer)
    table = read_group(Path(job.parquet), job.row_group, _COLUMNS)
    encoded = [
        ids
        for texts in _batches(table["content"], table["n_bytes"].to_pylist())
        for ids in _encode(loaded, texts, job.dtype)
    ]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    tokens = np.concatenate(encoded) if encoded else np.zeros(0, job.dtype)
    with atomic_file(job.target) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, tokens=tokens, lengths=lengths, repos=np.array(table["repo"].to_pylist(), dtype=np.str_))


def _batches(content: Any, sizes: Sequence[int]) -> Iterator[list[str]]:
    """Batches of a few megabytes: an encoding takes many times the memory of its text."""
    start = size = 0
    for row, num_bytes in enumerate(sizes):
        size += num_bytes
        if size >= _BATCH_BYTES or row == len(sizes) - 1:
            yield content[start : row + 1].to_pylist()
            start, size = row + 1, 0


def _encode(loaded: LoadedTokenizer, texts: list[str], dtype: str) -> list[np.ndarray]:
    tail = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    encodings = loaded.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids + tail, dtype=dtype) for encoding in encodings]


def _join(folder: Path, split: str, jobs: Sequence[_Job], dtype: str) -> dict[str, int]:
    """Write the split's tokens and index from its parts, and return its counts."""
    lengths: list[np.ndarray] = []
    names: list[str] = []
    file_repo: list[int] = []
    with open(folder / f"{split}.tokens.bin", "wb") as handle:
        for job in jobs:
            with np.load(job.target) as part:
                handle.write(part["tokens"].astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes())
                lengths.append(part["lengths"])
                for repo in part["repos"].tolist():
                    if not names or names[-1] != repo:
                        names.append(repo)
                    file_repo.append(len(names) - 1)
    length = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    with open(folder / f"{split}.index.npz", "wb") as handle:
        np.savez(
            handle,
            file_start=np.cumsum(length, dtype=np.int64) - length,
            file_length=length.astype(np.int64),
            file_repo=np.array(file_repo, dtype=np.int32),
            repo_names=np.array(names, dtype=np.str_),
        )
    return {"files": len(length), "repos": len(names), "tokens": int(length.sum())}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.pack_corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="a folder that build_corpus wrote")
    parser.add_argument("--tokenizer", type=some_text, required=True, help="a tokenizer folder or a Hub id")
    parser.add_argument("--out", type=Path, help="default: CORPUS/packed-<tokenizer hash>")
    parser.add_argument(
        "--workers", type=whole_number(1, 1024), default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    return parser


@program(GO_ON)
def main(arguments: list[str]) -> None:
    """Run the program with these arguments (default: the command line's). Prints the packed folder on stdout."""
    options = _parser().parse_args(arguments)
    out, record = pack(options.corpus, options.tokenizer, options.out, options.workers)
    for split, counts in record["splits"].items():
        STDERR.print(f"  {split}: {counts['tokens']} tokens, {counts['files']} files, {counts['repos']} repositories")
    print(out)


if __name__ == "__main__":
    sys.exit(main())
