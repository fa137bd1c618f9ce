"""Reader of a packed corpus: the tokens of every file of every repository, memory-mapped.

A packed corpus is a folder that `python -m data_prep.pack_corpus` writes:
    packed.json              dtype, vocab_size, tokenizer, splits with their counts, format_version
    SPLIT.tokens.bin         flat uint16 or uint32, files one after another
    SPLIT.index.npz          file_start, file_length (int64, in tokens), file_repo (int32, non-decreasing), repo_names
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict

from titans_ds.errors import DataError
from titans_ds.reading import read_json, strict_record

_FORMAT_VERSION = 1
_INDEX_ARRAYS = ("file_start", "file_length", "file_repo", "repo_names")
_REMEDY = "make it again with `python -m data_prep.pack_corpus`"

Tokens = npt.NDArray[np.generic]
Integers = npt.NDArray[np.int64]


@strict_record
class _Meta(TypedDict):
    format_version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    splits: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PackedSplit:
    """One split: `tokens` is flat; file i is tokens[file_start[i] : file_start[i] + file_length[i]].

    Repository r owns the files [repo_files[r], repo_files[r + 1]), in reading order.
    """

    name: str
    tokens: Tokens
    file_start: Integers
    file_length: Integers
    repo_files: Integers
    repo_names: list[str]
    vocab_size: int

    @property
    def num_repos(self) -> int:
        """Number of repositories."""
        return len(self.repo_names)

    def file(self, index: int) -> Tokens:
        """The tokens of one file, memory-mapped. Raises DataError where one is none of the vocabulary."""
        start = int(self.file_start[index])
        tokens = self.tokens[start : start + int(self.file_length[index])]
        if int(tokens.max(initial=0)) >= self.vocab_size:
            raise DataError(
                f"split {self.name!r} holds the token {int(tokens.max())}, and its vocabulary has {self.vocab_size}; "
                f"{_REMEDY}"
            )
        return tokens


@dataclass(frozen=True)
class PackedCorpus:
    """A packed corpus folder; `meta` is its packed.json."""

    path: Path
    meta: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Every token is below this."""
        return int(self.meta["vocab_size"])

    def split(self, name: str, min_repos: int = 1) -> PackedSplit:
        """Open a split.

        Raises:
            DataError: the split is missing, empty, torn, or has fewer than `min_repos` repositories.
        """
        if name not in self.meta["splits"]:
            raise DataError(f"{self.path} has no split {name!r}; it has: {', '.join(sorted(self.meta['splits']))}")
        split = _open_split(self.path, name, str(self.meta["dtype"]), self.vocab_size)
        _check_repos(self.path, split, min_repos)
        return split

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise DataError where the corpus has tokens that the model has no embedding for."""
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"{self.path} was packed with a vocabulary of {self.vocab_size} tokens ({self.meta['tokenizer']}), "
                f"but the model has {model_vocab_size}; pack it with the model's own tokenizer"
            )


def open_corpus(path: str | Path) -> PackedCorpus:
    """Open a packed corpus folder. Raises DataError where it is missing or not one."""
    folder = Path(path)
    description = folder / "packed.json"
    if not description.is_file():
        raise DataError(f"{folder} is not a packed corpus (no packed.json); {_REMEDY}")
    meta = dict(read_json(description, _Meta, _REMEDY.capitalize()))
    if meta["format_version"] != _FORMAT_VERSION or meta["dtype"] not in ("uint16", "uint32"):
        raise DataError(
            f"{description} has format_version {meta['format_version']} and dtype {meta['dtype']}; expected "
            f"{_FORMAT_VERSION} and uint16 or uint32; {_REMEDY}"
        )
    return PackedCorpus(folder, meta)


def _open_split(folder: Path, name: str, dtype: str, vocab_size: int) -> PackedSplit:
    index = _load_index(folder / f"{name}.index.npz")
    start, length = index["file_start"].astype(np.int64), index["file_length"].astype(np.int64)
    tokens = _map_tokens(folder / f"{name}.tokens.bin", dtype, int((start + length).max(initial=0)))
    names = [str(repo) for repo in index["repo_names"]]
    repo_of_file = index["file_repo"].astype(np.int64)
    if (np.diff(repo_of_file) < 0).any() or repo_of_file.max(initial=-1) >= len(names):
        raise DataError(f"{folder}/{name}.index.npz does not group its files by repository; {_REMEDY}")
    repo_files = np.searchsorted(repo_of_file, np.arange(len(names) + 1)).astype(np.int64)
    return PackedSplit(name, tokens, start, length, repo_files, names, vocab_size)


def _load_index(path: Path) -> dict[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; {_REMEDY}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); {_REMEDY}") from error
    missing = [key for key in _INDEX_ARRAYS if key not in index]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; {_REMEDY}")
    files = index["file_start"].shape
    for key in _INDEX_ARRAYS[:3]:
        if index[key].dtype.kind not in "iu" or index[key].shape != files or len(files) != 1 or (index[key] < 0).any():
            raise DataError(f"{path}: {key} is not one whole number of 0 or more for each file; {_REMEDY}")
    return index


def _map_tokens(path: Path, dtype: str, num_tokens: int) -> Tokens:
    if not path.is_file():
        raise DataError(f"{path} is missing; {_REMEDY}")
    stored = path.stat().st_size // np.dtype(dtype).itemsize
    if stored < num_tokens:
        raise DataError(f"{path} holds {stored} tokens, but its index needs {num_tokens}: it is truncated; {_REMEDY}")
    return np.memmap(path, dtype=dtype, mode="r") if stored else np.zeros(0, dtype)


def _check_repos(folder: Path, split: PackedSplit, min_repos: int) -> None:
    if split.num_repos == 0 or not split.file_length.size:
        raise DataError(f"split {split.name!r} of {folder} is empty; {_REMEDY} from a corpus that has files in it")
    if split.num_repos < min_repos:
        raise DataError(
            f"split {split.name!r} of {folder} has {split.num_repos} repository; the wrong-memory control needs "
            f"{min_repos} or more, since it primes on another repository. Add some, or set evaluation.interval 0"
        )
