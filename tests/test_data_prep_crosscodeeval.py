"""The CrossCodeEval loader on official rows of all four languages, and on files that are not CrossCodeEval."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.crosscodeeval import LANGUAGES, build_crossfile_text, load_rows, locate_file
from data_prep.errors import DataPrepError

CCE_DIR = Path(os.environ.get("TITANS_CCE_DIR", Path(__file__).parents[2] / "shared" / "data" / "crosscodeeval"))
OFFICIAL = "line_completion_rg1_openai_cosine_sim.jsonl"
needs_rows = pytest.mark.skipif(not CCE_DIR.is_dir(), reason=f"no CrossCodeEval rows at {CCE_DIR}; set TITANS_CCE_DIR")


@needs_rows
@pytest.mark.parametrize("language", LANGUAGES)
def test_official_rows_load_and_their_context_is_rebuilt_exactly(language: str) -> None:
    rows = load_rows(locate_file(CCE_DIR, language, OFFICIAL))
    assert len(rows) >= 10
    for row in rows:
        assert row.language == language
        assert row.crossfile_list
        assert build_crossfile_text(row.crossfile_list, language) == row.crossfile_text


@needs_rows
def test_written_rows_are_read_back_the_same(tmp_path: Path) -> None:
    source = locate_file(CCE_DIR, "python", OFFICIAL)
    copy = tmp_path / "rows.jsonl"
    copy.write_text("".join(json.dumps(row.to_json()) + "\n" for row in load_rows(source)), encoding="utf-8")
    assert load_rows(copy) == load_rows(source)
    assert [json.loads(x) for x in copy.read_text().splitlines()] == [
        json.loads(x) for x in source.read_text().splitlines()
    ]


def _row(**changes: object) -> dict[str, object]:
    metadata = {"task_id": "t/0", "repository": "o-r-1234567", "file": "a/b.py"}
    return {"prompt": "x.", "groundtruth": "y", "metadata": metadata, **changes}


@pytest.mark.parametrize("context", [None, {}, ""])
def test_absent_context_is_empty(tmp_path: Path, context: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(_row(crossfile_context=context)), encoding="utf-8")
    (row,) = load_rows(path)
    assert (row.crossfile_text, row.crossfile_list, row.language) == ("", (), "python")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no rows"),
        ('{"prompt": "x', "line 1: not JSON"),
        ("[1]", "expected a JSON object"),
        (json.dumps({"prompt": "x"}), "missing groundtruth, metadata"),
        (json.dumps(_row(metadata={"task_id": "t"})), "lacks repository, file"),
        (json.dumps(_row(metadata={"task_id": "t", "repository": "r", "file": "a.rs"})), "language of 'a.rs'"),
        (json.dumps(_row(crossfile_context=[1])), "crossfile_context is list"),
    ],
)
def test_what_is_not_crosscodeeval_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(DataPrepError, match=message):
        load_rows(path)


def test_a_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataPrepError, match="crosscodeeval_data"):
        locate_file(tmp_path, "python", OFFICIAL)
