"""Writes everything that a finished run can say: scores, comparison, samples, results JSON, and the report.

python -m eval.crosscodeeval report DIR
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titans_ds.files import write_json, write_jsonl, write_text

from ..run_folder import RunFolder, read_run
from ..scoring.arms import Arm
from ..scoring.metrics import ES_BACKENDS
from ..scoring.postprocess import RULES
from ..scoring.score import summarise
from .analysis import differing_samples, missed_identifiers
from .comparison import Settings, compare_arms
from .figures import edit_similarity_figure, exact_match_figure, likelihood_figure, training_figures
from .harness_results import harness_results
from .report import Report, render_html, render_markdown
from .tables import Table, contrast_tables, means_table


def write_report(
    folder: str | Path,
    rule: str = "parity",
    es_backend: str = "difflib",
    settings: Settings | None = None,
    data: str | Path | None = None,
    training_run: str | Path | None = None,
    partial: bool = False,
) -> Path:
    """Write scores.json, comparison.json, per_sample.jsonl, results_*.json, report.md and report.html.

    Return the last.
    """
    settings = settings or Settings()
    run = read_run(folder, data, partial)
    arms = run.arms(rule, es_backend)
    comparison = compare_arms(arms, settings)
    samples = differing_samples(run, arms)
    report = _report(run, arms, comparison, samples, rule, es_backend, training_run)
    summaries = {name: summarise(list(arm.samples.values()), es_backend) for name, arm in arms.items()}
    write_json(run.path / "scores.json", next(iter(summaries.values())) if len(summaries) == 1 else summaries)
    write_json(run.path / "comparison.json", comparison)
    write_jsonl(run.path / "per_sample.jsonl", samples)
    results = harness_results(comparison, run.config, rule, es_backend)
    write_json(run.path / f"results_{time.strftime('%Y-%m-%dT%H-%M-%S')}.json", results)
    write_text(run.path / "report.md", render_markdown(report))
    path = write_text(run.path / "report.html", render_html(report))
    print(f"report: {path}")
    return path


def _report(
    run: RunFolder,
    arms: Mapping[str, Arm],
    comparison: Mapping[str, Any],
    samples: list[dict[str, Any]],
    rule: str,
    es_backend: str,
    training_run: str | Path | None,
) -> Report:
    figures = {"Exact match by mode": exact_match_figure(comparison)}
    if training_run is not None:
        drawn = training_figures(training_run)
        figures |= {f"Training: {title}": svg for title, svg in drawn.items()}
    figures["Edit similarity by mode"] = edit_similarity_figure(arms)
    if (likelihood := likelihood_figure(comparison)) is not None:
        figures["Target likelihood by mode"] = likelihood
    tables = [means_table(comparison, es_backend, rule), *contrast_tables(comparison)]
    tables += [_missed_table(missed_identifiers(run, arms)), _rules_table(run)]
    return Report(run.config, tables, figures, samples, comparison)


def _missed_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    note = (
        "Identifiers of the targets that predictions lack, by where they stand: in the prompt, in the context that "
        "some mode had before its prompt, in the text that the memory was primed with, or nowhere. Places overlap."
    )
    rows = [[name, *(str(number) for number in found.values())] for name, found in counts.items()]
    return Table("Missed identifiers", note, ["mode", "missed", "prompt", "context", "memory", "nowhere"], rows)


def _rules_table(run: RunFolder) -> Table:
    """EM and ES of every arm under every rule and backend: what a choice of scoring does to the figures."""
    rows = []
    for rule in RULES:
        scored = [run.arms(rule, backend) for backend in ES_BACKENDS]
        for name in run.predictions:
            means = [
                summarise(list(arms[name].samples.values()), backend)
                for arms, backend in zip(scored, ES_BACKENDS, strict=True)
            ]
            rows.append([name, rule, f"{means[0]['em']:.2f}", *(f"{mean['es']:.2f}" for mean in means)])
    rows.sort(key=lambda row: list(run.predictions).index(row[0]))
    note = "The same predictions under every post-processing rule and both edit-similarity backends."
    if run.config.get("stop") == "statement":
        note += " Completions ended with the statement (--stop statement), so that the rule none sees no more of them."
    return Table("Scoring rules", note, ["mode", "rule", "EM %", *(f"ES {backend}" for backend in ES_BACKENDS)], rows)
