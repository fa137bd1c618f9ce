"""Cross-file context as the file gives it, or put together again from its chunks.

  given      `crossfile_context.text`, untouched
  bm25       the row's chunks ordered by BM25 against the last 10 non-blank prompt lines
  embedding  the same by cosine similarity of mean-pooled embeddings of a local encoder (`--embedder`)
  oracle     BM25 with the target added to the query: an upper bound, never a result

All but `given` choose among the chunks of the row's `list`; the file's own retrieval decided which those are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EvalError
from .benchmark import data_prep_module

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow, CrossFileChunk

METHODS = ("given", "bm25", "embedding", "oracle")
_WORD = re.compile(r"\w+")
_QUERY_LINES = 10
Scorer = Callable[[str, list[str]], Sequence[float]]


class Retriever:
    """Puts a row's context together by one method.

    Args:
        method: see the module's text.
        num_chunks: how many chunks to keep; all of the row's where None. No meaning for `given`.
        embedder: folder of the encoder, for `embedding`.
    """

    def __init__(self, method: str = "given", num_chunks: int | None = None, embedder: str | None = None) -> None:
        if method not in METHODS:
            raise EvalError(f"Unknown retrieval {method!r}. Expected one of {', '.join(METHODS)}.")
        if method == "embedding" and embedder is None:
            raise EvalError("Retrieval by embedding needs an encoder: give its folder with --embedder.")
        self.method = method
        self._num_chunks = num_chunks
        self._scorer: Scorer = _Embedder(embedder).scores if embedder and method == "embedding" else bm25_scores

    def text(self, row: CrossCodeEvalRow) -> str:
        """Return the context that goes before the prompt; empty where the row has none."""
        if self.method == "given":
            return row.crossfile_text
        chunks = self.chunks(row)
        return data_prep_module("crosscodeeval").build_crossfile_text(chunks, row.language) if chunks else ""

    def snippets(self, row: CrossCodeEvalRow) -> tuple[str, ...]:
        """Return the chunks as code, each under a comment with its file's name: what a memory is primed with."""
        mark = data_prep_module("crosscodeeval").COMMENT_PREFIX[row.language]
        return tuple(f"{mark} {chunk.filename}\n{chunk.retrieved_chunk}\n" for chunk in self.chunks(row))

    def chunks(self, row: CrossCodeEvalRow) -> list[CrossFileChunk]:
        """Return the chunks, best first (in the file's order for `given`)."""
        chunks = list(row.crossfile_list)
        if self.method == "given" or not chunks:
            return chunks
        scores = self._scorer(self._query(row), [chunk.retrieved_chunk for chunk in chunks])
        order = sorted(range(len(chunks)), key=lambda i: -scores[i])
        return [chunks[i] for i in order[: self._num_chunks]]

    def _query(self, row: CrossCodeEvalRow) -> str:
        lines = [line for line in row.prompt.split("\n") if line.strip()][-_QUERY_LINES:]
        return "\n".join(lines) + (row.groundtruth if self.method == "oracle" else "")


def bm25_scores(query: str, documents: list[str]) -> Sequence[float]:
    """Return BM25 scores of the documents, on lower-case words."""
    import bm25s

    words = [_WORD.findall(document.lower()) or [""] for document in documents]
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return [float(score) for score in index.get_scores(_WORD.findall(query.lower()) or [""])]


class _Embedder:
    """Mean-pooled, normalised embeddings of a local encoder."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModel.from_pretrained(folder).eval()
        except Exception as error:  # a damaged folder raises any kind
            said = str(error).partition("\n")[0]
            raise EvalError(f"No encoder in {folder!r} ({said}). Give its folder.") from error

    def scores(self, query: str, documents: list[str]) -> Sequence[float]:
        import torch

        batch = self._tokenizer([query, *documents], padding=True, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            hidden = self._model(**batch).last_hidden_state  # [1 + documents, tokens, width]
        mask = batch["attention_mask"][..., None]
        vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return [float(score) for score in vectors[1:] @ vectors[0]]
