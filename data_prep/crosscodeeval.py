"""CrossCodeEval's files: rows as dataclasses, and how their cross-file context is written.

    from data_prep.crosscodeeval import load_rows
    rows = load_rows("DIR/python/line_completion_rg1_bm25.jsonl")

A row is one line of JSON: `prompt`, `groundtruth`, `right_context`, `metadata` and, in the files with retrieval,
`crossfile_context` with `text` (what goes before the prompt) and `list` (the chunks it was made from).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DataPrepError

LANGUAGES = ("python", "java", "typescript", "csharp")
COMMENT_PREFIX = {"python": "#", "java": "//", "typescript": "//", "csharp": "//"}
_SUFFIX_LANGUAGE = {".py": "python", ".java": "java", ".ts": "typescript", ".tsx": "typescript", ".cs": "csharp"}
_HEADER = "Here are some relevant code fragments from other files of the repo:"
_CHUNK_HEADER = "the below code fragment can be found in:"
_REQUIRED = ("prompt", "groundtruth", "metadata")


@dataclass(frozen=True)
class CrossFileChunk:
    """One retrieved chunk: its lines, the file it is from, and the retriever's score."""

    retrieved_chunk: str
    filename: str
    score: float


@dataclass(frozen=True)
class CrossCodeEvalRow:
    """One sample. `crossfile_text` is "" and `crossfile_list` empty where the file has no retrieval."""

    task_id: str
    repository: str
    file: str
    prompt: str
    groundtruth: str
    right_context: str
    language: str
    crossfile_text: str = ""
    crossfile_list: tuple[CrossFileChunk, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the row as CrossCodeEval writes it."""
        chunks = [vars(chunk) for chunk in self.crossfile_list]
        return {
            "prompt": self.prompt,
            "groundtruth": self.groundtruth,
            "right_context": self.right_context,
            "metadata": {
                **self.metadata,
                "task_id": self.task_id,
                "repository": self.repository,
                "file": self.file,
            },
            "crossfile_context": {"text": self.crossfile_text, "list": chunks},
        }


def build_crossfile_text(chunks: Iterable[CrossFileChunk], language: str) -> str:
    """Return `crossfile_context.text` for these chunks, byte for byte as the official files have it.

    Raises DataPrepError for a language that CrossCodeEval does not have.
    """
    if language not in COMMENT_PREFIX:
        raise DataPrepError(f"Unknown language {language!r}. Expected one of {', '.join(LANGUAGES)}.")
    mark = COMMENT_PREFIX[language]
    parts = [f"{mark} {_HEADER}\n\n"]
    for chunk in chunks:
        body = "".join(f"{mark} {line}\n" for line in chunk.retrieved_chunk.split("\n"))
        parts.append(f"{mark} {_CHUNK_HEADER}\n{mark} {chunk.filename}\n{body}\n")
    return "".join(parts)


def locate_file(root: str | Path, language: str, name: str) -> Path:
    """Return ROOT/<language>/<name> or ROOT/crosscodeeval_data/<language>/<name>; DataPrepError if neither exists."""
    tried = [Path(root) / language / name, Path(root) / "crosscodeeval_data" / language / name]
    for path in tried:
        if path.is_file():
            return path
    raise DataPrepError(
        f"No CrossCodeEval file {name!r} for {language}. Looked for {tried[0]} and {tried[1]}. "
        "Give the folder that holds python/, java/, typescript/ and csharp/."
    )


def load_rows(path: str | Path, language: str | None = None) -> list[CrossCodeEvalRow]:
    """Return all rows of one jsonl file.

    The language is taken from the suffix of each row's file unless given. Raises DataPrepError naming the line that is
    not a CrossCodeEval row.
    """
    path = Path(path)
    rows = [_parse_row(record, language, where) for record, where in _records(path)]
    if not rows:
        raise DataPrepError(f"{path} has no rows. Expected CrossCodeEval jsonl, one sample a line.")
    return rows


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataPrepError(f"Cannot read {path}: {error}. Expected UTF-8 jsonl, one sample a line.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataPrepError(f"{where}: not JSON ({error}). The file may be cut short; fetch it again.") from error
        if not isinstance(record, dict):
            raise DataPrepError(f"{where}: expected a JSON object, found {type(record).__name__}.")
        yield record, where


def _parse_row(record: dict[str, Any], language: str | None, where: str) -> CrossCodeEvalRow:
    missing = [name for name in _REQUIRED if name not in record]
    if missing:
        raise DataPrepError(f"{where}: missing {', '.join(missing)}. Expected a CrossCodeEval row.")
    metadata = record["metadata"]
    missing = [name for name in ("task_id", "repository", "file") if name not in metadata]
    if missing:
        raise DataPrepError(f"{where}: metadata lacks {', '.join(missing)}. Expected a CrossCodeEval row.")
    text, chunks = _parse_context(record.get("crossfile_context"), where)
    return CrossCodeEvalRow(
        task_id=metadata["task_id"],
        repository=metadata["repository"],
        file=metadata["file"],
        prompt=record["prompt"],
        groundtruth=record["groundtruth"],
        right_context=record.get("right_context") or "",
        language=language or _language_of(metadata["file"], where),
        crossfile_text=text,
        crossfile_list=chunks,
        metadata=metadata,
    )


def _language_of(file: str, where: str) -> str:
    suffix = Path(file).suffix
    if suffix not in _SUFFIX_LANGUAGE:
        raise DataPrepError(
            f"{where}: cannot tell the language of {file!r}. Expected {', '.join(_SUFFIX_LANGUAGE)}; else give "
            f"`language`."
        )
    return _SUFFIX_LANGUAGE[suffix]


def _parse_context(context: Any, where: str) -> tuple[str, tuple[CrossFileChunk, ...]]:
    """Upstream writes a context that is absent as null, {} or ""."""
    if not context:
        return "", ()
    if not isinstance(context, dict):
        raise DataPrepError(f"{where}: crossfile_context is {type(context).__name__}; expected text and list.")
    chunks = tuple(
        CrossFileChunk(c["retrieved_chunk"], c["filename"], float(c.get("score", 0.0)))
        for c in context.get("list") or ()
    )
    return context.get("text") or "", chunks
