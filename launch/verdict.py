"""What a held-out comparison says, in one honest sentence, and what an evaluation found, in a small table."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.table import Table

from titans_ds.errors import DataError
from titans_ds.training.evaluation import Estimate, Evaluation, RepositoryLosses

_SURE = 2.0  # standard errors
_MEASURES = {"em": "EM %", "es": "ES", "nll_target": "NLL, nats a byte", "nll_missing": "NLL of the new identifier"}


def last_evaluation(run_folder: Path) -> Evaluation:
    """The last evaluation that a run wrote. Raises DataError where there is none."""
    files = sorted((run_folder / "evaluation").glob("step_*.json"))
    if not files:
        raise DataError(f"{run_folder} holds no evaluation; was the run made with evaluation.interval 0?")
    values = json.loads(files[-1].read_text())
    forgetting = values.get("forgetting")
    return Evaluation(
        repositories=[RepositoryLosses(**r) for r in values["repositories"]],
        losses={mode: Estimate(**e) for mode, e in values["losses"].items()},
        differences={mode: Estimate(**e) for mode, e in values["differences"].items()},
        forgetting=Estimate(**forgetting) if forgetting else None,
    )


def sentence(evaluation: Evaluation) -> str:
    """Does the memory help, and is it because of what it has read? A difference counts from 2 standard errors on."""
    if not math.isfinite(evaluation.losses["memory"].mean):
        return "The loss with memory is not finite: the writes diverged. Lower graft.memory.step_size."
    ablated, wrong = evaluation.differences["ablated"], evaluation.differences["wrong"]
    text = f"{_against_ablation(ablated)}, and {_against_wrong(wrong)}"
    return f"{text}: {_conclusion(_sign(ablated), _sign(wrong))}"


def _sign(difference: Estimate) -> int:
    """1 where the memory is better beyond noise, -1 where it is worse, else 0."""
    if not abs(difference.mean) > _SURE * difference.standard_error:
        return 0
    return 1 if difference.mean > 0 else -1


def _against_ablation(difference: Estimate) -> str:
    verb = {1: "lowers", 0: "does not measurably change", -1: "raises"}[_sign(difference)]
    amount = f" by {abs(difference.mean):.4f} nats a token" if _sign(difference) else ""
    return f"The memory {verb} the held-out loss{amount}"


def _against_wrong(difference: Estimate) -> str:
    amount = f" by {abs(difference.mean):.4f}"
    return {
        1: f"a repository's own memory is better than another's{amount}",
        0: "a repository's own memory is no better than another's",
        -1: f"a repository's own memory is worse than another's{amount}",
    }[_sign(difference)]


def _conclusion(ablated: int, wrong: int) -> str:
    if wrong > 0:
        return {
            1: "it remembers what it has read, and that helps.",
            0: "it remembers something, but that does not pay for its disturbance.",
            -1: "it remembers something, but disturbs the model more than that helps.",
        }[ablated]
    if ablated > 0:
        return "what helps is the added path itself, not what was remembered."
    return "nothing shows here that it remembers anything of use."


def completion_table(folder: Path) -> Table:
    """The means of every mode, with standard errors clustered by repository, from an evaluation's comparison.json."""
    arms = json.loads((folder / "comparison.json").read_text())["arms"]
    total = next(iter(arms.values()))["total"]
    table = Table(title=f"Completions of packages first released in 2026 ({total} samples)")
    table.add_column("mode")
    for label in _MEASURES.values():
        table.add_column(label, justify="right")
    for name, arm in arms.items():
        table.add_row(name, *(_cell(arm.get(measure)) for measure in _MEASURES))
    return table


def _cell(mean: dict[str, float] | None) -> str:
    return "" if mean is None else f"{mean['mean']:.2f} ± {mean['standard_error']:.2f}"


def findings(folder: Path) -> list[str]:
    """The lines of the report's findings about the mode `memory`: paired, corrected for their number."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    lines = text.partition("## Findings")[2].partition("## Tables")[0].splitlines()
    return [line for line in lines if line.startswith("- memory ") or line.startswith("- memory@")]
