"""How much each parameter matters for the metric, by Optuna's PED-ANOVA over the completed trials."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from launch.sweeping.parameters import Parameter
from launch.sweeping.results import Result, ranked
from launch.sweeping.study import Study

LEAST = 8  # completed trials, below which the figures would be noise


def importances(study: Study, results: Sequence[Result]) -> dict[str, float]:
    """Parameter -> share, the greatest first; empty where too few trials have completed, or all have one value."""
    done = ranked(results, study.space.metric)
    if len(done) < LEAST or done[0].value == done[-1].value:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    memory = optuna.create_study(direction=study.space.metric.direction)
    spread = {p.name: _distribution(p) for p in study.space.parameters}
    for result in done:
        point = result.trial.point
        memory.add_trial(
            optuna.trial.create_trial(
                params=dict(point), distributions={n: spread[n] for n in point}, value=float(result.value or 0.0)
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(memory, evaluator=evaluator))


def _distribution(parameter: Parameter):  # type: ignore[no-untyped-def]
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    interval = parameter.interval
    if interval is None:
        return CategoricalDistribution(parameter.labels or [])
    if interval.integer:
        return IntDistribution(int(interval.low), int(interval.high), log=interval.log)
    return FloatDistribution(interval.low, interval.high, log=interval.log)
