"""What a held-out comparison says: one sentence, one picture, and one example in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from titans_ds.errors import DataError
from titans_ds.files import atomic_file
from titans_ds.reading import read_json
from titans_ds.training.evaluation import Estimate, Evaluation, RepositoryLosses

_SURE = 2.0  # standard errors
_BARS = {"memory": "own memory", "wrong": "another's memory", "empty": "empty memory", "ablated": "ablated"}


def last_evaluation(run_folder: Path) -> Evaluation:
    """The last evaluation that a run wrote. Raises DataError where there is none."""
    files = sorted((run_folder / "evaluation").glob("step_*.json"))
    if not files:
        raise DataError(f"{run_folder} holds no evaluation; was the run made with evaluation.interval 0?")
    values = read_json(files[-1], dict[str, Any])
    forgetting = values.get("forgetting")
    return Evaluation(
        repositories=[RepositoryLosses(**r) for r in values["repositories"]],
        losses={mode: Estimate(**e) for mode, e in values["losses"].items()},
        differences={mode: Estimate(**e) for mode, e in values["differences"].items()},
        forgetting=Estimate(**forgetting) if forgetting else None,
    )


def sentence(evaluation: Evaluation) -> str:
    """Does it remember, and does that help? A difference counts from 2 standard errors on."""
    if not math.isfinite(evaluation.losses["memory"].mean):
        return "The loss with memory is not finite: the writes diverged. Lower optimizer.lr."
    wrong, empty, ablated = (evaluation.differences[name] for name in ("wrong", "empty", "ablated"))
    if _sign(wrong) <= 0 or _sign(empty) <= 0:
        helps = "what helps is the added path" if _sign(ablated) > 0 else "nothing of use was remembered"
        return f"Verdict: a package's own memory is not measurably better than another's and an empty one; {helps}."
    cost = {
        1: f"and than no memory by {ablated.mean:.4f}",
        0: "and as good as no memory within the error",
        -1: f"but worse than no memory by {-ablated.mean:.4f}, so that it disturbs more than it helps",
    }[_sign(ablated)]
    return (
        f"Verdict: it remembers. With its own memory a package's code is more likely than with another's by "
        f"{wrong.mean:.4f} \u00b1 {wrong.standard_error:.4f} nats a token, than with an empty one by {empty.mean:.4f} "
        f"\u00b1 {empty.standard_error:.4f}, {cost}."
    )


def _sign(difference: Estimate) -> int:
    """1 where the memory is better beyond noise, -1 where it is worse, else 0."""
    if not abs(difference.mean) > _SURE * difference.standard_error:
        return 0
    return 1 if difference.mean > 0 else -1


def draw_losses(evaluation: Evaluation, path: Path) -> None:
    """An SVG of the losses beside that with own memory, with 95% intervals of the paired differences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, mode in enumerate(_BARS):
        difference = evaluation.differences.get(mode, Estimate(0.0, 0.0))
        error = 1.96 * difference.standard_error if math.isfinite(difference.standard_error) else 0.0
        axes.errorbar(difference.mean, place, xerr=error, fmt="o", capsize=4, color="C0" if mode == "memory" else "C1")
        loss = evaluation.losses[mode].mean
        axes.annotate(f"{loss:.4f}", (difference.mean, place), (0, 7), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(_BARS)), list(_BARS.values()))
    axes.set_ylim(len(_BARS) - 0.5, -0.7)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_xlabel("held-out loss minus that with own memory\n(nats a token, 95% intervals)")
    with atomic_file(path) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})


def example_text(path: Path) -> str:
    """The example that launch/demo_example.py chose, as lines. Raises DataError where it can't be read."""
    found: dict[str, Any] = read_json(path, dict[str, Any])
    try:
        tail = "\n".join(found["prompt"].splitlines()[-3:])
        lines = [
            f"Example: {found['package']}, the place among {found['samples']} where own memory helps most beside "
            f"that of {found['wrong_package']} (it helps at {found['samples_where_own_is_better']}). The prompt ends:",
            tail,
            f"  goes on:            {found['truth']!r}",
            *(
                f"  {label + ':':<19} {found['completions'][name]!r}"
                for name, label in (("own", "own memory"), ("wrong", "another's memory"), ("ablated", "no memory"))
            ),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no example of launch/demo_example.py ({error}); run the demo again") from error
    return "\n".join(lines)
