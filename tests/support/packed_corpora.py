"""Small packed corpora for the tests, written in the format of data_prep.pack_corpus."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.tiny_models import VOCAB


def write_packed(folder: Path, splits: dict[str, list[list[list[int]]]], vocab_size: int = VOCAB) -> Path:
    """Write `splits`: split name -> repositories -> files -> tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, repos in splits.items():
        files = [file for repo in repos for file in repo]
        lengths = np.array([len(file) for file in files], dtype=np.int64)
        np.array([t for file in files for t in file], dtype=np.uint16).tofile(folder / f"{name}.tokens.bin")
        np.savez(
            folder / f"{name}.index.npz",
            file_start=np.concatenate([[0], np.cumsum(lengths)])[: len(files)].astype(np.int64),
            file_length=lengths,
            file_repo=np.array([r for r, repo in enumerate(repos) for _ in repo], dtype=np.int32),
            repo_names=np.array([f"owner/repo{r}" for r in range(len(repos))], dtype=np.str_),
        )
        counts[name] = {"files": len(files), "repos": len(repos), "tokens": int(lengths.sum())}
    meta = {
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "tokenizer": "test",
        "tokenizer_sha256": "",
        "eos_token_id": 2,
        "splits": counts,
        "format_version": 1,
    }
    (folder / "packed.json").write_text(json.dumps(meta))
    return folder


def random_repos(num_repos: int, seed: int, files: int = 3, least: int = 5, most: int = 40) -> list[list[list[int]]]:
    """Repositories of random files; within a repository tokens repeat, so that there is something to remember."""
    rng = np.random.default_rng(seed)
    repos = []
    for _ in range(num_repos):
        words = rng.integers(3, VOCAB, 12)
        repos.append([rng.choice(words, rng.integers(least, most)).tolist() for _ in range(files)])
    return repos
