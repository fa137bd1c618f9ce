"""The report as one self-contained HTML page and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .markdown import code, fenced, plain
from .tables import Table, reading

MAX_SAMPLES = 40
_MEASURES = {"em": "EM", "es": "ES", "nll_target": "NLL of the target"}
_LONG = ("task_ids", "mode_list", "counts", "versions")


@dataclass(frozen=True)
class Report:
    """What a report shows: configuration, tables, figures (title -> SVG), the samples where modes differ, the
    comparison.
    """

    config: Mapping[str, Any]
    tables: list[Table]
    figures: Mapping[str, str]
    samples: list[dict[str, Any]]
    comparison: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Base model and data."""
        return f"CrossCodeEval: {Path(str(self.config['base'])).name} on {Path(str(self.config['data'])).name}"

    @property
    def answer(self) -> str:
        """The first sentence: does the memory hold what this repository says? Or the first contrast that there is."""
        alpha, contrasts = self.comparison["settings"]["alpha"], self.comparison["contrasts"]
        if not contrasts:
            return "One mode under one boundary: nothing to compare it with."
        asked = [c for c in contrasts if _mode(c["arm"]) == "memory" and _mode(c["against"]) == "memory_wrong"]
        return _finding((asked or contrasts)[0], alpha)

    def findings(self, decided: bool) -> list[str]:
        """One sentence for each contrast that a test decided, or for each of the others, which are inconclusive."""
        alpha = self.comparison["settings"]["alpha"]
        return [_finding(c, alpha) for c in self.comparison["contrasts"] if _is_decided(c, alpha) == decided]

    @property
    def settings(self) -> dict[str, str]:
        """The configuration without its long lists, as text."""
        return {name: _as_text(value) for name, value in self.config.items() if name not in _LONG}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _mode(arm: str) -> str:
    return arm.partition("@")[0]  # memory@heal


def _is_decided(contrast: Mapping[str, Any], alpha: float) -> bool:
    return any(reading(contrast[m], alpha) != "inconclusive" for m in _MEASURES if m in contrast)


def _finding(contrast: Mapping[str, Any], alpha: float) -> str:
    parts = []
    for measure, label in _MEASURES.items():
        if measure in contrast:
            test = contrast[measure]
            parts.append(f"{label} {test['difference']:+.3g}, {reading(test, alpha)} (p Holm {test['p_holm']:.3g})")
    share = f"{contrast['identical_share']:.0%} of completions identical"
    return f"{contrast['arm']} against {contrast['against']}: {'; '.join(parts)}; {share}."


def render_html(report: Report) -> str:
    """Return the page; it loads nothing from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = [(title, Markup(svg)) for title, svg in report.figures.items()]  # our own drawing, not data
    page = environment.get_template("report.html.j2")
    return page.render(
        report=report,
        figures=figures,
        samples=report.samples[:MAX_SAMPLES],
        highlight=highlight_difference,
    )


def render_markdown(report: Report) -> str:
    """Return the report without its figures as GitHub Markdown."""
    lines = [f"# {plain(report.title)}\n", f"**{plain(report.answer)}**\n"]
    for title, decided in (("Findings", True), ("Inconclusive", False)):
        if found := report.findings(decided):
            lines += [f"## {title}\n", *(f"- {plain(each)}" for each in found), ""]
    lines += ["## Tables\n", *(table.to_markdown() for table in report.tables)]
    lines += [f"## Samples where modes differ ({len(report.samples)})\n"]
    lines += [_sample_markdown(sample) for sample in report.samples[:MAX_SAMPLES]]
    config = fenced(json.dumps(report.config, indent=2, ensure_ascii=False), "json")
    return "\n".join([*lines, "## Configuration\n", config, ""])


def _sample_markdown(sample: Mapping[str, Any]) -> str:
    place = "{task_id} ({repository}, {file})".format_map(sample)
    lines = [f"### {plain(place)}\n"]
    lines += [fenced(sample["prompt_tail"] + "⟨cursor⟩"), f"- target: {code(sample['target'])}"]
    for name, outcome in sample["arms"].items():
        missed = ", ".join(f"{m['identifier']} ({'+'.join(m['places'])})" for m in outcome["missed"]) or "none"
        scores = f"EM {outcome['em'] / 100:.0f}, ES {outcome['es']:.0f}"
        lines.append(f"- {plain(name)}: {code(outcome['prediction'])} {scores}, missed: {plain(missed)}")
    return "\n".join(lines) + "\n"


def highlight_difference(prediction: str, target: str) -> Markup:
    """Return the prediction as HTML: what the target has too is plain, what it lacks is marked, what is missing is a
    gap.
    """
    pieces = []
    for kind, start, end, first, last in SequenceMatcher(None, prediction, target, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(escape(prediction[start:end]))
        if kind in ("replace", "delete"):
            pieces.append(Markup("<mark>{}</mark>").format(prediction[start:end]))
        if kind == "insert":
            pieces.append(Markup('<i class="gap" title="{}">‸</i>').format(target[first:last]))
    return Markup("").join(pieces)
