"""Scoring: parity with published scores, the truncation rule against a plain reference, damaged predictions refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import tree_sitter_python
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_sitter import Language, Node, Parser

from eval import crosscodeeval
from eval.scoring.metrics import edit_similarity, exact_match, identifier_overlap, identifiers
from eval.scoring.postprocess import first_line, is_settled, postprocess, truncate_statement
from eval.scoring.predictions import load_predictions
from titans_ds.errors import DataError

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "crosscodeeval"
CCE_DIR = Path(os.environ.get("TITANS_CCE_DIR", _BESIDE))
needs_rows = pytest.mark.skipif(not CCE_DIR.is_dir(), reason=f"no CrossCodeEval rows at {CCE_DIR} (TITANS_CCE_DIR)")

PYTHON_PROMPT = "import tools\n\ndef run(values):\n    total = tools."


@needs_rows
def test_parity_with_published_scores_on_every_row_through_the_command_line(tmp_path: Path) -> None:
    groups = defaultdict(list)
    for line in (CCE_DIR / "scored_predictions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        groups[record["model"], record["template"], record["postprocess"]].append(record)
    checked = 0
    for records in groups.values():
        predictions, rows = tmp_path / "predictions.jsonl", tmp_path / "rows.jsonl"
        lines = [{"task_id": r["task_id"], "mode": "m", "prediction": r["postprocessed"]} for r in records]
        predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = CCE_DIR / "python" / "line_completion_rg1_openai_cosine_sim.jsonl"
        arguments = ["score", "--predictions", predictions, "--data", data, "--out", tmp_path / "s.json"]
        options = ["--postprocess", "none", "--es-backend", "levenshtein", "--rows-out", rows]
        assert crosscodeeval.main([str(a) for a in arguments + options]) == 0
        scored = {s["task_id"]: s for s in map(json.loads, rows.read_text().splitlines())}
        for record in records:
            assert bool(scored[record["task_id"]]["em"]) == record["exactMatch"]
            assert scored[record["task_id"]]["es"] == record["editSimilarity"]
            checked += 1
        summary = json.loads((tmp_path / "s.json").read_text())
        assert summary["em"] == pytest.approx(100 * sum(r["exactMatch"] for r in records) / len(records), abs=1e-3)
        assert summary["es"] == pytest.approx(sum(r["editSimilarity"] for r in records) / len(records), abs=1e-3)
    assert checked == 352


def reference_truncation(prompt: str, completion: str, language: str) -> str:
    """The rule as it is worded: grow by one character, parse, look at the next one."""
    if language != "python":
        positions = [completion.find(mark) for mark in ";{}" if mark in completion]
        return completion[: min(positions) + 1] if positions and min(positions) > 0 else completion
    parser = Parser(Language(tree_sitter_python.language()))

    def broken(node: Node) -> bool:
        return node.type == "ERROR" or any(broken(child) for child in node.children)

    for end in range(1, len(completion)):
        if not broken(parser.parse((prompt + completion[:end]).encode()).root_node) and completion[end] == "\n":
            return completion[:end].rstrip()
    return completion


@pytest.mark.parametrize(
    "completion",
    [
        "total(values)\n    return total\n",
        "sum(\n        values,\n        start=0,\n    )\n    return total",
        'join("""a\nb\n""")\nprint()',
        "x = {\n",
        "\n\nreturn 1\n",
        "count",
        "",
        "sum([v for v in values  \n if v])   \n\n",
    ],
)
def test_python_truncation_is_the_character_by_character_rule(completion: str) -> None:
    expected = reference_truncation(PYTHON_PROMPT, completion, "python")
    assert truncate_statement(PYTHON_PROMPT, completion, "python") == expected


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab(),\n :#'\"=;{}é", max_size=30), st.sampled_from(["python", "java", "typescript", "csharp"]))
def test_truncation_matches_the_reference_on_any_text(completion: str, language: str) -> None:
    expected = reference_truncation(PYTHON_PROMPT, completion, language)
    assert truncate_statement(PYTHON_PROMPT, completion, language) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab(),\n :='\";{}", max_size=25), st.text(alphabet="ab()\n;}", max_size=8))
def test_settled_text_scores_the_same_whatever_follows(completion: str, more: str) -> None:
    for language in ("python", "java"):
        if is_settled(PYTHON_PROMPT, completion, language):
            for rule in ("parity", "strict", "first_line"):
                short = postprocess(rule, PYTHON_PROMPT, completion, "t", language)
                assert postprocess(rule, PYTHON_PROMPT, completion + more, "t", language) == short


def test_a_completion_that_begins_with_a_bracket_is_kept_whole_as_upstream_does_and_cut_by_strict() -> None:
    assert truncate_statement("", "} else { x; }", "java") == "} else { x; }"
    assert truncate_statement("", "} else { x; }", "java", cut_at_start=True) == "}"
    assert truncate_statement("", "a(); b();", "csharp") == "a();"


def test_strict_keeps_hashes_in_strings_and_floor_division_which_parity_cuts() -> None:
    code = 'paint("#fff") // 2  # halve'
    assert postprocess("parity", "x = canvas.", code, code, "python").prediction == 'paint("'
    assert postprocess("strict", "x = canvas.", code, code, "python").prediction.rstrip() == 'paint("#fff") // 2'
    java = 'get("http://a"); // go'
    assert postprocess("strict", "class A { void f() { this.", java, java, "java").target.rstrip() == 'get("http://a");'


def test_strict_keeps_the_rest_of_a_comment_that_the_prompt_began() -> None:
    assert postprocess("strict", "x = 1  # see ", "the docs", "the docs", "python").target == "the docs"


def test_first_line_skips_blank_lines() -> None:
    assert first_line("get(a)\nb") == "get(a)"
    assert first_line("\n\n  get(a)\nb") == "\n\n  get(a)"
    assert first_line("get(a)") == "get(a)"


def test_edit_similarity_backends_differ_and_are_right_on_known_pairs() -> None:
    assert edit_similarity("abcd", "bcde", "levenshtein") == 75 == edit_similarity("abcd", "bcde", "difflib")
    # difflib takes the longest common block "bab" first, which splits the rest; the best subsequence has 6 characters.
    assert edit_similarity("bacbbab", "bababab", "levenshtein") == 86
    assert edit_similarity("bacbbab", "bababab", "difflib") == 43
    assert edit_similarity("", "", "levenshtein") == 0 == edit_similarity("a", " ", "difflib")


def test_exact_match_ignores_blank_lines_and_indentation() -> None:
    assert exact_match("  a(\n\n  b)\n", "a(\nb)")
    assert not exact_match("a( b)", "a(b)")


def test_identifiers_drop_strings_and_keywords_but_keep_true_and_false() -> None:
    assert identifiers('get_it("name", x1, True) if None else 3', "python") == ["get_it", "x1", "True"]
    assert identifiers("await new Foo(true, 'a b')", "typescript") == ["await", "Foo", "true"]
    assert identifier_overlap(["a", "a", "b"], ["b", "c"]) == (0.5, 0.5, 0.5)
    assert identifier_overlap([], ["b"]) == (0.0, 0.0, 0.0)


def _row(task: str, repository: str = "r") -> str:
    metadata = {"task_id": task, "repository": repository, "file": "a.py"}
    return json.dumps({"prompt": "x.", "groundtruth": "get(a)", "right_context": "", "metadata": metadata})


def _score(tmp_path: Path, rows: list[str], predictions: list[str], *options: str) -> tuple[int, Path]:
    data, file, out = tmp_path / "data.jsonl", tmp_path / "p.jsonl", tmp_path / "out.json"
    data.write_text("\n".join(rows) + "\n")
    file.write_text("\n".join(predictions) + "\n")
    arguments = ["score", "--predictions", str(file), "--data", str(data), "--out", str(out), *options]
    return crosscodeeval.main(arguments), out


def _line(task: str, mode: str | None = None, text: str = "get(a)\n") -> str:
    return json.dumps({"task_id": task, "prediction": text} | ({"mode": mode} if mode else {}))


def test_score_writes_the_documented_keys_flat_for_one_mode_and_by_mode_for_several(tmp_path: Path) -> None:
    rows = [_row("a"), _row("b")]
    code, out = _score(tmp_path, rows, [_line("a"), _line("b", text="put(b)\n")])
    assert code == 0
    expected = ["em", "es", "es_backend", "id_em", "id_precision", "id_recall", "id_f1", "total"]
    summary = json.loads(out.read_text())
    assert list(summary) == expected
    assert (summary["em"], summary["total"], summary["id_recall"]) == (50.0, 2, 50.0)
    both = [_line(t, m) for t in "ab" for m in ("memory", "ablation")]
    assert _score(tmp_path, rows, both)[0] == 0
    summary = json.loads(out.read_text())
    assert set(summary) == {"memory", "ablation"}
    assert list(summary["memory"]) == expected


@pytest.mark.parametrize(
    ("rows", "predictions", "said"),
    [
        ([_row("a")], [_line("a"), _line("a")], "p.jsonl, line 2"),
        ([_row("a")], [_line("a"), "{"], "p.jsonl, line 2"),
        ([_row("a")], [json.dumps({"task_id": "a"})], "line 1: prediction is None; expected a valid string"),
        ([_row("a")], [json.dumps({"task_id": 17, "prediction": "x"})], "line 1: task_id is 17"),
        ([_row("a")], [json.dumps({"prediction": "x"})], "line 1: task_id is missing"),
        ([_row("a")], ["[]"], "line 1: all of it is []"),
        ([_row("a")], ['{"task_id": "a", "prediction": "\\ud800"}'], "line 1: not JSON"),
        ([_row("a")], [_line("a")[:-1] + ', "likelihood": {"target_nats": NaN}}'], "likelihood.target_nats is nan"),
        ([_row("a")], [_line("a")[:-1] + ', "likelihood": []}'], "likelihood is []"),
        ([_row("a").replace("get(a)", "")], [_line("a")], "data.jsonl, line 1: groundtruth is empty"),
        ([_row("a"), _row("b")], [_line("a")], "1 of 2 tasks without"),
        ([_row("a")], [_line("a"), _line("zz")], "'zz'"),
        ([_row("a"), _row("a")], [_line("a")], "data.jsonl, line 2"),
        ([_row("a"), "{"], [_line("a")], "data.jsonl, line 2"),
        ([_row("a")], [], "no predictions"),
    ],
)
def test_bad_files_are_refused_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], predictions: list[str], said: str
) -> None:
    code, out = _score(tmp_path, rows, predictions)
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert not out.exists()


def test_the_official_programs_own_predictions_are_read(tmp_path: Path) -> None:
    code, out = _score(tmp_path, ["\ufeff" + _row("a")], [json.dumps({"task_id": "a", "pred": "get(a)\n"})])
    assert code == 0
    assert json.loads(out.read_text())["em"] == 100


@settings(max_examples=60)
@given(
    record=st.fixed_dictionaries(
        {},
        optional={
            "task_id": st.sampled_from(["a", "", 17, None]),
            "prediction": st.sampled_from(["x", "", None, 1, []]),
            "pred": st.sampled_from(["x", None]),
            "mode": st.sampled_from(["memory", None, 3]),
            "boundary": st.sampled_from(["heal", None, {}]),
            "likelihood": st.sampled_from(
                [None, {}, [], {"target_nats": "1"}, {"target_bytes": 0, "target_nats": 1.5}]
            ),
        },
    )
)
def test_any_prediction_is_read_or_names_its_line(
    record: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-predictions.jsonl"
    path.write_text(json.dumps(record))
    text = record.get("prediction", record.get("pred"))
    wrong = [name for name in ("mode", "boundary") if not isinstance(record.get(name), (str, type(None)))]
    if isinstance(record.get("task_id"), str) and isinstance(text, str) and not wrong:
        with contextlib.suppress(DataError):  # of the likelihood
            (tasks,) = load_predictions(path).values()
            assert [prediction.text for prediction in tasks.values()] == [text]
    else:
        with pytest.raises(DataError, match=r"any-predictions\.jsonl, line 1: "):
            load_predictions(path)


def test_scores_replace_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text('{"mine": 1}')
    assert _score(tmp_path, [_row("a")], [_line("a")])[0] == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == '{"mine": 1}'


def test_partial_scores_what_both_have_and_counts_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _score(tmp_path, [_row("a"), _row("b")], [_line("a"), _line("zz")], "--partial")
    assert code == 0
    assert json.loads(out.read_text())["total"] == 1
    assert "1 without a prediction" in capsys.readouterr().out
