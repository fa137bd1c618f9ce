"""The best trial of a study, in words and as a configuration of launch/train.py."""

from __future__ import annotations

import os
from pathlib import Path

from launch.sweeping.errors import SweepError
from launch.sweeping.results import Result, best_of, read_results
from launch.sweeping.study import Study


def describe_best(study: Study) -> str:
    """A few lines. SweepError where no trial has completed."""
    best = _best(study)
    lines = [f"trial {best.trial.number}: {study.space.metric.name} {best.value:.6g} ({study.space.metric.direction})"]
    lines += [f"  {name}: {value}" for name, value in best.trial.point.items()]
    return "\n".join([*lines, f"  run folder: {best.trial.run}"])


def export_best(study: Study, path: Path) -> Path:
    """Write the best trial's whole configuration, under the trial's name in a comment.

    Raises:
        SweepError: no trial has completed, or the file is there already.
    """
    best = _best(study)
    if path.exists():
        raise SweepError(f"{path} exists; choose another file")
    chosen = ", ".join(f"{name} {value}" for name, value in best.trial.point.items())
    reached = f"{study.space.metric.name} {best.value:.6g}"
    head = f"# Trial {best.trial.number} of the sweep {study.path.name}: {reached}\n# {chosen}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(head + (best.trial.folder / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    os.replace(partial, path)
    return path


def _best(study: Study) -> Result:
    results = read_results(study)
    best = best_of(results, study.space.metric)
    if best is None:
        ended = sum(1 for r in results if r.state not in ("running", "waiting"))
        raise SweepError(
            f"no trial of {study.path} has completed yet ({ended} of {study.size} have ended otherwise); see "
            f"launch/sweep.py status --study {study.path}"
        )
    return best
