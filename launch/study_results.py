"""The results of a study in one folder: tables (Markdown), figures (SVG), numbers (JSON), predictions by task id.

OUT/results/ holds results.md, results.json.gz, training.svg, differences.svg, metrics/ARM.jsonl.gz and
predictions/ARM--BENCHMARK.jsonl.gz. Predictions hold no prompt and no target: only task id, mode, boundary, the
completion and its likelihoods.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.files import write_text
from eval.tables import Table, reading
from launch.study import Study
from launch.study_figures import differences_figure, training_figure
from launch.study_stages import Place

_KEPT = ("task_id", "mode", "boundary", "prediction", "finish_reason", "num_new_tokens", "likelihood")
_LIKELIHOODS = ("target_nats", "target_bytes", "identifiers_nats", "identifiers_bytes", "missing_nats")
_MEASURES = (  # with digits
    ("em", "EM %", 1),
    ("es", "ES", 1),
    ("nll_target", "NLL target", 3),
    ("nll_missing", "NLL new identifier", 2),
)
CONTRASTS = (
    ("memory", "ablation"),
    ("memory", "none"),
    ("memory", "memory_wrong"),
    ("memory_plus_concat", "concat"),
    ("concat", "ablation"),
)


def write_results(study: Study, place: Place) -> Path:
    """Collect what is there; returns the Markdown file."""
    out = place.out / "results"
    held_out = {arm: curve for arm in study.arms if (curve := evaluations(place.run(arm)))}
    compared = {
        (arm, benchmark): json.loads(path.read_text())
        for arm in study.arms
        for benchmark in study.benchmarks
        if (path := place.evaluation(arm, benchmark) / "comparison.json").is_file()
    }
    tables = ([held_out_table(held_out)] if held_out else []) + [
        table
        for (arm, benchmark), comparison in compared.items()
        for table in (means_table(arm, benchmark, comparison), contrasts_table(arm, benchmark, comparison))
    ]
    numbers = {
        "held_out": held_out,
        "evaluations": [{"arm": a, "benchmark": b, **comparison} for (a, b), comparison in compared.items()],
        "made_with": {arm: made_with(study, place, arm) for arm in study.arms},
    }
    write_gzip(out / "results.json.gz", [numbers])
    if held_out:
        write_text(out / "training.svg", training_figure(held_out, {a: gates(place.run(a)) for a in held_out}))
    if compared:
        write_text(out / "differences.svg", differences_figure(compared, CONTRASTS))
    for arm in held_out:
        write_gzip(out / "metrics" / f"{arm}.jsonl.gz", read_lines(place.run(arm) / "metrics.jsonl"))
    for arm, benchmark in compared:
        lines = read_lines(place.evaluation(arm, benchmark) / "predictions.jsonl")
        write_gzip(out / "predictions" / f"{arm}--{benchmark}.jsonl.gz", map(without_texts, lines))
    return write_text(out / "results.md", "\n".join(table.to_markdown() for table in tables))


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Held-out losses of a training run by step, from its metrics; empty where there is no run."""
    path = run / "metrics.jsonl"
    return [record for record in read_lines(path) if record["kind"] == "evaluation"] if path.is_file() else []


def gates(run: Path) -> list[tuple[int, list[float]]]:
    """Every layer's gate by step."""
    records = read_lines(run / "metrics.jsonl")
    return [(r["step"], list(r["gate"].values())) for r in records if r["kind"] == "train" and "gate" in r]


def made_with(study: Study, place: Place, arm: str) -> dict[str, Any]:
    """Versions, commits, machine and commands (paths without their folders), as the run folders have them."""
    found: dict[str, Any] = {}
    if (versions := place.run(arm) / "versions.json").is_file():
        found["training"] = json.loads(versions.read_text())
    for benchmark in study.benchmarks:
        if (path := place.evaluation(arm, benchmark) / "config.json").is_file():
            config = json.loads(path.read_text())
            names = ("command", "git_commit", "machine", "config_hash", "data_sha256", "adapter_sha256", "versions")
            found[benchmark] = {name: config.get(name) for name in names}
            found[benchmark]["command"] = re.sub(r"/[^ ]*/", "", str(config.get("command")))
    return found


def held_out_table(held_out: Mapping[str, list[dict[str, Any]]]) -> Table:
    """The last evaluation of every arm."""
    rows = []
    for arm, records in held_out.items():
        last = records[-1]
        losses, less = last["losses"], last["minus_memory"]
        cells = [f"{losses[mode]['mean']:.4f}" for mode in ("ablated", "memory", "wrong")]
        cells += [f"{less[m]['mean']:+.4f} ± {less[m]['standard_error']:.4f}" for m in ("ablated", "wrong")]
        rows.append([arm, str(last["step"]), *cells, f"{last['repositories']} / {last['tokens']:,}"])
    note = (
        "Held-out loss, nats a token, at the end of training, with standard errors over repositories. The paired "
        "differences are above 0 where the memory helps. The base is frozen: its own loss is the ablated one, before "
        "training and after."
    )
    columns = ["arm", "steps", "ablated", "memory", "wrong memory", "ablated - memory", "wrong - memory"]
    return Table("Held-out loss", note, [*columns, "repositories / tokens"], rows)


def means_table(arm: str, benchmark: str, comparison: Mapping[str, Any]) -> Table:
    """Means of every mode and boundary with intervals."""
    rows = []
    for name, found in comparison["arms"].items():
        cells = []
        for measure, _, digits in _MEASURES:
            value = found.get(measure)
            cells.append("-" if value is None else _interval(value["mean"], value["low"], value["high"], digits))
        rows.append([name, *cells])
    total = next(iter(comparison["arms"].values()))
    note = f"{total['total']} rows of {total['repositories']} repositories. In brackets 95% intervals by repository."
    return Table(f"{arm} on {benchmark}", note, ["mode@boundary", *(label for _, label, _ in _MEASURES)], rows)


def contrasts_table(arm: str, benchmark: str, comparison: Mapping[str, Any]) -> Table:
    """The questions of the study, paired by row."""
    rows = []
    for contrast in comparison["contrasts"]:
        mode, against = contrast["arm"].split("@")[0], contrast["against"].split("@")[0]
        if (mode, against) not in CONTRASTS:
            continue
        cells = []
        for measure, _, digits in _MEASURES[:3]:
            test = contrast[measure]
            cells.append(_interval(test["difference"], test["low"], test["high"], digits, "+"))
            cells[-1] += f"; {reading(test, comparison['settings']['alpha'])}"
        detectable = [contrast[m]["detectable"] for m, _, _ in _MEASURES[:3]]
        cells.append(" / ".join("n/a" if value is None else f"{value:.2g}" for value in detectable))
        rows.append([f"{contrast['arm']} - {contrast['against']}", *cells])
    note = "Paired differences; readings after Holm's correction. Detectable: with 80% power, in EM / ES / NLL."
    columns = ["contrast", *(label for _, label, _ in _MEASURES[:3]), "detectable"]
    return Table(f"{arm} on {benchmark}: differences", note, columns, rows)


def without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction with nothing of its row but the task id."""
    kept = {name: record.get(name) for name in _KEPT}
    if kept["likelihood"]:
        kept["likelihood"] = {k: round(v, 4) for k in _LIKELIHOODS if (v := kept["likelihood"].get(k)) is not None}
    return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file that this project wrote; a last line that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def write_gzip(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The same records give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(partial, path)


def _interval(mean: float, low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    ends = ("-" if end is None else f"{end:{sign}.{digits}f}" for end in (low, high))
    return f"{mean:{sign}.{digits}f} [{', '.join(ends)}]"
