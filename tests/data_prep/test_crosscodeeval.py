"""The CrossCodeEval loader on official rows of all four languages, and on files that are not CrossCodeEval."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from data_prep.crosscodeeval import LANGUAGES, build_crossfile_text, load_rows, locate_file
from data_prep.errors import DataPrepError
from titans_ds.errors import DataError

CCE_DIR = Path(os.environ.get("TITANS_CCE_DIR", Path(__file__).parents[3] / "shared" / "data" / "crosscodeeval"))
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


def _named(**changes: object) -> str:
    return json.dumps(_row(metadata={"task_id": "t", "repository": "r", "file": "a.py", **changes}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no rows"),
        ('{"prompt": "x', "line 1: not JSON"),
        ("[" * 1000, "line 1: not JSON"),
        ('{"prompt": "\\ud800"}', "line 1: not JSON"),
        ("[" + "1" * 5000 + "]", "line 1: not JSON"),
        ("[1]", "all of it is \\[1\\]; expected a valid JSON object"),
        (json.dumps({"prompt": "x"}), "groundtruth is missing"),
        (json.dumps(_row(prompt=None)), "prompt is None; expected a valid string"),
        (json.dumps(_row(groundtruth=None)), "groundtruth is None"),
        (json.dumps(_row(metadata=None)), "metadata is None"),
        (json.dumps(_row(metadata={"task_id": "t"})), "metadata.repository is missing"),
        (_named(task_id=17), "metadata.task_id is 17; expected a valid string"),
        (_named(file=None), "metadata.file is None"),
        (_named(file="a.rs"), "language of 'a.rs'"),
        (json.dumps(_row(right_context=[])), "right_context is \\[\\]"),
        (json.dumps(_row(crossfile_context=[1])), "crossfile_context is \\[1\\]"),
        (json.dumps(_row(crossfile_context={"list": [{"retrieved_chunk": "x"}]})), "list.0.filename is missing"),
        (json.dumps(_row(crossfile_context={"list": [{"retrieved_chunk": "x", "filename": "a", "score": "1"}]})),
         "list.0.score is '1'"),
        (json.dumps(_row(crossfile_context={"list": [{"retrieved_chunk": "x", "filename": "a", "score": math.nan}]})),
         "list.0.score is nan; expected a finite number"),
    ],
)  # fmt: skip
def test_what_is_not_crosscodeeval_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(path)


def test_a_byte_order_mark_and_unknown_keys_are_no_harm_and_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(_row(more=1)).encode() + b"\n")
    assert [row.prompt for row in load_rows(path)] == ["x."]
    path.write_bytes(json.dumps(_row()).encode() + b"\n" + json.dumps(_row()).encode().replace(b"x.", b"\xff"))
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_rows(path)


def test_a_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DataPrepError, match="crosscodeeval_data"):
        locate_file(tmp_path, "python", OFFICIAL)
