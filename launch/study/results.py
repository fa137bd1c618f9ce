"""The results of a study in one folder: tables (Markdown), figures (SVG), numbers (JSON), predictions by task id.

OUT/results/ holds results.md, results.json.gz, training.svg, differences.svg, metrics/ARM.jsonl.gz and
predictions/ARM--BENCHMARK.jsonl.gz. Predictions hold no prompt and no target: only task id, mode, boundary, the
completion and its likelihoods.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.reporting.tables import Table, reading
from eval.scoring.predictions import REMEDY, Line
from launch.stages.study import Place
from launch.study.figures import differences_figure, training_figure
from launch.study.settings import Study
from titans_ds.files import atomic_file, write_text
from titans_ds.reading import read_json, read_jsonl, read_metrics

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
        (arm, benchmark): read_json(path, dict[str, Any])
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
        write_gzip(out / "metrics" / f"{arm}.jsonl.gz", read_metrics(place.run(arm)))
    for arm, benchmark in compared:
        lines = read_jsonl(place.evaluation(arm, benchmark) / "predictions.jsonl", Line, REMEDY)
        write_gzip(out / "predictions" / f"{arm}--{benchmark}.jsonl.gz", (without_texts(record) for record, _ in lines))
    return write_text(out / "results.md", "\n".join(table.to_markdown() for table in tables))


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Held-out losses of a training run by step, from its metrics; empty where there is no run."""
    records = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return [record for record in records if record["kind"] == "evaluation"]


def gates(run: Path) -> list[tuple[int, list[float]]]:
    """Every layer's gate by step."""
    records = read_metrics(run)
    return [(r["step"], list(r["gate"].values())) for r in records if r["kind"] == "train" and "gate" in r]


def made_with(study: Study, place: Place, arm: str) -> dict[str, Any]:
    """Versions, commits, machine and commands (paths without their folders), as the run folders have them."""
    found: dict[str, Any] = {}
    if (versions := place.run(arm) / "versions.json").is_file():
        found["training"] = read_json(versions, dict[str, Any])
    for benchmark in study.benchmarks:
        if (path := place.evaluation(arm, benchmark) / "config.json").is_file():
            config = read_json(path, dict[str, Any])
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


def write_gzip(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The same records give the same bytes."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))


def _interval(mean: float, low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    ends = ("-" if end is None else f"{end:{sign}.{digits}f}" for end in (low, high))
    return f"{mean:{sign}.{digits}f} [{', '.join(ends)}]"
