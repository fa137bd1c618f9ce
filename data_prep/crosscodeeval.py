"""CrossCodeEval's files: rows as dataclasses, and how their cross-file context is written.

    from data_prep.crosscodeeval import load_rows
    rows = load_rows("DIR/python/line_completion_rg1_bm25.jsonl")

A row is one line of JSON: `prompt`, `groundtruth`, `right_context`, `metadata` and, in the files with retrieval,
`crossfile_context` with `text` (what goes before the prompt) and `list` (the chunks it was made from).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from typing_extensions import NotRequired, TypedDict

from titans_ds.errors import DataError
from titans_ds.reading import read_jsonl, strict_record

from .errors import DataPrepError

LANGUAGES = ("python", "java", "typescript", "csharp")
COMMENT_PREFIX = {"python": "#", "java": "//", "typescript": "//", "csharp": "//"}
_SUFFIX_LANGUAGE = {".py": "python", ".java": "java", ".ts": "typescript", ".tsx": "typescript", ".cs": "csharp"}
_HEADER = "Here are some relevant code fragments from other files of the repo:"
_CHUNK_HEADER = "the below code fragment can be found in:"
_REMEDY = "Expected CrossCodeEval jsonl, one sample a line; fetch or make the file again."


@strict_record
class _Metadata(TypedDict):
    task_id: str
    repository: str
    file: str


@strict_record
class _Chunk(TypedDict):
    retrieved_chunk: str
    filename: str
    score: NotRequired[float]


@strict_record
class _Context(TypedDict):
    text: NotRequired[str | None]
    list: NotRequired[list[_Chunk] | None]


@strict_record
class _Row(TypedDict):
    prompt: str
    groundtruth: str
    right_context: NotRequired[str | None]
    metadata: _Metadata
    # Upstream writes a context that is absent as null, {} or "".
    crossfile_context: NotRequired[Annotated[_Context | None, BeforeValidator(lambda value: value or None)]]


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

    The language is taken from the suffix of each row's file unless given. Raises DataError naming the line and the
    field of what is not a CrossCodeEval row.
    """
    rows = []
    for record, where in read_jsonl(path, _Row, _REMEDY):
        metadata, context = record["metadata"], record.get("crossfile_context") or {}
        chunks = [
            CrossFileChunk(c["retrieved_chunk"], c["filename"], c.get("score", 0.0)) for c in context.get("list") or ()
        ]
        rows.append(
            CrossCodeEvalRow(
                task_id=metadata["task_id"],
                repository=metadata["repository"],
                file=metadata["file"],
                prompt=record["prompt"],
                groundtruth=record["groundtruth"],
                right_context=record.get("right_context") or "",
                language=language or _language_of(metadata["file"], where),
                crossfile_text=context.get("text") or "",
                crossfile_list=tuple(chunks),
                metadata=metadata,
            )
        )
    if not rows:
        raise DataError(f"{path} has no rows. {_REMEDY}")
    return rows


def _language_of(file: str, where: str) -> str:
    suffix = Path(file).suffix
    if suffix not in _SUFFIX_LANGUAGE:
        raise DataError(
            f"{where}: cannot tell the language of {file!r}. Expected {', '.join(_SUFFIX_LANGUAGE)}; else give "
            "`language`."
        )
    return _SUFFIX_LANGUAGE[suffix]
