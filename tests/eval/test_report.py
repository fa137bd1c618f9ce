"""Comparison, per-sample analysis and report on a run folder whose every number is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from eval import crosscodeeval
from eval.data.retrieval import Retriever, bm25_scores
from eval.modes import ModeInputs, get_modes
from eval.reporting.analysis import differing_samples, missed_identifiers
from eval.reporting.comparison import Settings, choose_contrasts, compare_arms
from eval.reporting.figures import training_figures
from eval.reporting.report import highlight_difference
from eval.run_folder import read_run
from tests.eval.test_generation import byte_level_tokenizer
from titans_ds.files import sha256_of

NUM_ROWS = 12


def _row(number: int) -> dict[str, Any]:
    chunk = {"retrieved_chunk": f"def fetch_{number}(path): ...", "filename": "lib.py", "score": 1.0}
    return {
        "prompt": f"import lib\nlocal_{number} = 1\nx = lib.",
        "groundtruth": f"fetch_{number}(local_{number})",
        "right_context": "",
        "metadata": {"task_id": f"t{number}", "repository": f"r{number // 3}", "file": "a.py"},
        "crossfile_context": {"text": f"# fetch_{number}\n", "list": [chunk]},
    }


def _line(number: int, mode: str, prediction: str, **more: Any) -> dict[str, Any]:
    likelihood = {"target_nats": 10.0 + number + (mode == "ablation") * (1 + number % 2), "target_tokens": 5}
    likelihood |= {"target_bytes": 10, "identifiers_nats": 4.0, "identifiers_tokens": 3, "identifiers_bytes": 8}
    likelihood |= {"missing_nats": 2.0, "missing_tokens": 1}
    return {
        "task_id": f"t{number}",
        "mode": mode,
        "boundary": "heal",
        "prediction": prediction,
        "config_hash": "h",
        "likelihood": likelihood,
        "context": None,
        "memory": [],
        "primed_from": None,
    } | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """memory is right on t0 to t3, ablation on t3 alone; otherwise both write markup."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(_row(n)) + "\n" for n in range(NUM_ROWS)))
    wrong = "<script>alert(1)</script>\n"
    lines = []
    for n in range(NUM_ROWS):
        right = f"fetch_{n}(local_{n})\n"
        lines.append(_line(n, "memory", right if n < 4 else wrong, memory=[f"m{n}"]))
        lines.append(_line(n, "ablation", right if n == 3 else wrong))
        lines.append(_line(n, "concat", right if n == 3 else wrong, context=f"c{n}"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [{"digest": f"m{n}", "text": f"def fetch_{n}"} for n in range(6)]
    texts += [{"digest": f"c{n}", "text": "nothing"} for n in range(NUM_ROWS)]
    (run / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    modes = [{"name": mode, "description": mode, "path": "graft"} for mode in ("memory", "ablation", "concat")]
    config = {"data": str(data), "data_sha256": sha256_of(data), "task_ids": [f"t{n}" for n in range(NUM_ROWS)]}
    config |= {"config_hash": "h", "base": "/models/tiny", "adapter": "/a", "num_rows": NUM_ROWS, "mode_list": modes}
    config |= {"batch_size": 1, "device": "cpu", "limit": None, "temperature": 0.0, "max_new_tokens": 50, "seed": 0}
    config |= {"versions": {"torch": "2"}, "git_commit": None, "stop": "statement"}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_contrasts_count_won_and_lost_and_know_the_likelihoods(folder: Path) -> None:
    arms = read_run(folder).arms("parity", "difflib")
    comparison = compare_arms(arms, Settings(num_resamples=500))
    tests = {(c["arm"], c["against"]): c for c in comparison["contrasts"]}
    assert set(tests) == {("memory", "ablation"), ("memory", "concat"), ("concat", "ablation")}
    em = tests["memory", "ablation"]["em"]
    assert (em["won"], em["lost"], em["n"]) == (3, 0, NUM_ROWS)
    assert em["difference"] == pytest.approx(25.0)
    assert em["p"] == pytest.approx(0.25)
    assert em["p_holm"] == pytest.approx(0.75)
    assert em["low"] < 25 < em["high"]
    assert not em["equivalent"]
    nll = tests["memory", "ablation"]["nll_target"]
    assert nll["difference"] == pytest.approx(-0.15)
    assert nll["p_holm"] < 0.05
    assert tests["memory", "ablation"]["identical_share"] == pytest.approx(9 / 12)
    # All equal, but twelve samples cannot exclude a difference of a point.
    same = tests["concat", "ablation"]["em"]
    assert same["difference"] == 0
    assert same["equivalence_p"] > 0.05
    assert comparison["arms"]["memory"]["em"]["mean"] == pytest.approx(100 / 3)


def test_contrasts_stay_within_a_boundary_and_pair_the_boundaries_of_a_mode() -> None:
    names = ["memory@heal", "ablation@heal", "memory@plain", "ablation@plain"]
    assert choose_contrasts(names) == [
        ("memory@heal", "ablation@heal"),
        ("memory@plain", "ablation@plain"),
        ("memory@heal", "memory@plain"),
        ("ablation@heal", "ablation@plain"),
    ]
    assert choose_contrasts(["vanilla", "my_mode"]) == [("my_mode", "vanilla")]
    assert choose_contrasts(["vanilla"]) == []


def test_missed_identifiers_are_located(folder: Path) -> None:
    run = read_run(folder)
    arms = run.arms("parity", "difflib")
    samples = {sample["task_id"]: sample for sample in differing_samples(run, arms)}
    assert set(samples) == {"t0", "t1", "t2"}
    missed = samples["t0"]["arms"]["ablation"]["missed"]
    assert missed == [
        {"identifier": "fetch_0", "places": ["memory"]},
        {"identifier": "local_0", "places": ["prompt"]},
    ]
    assert samples["t0"]["arms"]["memory"]["missed"] == []
    assert samples["t0"]["em_differs"]
    counts = missed_identifiers(run, arms)
    # Eight rows without a hit miss both names; t4 and t5 have a priming text that holds theirs.
    assert counts["memory"] == {"missed": 16, "prompt": 8, "context": 0, "memory": 2, "nowhere": 6}


def test_report_escapes_what_models_write_and_says_what_was_found(folder: Path) -> None:
    assert crosscodeeval.main(["report", str(folder), "--resamples", "200"]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("<script") == 1  # the page's own, at its end
    assert "alert" not in page[page.index("<script") :]
    assert "&lt;" in page
    assert page.count("<svg") == 3
    assert "memory against ablation: EM +25, inconclusive" in page
    assert page.index('class="answer"') < page.index("<svg") < page.index("<table")  # the answer first
    markdown = (folder / "report.md").read_text()
    assert "| memory - ablation | inconclusive | +25 [" in markdown
    assert json.loads((folder / "scores.json").read_text())["memory"]["em"] == pytest.approx(33.3333)
    results = json.loads(next(folder.glob("results_*.json")).read_text())
    assert results["n-samples"]["crosscodeeval_memory"] == {"original": 12, "effective": 12}
    assert len((folder / "per_sample.jsonl").read_text().splitlines()) == 3


def test_highlighting_marks_what_the_target_lacks() -> None:
    assert str(highlight_difference("get<a>", "get")) == "get<mark>&lt;a&gt;</mark>"
    assert 'title="_total"' in str(highlight_difference("get(a)", "get_total(a)"))


def test_damaged_folders_are_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert crosscodeeval.main(["report", str(tmp_path / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    original = rows.read_text()
    rows.write_text(original.replace("import lib", "import bib"))
    assert crosscodeeval.main(["report", str(folder)]) == 2
    assert "SHA-256" in capsys.readouterr().err
    rows.write_text(original)
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:-3]))
    assert crosscodeeval.main(["report", str(folder)]) == 2
    assert "1 of 12 tasks" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    assert crosscodeeval.main(["report", str(folder), "--partial", "--resamples", "200"]) == 0
    assert crosscodeeval.main(["compare", str(folder), str(folder), "--partial", "--alpha", "2"]) == 2
    for margin in ("-1", "nan"):
        assert crosscodeeval.main(["compare", str(folder), str(folder), "--partial", "--margin-es", margin]) == 2
        assert "margin" in capsys.readouterr().err


def test_compare_pairs_two_folders_by_task(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "comparison.json"
    assert crosscodeeval.main(["compare", str(folder), str(folder), "--out", str(out), "--resamples", "200"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    kept = [json.dumps(line) for line in lines if line["mode"] == "memory"]
    (other / "predictions.jsonl").write_text("\n".join(kept) + "\n")
    assert crosscodeeval.main(["compare", str(folder), str(other), "--out", str(out), "--resamples", "200"]) == 0
    contrasts = json.loads(out.read_text())["contrasts"]
    assert [(c["arm"], c["against"]) for c in contrasts] == [("A:memory", "B:memory")]
    assert contrasts[0]["identical_share"] == 1.0
    assert "B:memory" in capsys.readouterr().out


def test_rows_of_one_repository_are_reported_without_claims(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"task_ids": ["t0", "t1"]}))
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:6]))
    assert crosscodeeval.main(["report", str(folder)]) == 0
    results = json.loads(next(folder.glob("results_*.json")).read_text())["results"]["crosscodeeval_memory"]
    assert results["em,parity-difflib"] == 100.0
    assert results["em_stderr,parity-difflib"] == "N/A"
    comparison = json.loads((folder / "comparison.json").read_text())
    nll = comparison["contrasts"][0]["nll_target"]
    assert (nll["low"], nll["high"], nll["p"], nll["equivalent"]) == (None, None, 1.0, False)


def test_training_figures_draw_losses_and_gates_but_no_gradients(tmp_path: Path) -> None:
    values = {"kind": "train", "gate": {"3": 0.5}, "gate_gradient": {"3": 1e-3}}
    records = [values | {"step": n, "loss": 3.0 - n} for n in range(3)]
    torn = '{"kind": "train", "step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    figures = training_figures(tmp_path)
    assert set(figures) == {"losses", "gates"}
    assert "gate/3" in figures["gates"]
    assert "gradient" not in figures["gates"]


def test_wrong_snippets_are_another_repositorys_and_the_same_whatever_the_limit(folder: Path) -> None:
    rows = read_run(folder).rows
    (mode,) = get_modes("memory_wrong")
    everything, other_seed = ModeInputs(rows, Retriever(), 0), ModeInputs(rows, Retriever(), 1)
    chosen = {task: mode.priming(row, everything) for task, row in rows.items()}
    for task, priming in chosen.items():
        assert priming.source is not None
        assert rows[priming.source].repository != rows[task].repository
        assert priming == mode.priming(rows[task], everything)
    assert any(mode.priming(row, other_seed) != chosen[task] for task, row in rows.items())


def test_embedding_retrieval_ranks_by_similarity_with_a_local_encoder(folder: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", num_attention_heads=2, **sizes))
    encoder.save_pretrained(tmp_path / "encoder")
    byte_level_tokenizer().save_pretrained(tmp_path / "encoder")
    row = read_run(folder).rows["t0"]
    query = "\n".join(line for line in row.prompt.split("\n") if line.strip())
    chunks = [replace(row.crossfile_list[0], retrieved_chunk=text) for text in ("zzz ~~ 99", query, "class Car: pass")]
    retriever = Retriever("embedding", num_chunks=2, embedder=str(tmp_path / "encoder"))
    found = retriever.chunks(replace(row, crossfile_list=tuple(chunks)))
    assert len(found) == 2
    assert found[0].retrieved_chunk == query
    assert query.split("\n")[0] in retriever.text(replace(row, crossfile_list=tuple(chunks)))


def test_bm25_puts_the_chunk_that_shares_words_first() -> None:
    scores = bm25_scores("open the file path", ["def add(a, b)", "def open_file(path): open(path)", "class Car"])
    assert max(range(3), key=scores.__getitem__) == 1
