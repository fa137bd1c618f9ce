"""Retrieval over a repository's other files, as CrossCodeEval does it.

The files are cut, blank lines dropped, into chunks of 10 lines that do not overlap. The query is the last 10 non-blank
lines of the prompt. `rg1` returns, for each of the best 5 chunks, the chunk that follows it in its file (the last
one of a file returns itself); `oracle` adds the target to the query and returns the chunks themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..crosscodeeval import CrossFileChunk
from ..errors import DataPrepError

CHUNK_LINES = 10
QUERY_LINES = 10
NUM_CHUNKS = 5
MODES = ("rg1", "oracle")
# Okapi BM25 as Lucene has it.
K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")
# Scores are compared after rounding: single precision must not decide between equal chunks.
_SCORE_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """10 non-blank lines of a file; `number` counts from 0 inside the file."""

    file: str
    number: int
    text: str


class Ranker(Protocol):
    """Scores all chunks of a repository for a query: higher is nearer."""

    name: str

    def index(self, chunks: Sequence[Chunk]) -> Any:
        """Return what `scores` needs to know about the chunks."""
        ...

    def scores(self, index: Any, query: str) -> np.ndarray:
        """Return float [number of chunks]."""
        ...


def non_blank(text: str) -> list[str]:
    """Return the lines that hold more than white space."""
    return [line for line in text.split("\n") if line.strip()]


def cut_file(path: str, text: str) -> list[Chunk]:
    """Cut one file."""
    lines = non_blank(text)
    return [
        Chunk(path, start // CHUNK_LINES, "\n".join(lines[start : start + CHUNK_LINES]))
        for start in range(0, len(lines), CHUNK_LINES)
    ]


def words(text: str) -> list[str]:
    """Return the words that BM25 counts."""
    return _WORD.findall(text)


class BM25:
    """Okapi BM25 over words, by bm25s."""

    name = "bm25"

    def index(self, chunks: Sequence[Chunk]) -> Any:
        """Return the index and the number of chunks."""
        try:
            import bm25s
        except ImportError as error:
            raise DataPrepError("BM25 retrieval needs bm25s: pip install 'titans-ds[data]'.") from error
        retriever = bm25s.BM25(method="lucene", k1=K1, b=B)
        retriever.index([words(chunk.text) or [""] for chunk in chunks], show_progress=False)
        return retriever

    def scores(self, index: Any, query: str) -> np.ndarray:
        """Return BM25 scores; a word that occurs twice in the query counts twice."""
        known = [word for word in words(query) if word in index.vocab_dict]
        if not known:
            return np.zeros(index.scores["num_docs"], dtype=np.float32)
        return np.asarray(index.get_scores(known))


class Embeddings:
    """Cosine similarity of mean-pooled embeddings of any encoder that transformers loads."""

    def __init__(self, model: str, max_tokens: int = 256, batch_size: int = 32) -> None:
        """`model`: a folder or Hub id. Raises DataPrepError where it cannot be loaded."""
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model).eval().requires_grad_(False)
        except Exception as error:  # a damaged folder raises any kind
            raise DataPrepError(
                f"Cannot load the embedding model {model!r}: {str(error).partition(chr(10))[0]}. Expected a folder or "
                "Hub id of an encoder."
            ) from error
        self.name = model.rstrip("/").rsplit("/", 1)[-1].replace("-", "_").lower() + "_cosine_sim"
        self._max_tokens, self._batch_size = max_tokens, batch_size

    def index(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """Return unit vectors, [number of chunks, width]."""
        return self._embed([chunk.text for chunk in chunks])

    def scores(self, index: np.ndarray, query: str) -> np.ndarray:
        """Return cosine similarities."""
        return index @ self._embed([query])[0]

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        parts = [self._embed_batch(texts[i : i + self._batch_size]) for i in range(0, len(texts), self._batch_size)]
        vectors = np.concatenate(parts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _embed_batch(self, texts: Sequence[str]) -> np.ndarray:
        options = {"padding": True, "truncation": True, "max_length": self._max_tokens, "return_tensors": "pt"}
        inputs = self._tokenizer(list(texts), **options)
        hidden = self._model(**inputs).last_hidden_state  # (B, T, H)
        mask = inputs["attention_mask"].unsqueeze(-1)  # (B, T, 1)
        return np.asarray((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))


class Retriever:
    """Retrieval inside one repository; the chunks of all files are indexed once."""

    def __init__(self, files: Mapping[str, str], ranker: Ranker) -> None:
        """`files`: path to text."""
        self.chunks = [chunk for path in sorted(files) for chunk in cut_file(path, files[path])]
        self._ranker = ranker
        self._index = ranker.index(self.chunks)

    def retrieve(self, file: str, prompt: str, target: str, mode: str) -> list[CrossFileChunk]:
        """Return up to 5 chunks of other files than `file`, best first."""
        query = "\n".join(non_blank(prompt)[-QUERY_LINES:])
        if mode == "oracle":
            query += target
        scores = np.round(self._ranker.scores(self._index, query).astype(np.float64), _SCORE_DIGITS)
        others = [number for number, chunk in enumerate(self.chunks) if chunk.file != file]
        best = sorted(others, key=lambda number: (-scores[number], number))[:NUM_CHUNKS]
        return [self._result(number, float(scores[number]), mode) for number in best]

    def _result(self, number: int, score: float, mode: str) -> CrossFileChunk:
        chunk = self.chunks[number]
        if mode == "rg1" and number + 1 < len(self.chunks) and self.chunks[number + 1].file == chunk.file:
            chunk = self.chunks[number + 1]
        return CrossFileChunk(chunk.text, chunk.file, score)
