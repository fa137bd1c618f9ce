"""Paired statistics that can carry a negative result; samples of one repository count as going together.

  mcnemar_exact         paired exact match: exact binomial test on the discordant pairs
  clustered_interval    a mean or a paired difference, its interval and p-value: bootstrap-t over repositories
  proportion_interval   exact match of one arm: Wilson's interval on the effective sample size
  tost                  equivalence within a stated margin (two one-sided tests)
  minimum_detectable_*  what the sample at hand could have shown
  holm                  correction over all modes compared

Differences are in the metric's own unit (percentage points, or nats). Clusters are repositories; with one sample in
each, all of it becomes the ordinary test for independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..errors import EvalError

DEFAULT_RESAMPLES = 10_000
Floats = NDArray[np.float64]
_LEAST_CLUSTERS = 5  # fewer that differ: no bootstrap, and no equivalence from their variance alone


@dataclass(frozen=True)
class Interval:
    """An estimate with its standard error, bounds and, for a difference, the two-sided p-value against 0."""

    mean: float
    low: float
    high: float
    standard_error: float
    p_value: float
    num_samples: int
    num_clusters: int


@dataclass(frozen=True)
class _ClusterSums:
    """Per cluster: the sum of the values and their number, both of shape [clusters]."""

    sums: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> _ClusterSums:
    if len(values) != len(clusters) or not len(values):
        raise EvalError(f"{len(values)} values for {len(clusters)} cluster names; expected as many, and at least one.")
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[name] for name in clusters])
    array = np.asarray(values, dtype=np.float64)
    return _ClusterSums(np.bincount(index, weights=array), np.bincount(index).astype(np.float64))


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Return the cluster-robust standard error of the pooled mean (linearised ratio, factor G / (G - 1)).

    Nan for one cluster.
    """
    groups = _cluster_sums(values, clusters)
    return float(_standard_errors(groups, np.ones((1, len(groups.sums))))[1][0])


def _standard_errors(groups: _ClusterSums, draws: Floats) -> tuple[Floats, Floats]:
    """Return means and standard errors, shape [draws], where draws[b, g] says how often b holds cluster g."""
    sums, counts = groups.sums, groups.counts
    num_clusters = len(sums)
    totals = draws @ counts
    means = (draws @ sums) / totals
    squares = draws @ sums**2 - 2 * means * (draws @ (sums * counts)) + means**2 * (draws @ counts**2)
    factor = num_clusters / (num_clusters - 1) if num_clusters > 1 else math.nan
    return means, np.sqrt(np.maximum(factor * squares, 0.0)) / totals


def clustered_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    num_resamples: int = DEFAULT_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return mean, bootstrap-t interval over clusters, and the p-value of the mean against 0.

    Clusters are drawn with replacement, the pooled mean is studentised by its cluster-robust standard error (Efron and
    Tibshirani 1993, chapter 12; Cameron, Gelbach and Miller 2008 for clusters). Where fewer than 5 clusters carry it,
    Student's t with clusters - 1 degrees of freedom is used; one cluster gives an infinite interval and p = 1. Equal
    values give a point.
    """
    groups = _cluster_sums(values, clusters)
    num_clusters = len(groups.sums)
    error = clustered_standard_error(values, clusters)
    if num_clusters < 2:
        return Interval(groups.mean, -math.inf, math.inf, math.nan, 1.0, len(values), num_clusters)
    if error <= 1e-12 * max(1.0, abs(groups.mean)):
        # A constant difference: all signs equal by chance, clusters being exchangeable.
        p_value = 1.0 if abs(groups.mean) < 1e-12 else 2.0 ** (1 - num_clusters)
        return Interval(groups.mean, groups.mean, groups.mean, 0.0, p_value, len(values), num_clusters)
    if np.count_nonzero(groups.sums - groups.mean * groups.counts) < _LEAST_CLUSTERS:
        low, high, p_value = _student(groups.mean, error, num_clusters - 1, level)
    else:
        low, high, p_value = _bootstrap_t(groups, error, level, num_resamples, seed)
    return Interval(groups.mean, low, high, error, p_value, len(values), num_clusters)


def _student(mean: float, error: float, degrees: int, level: float) -> tuple[float, float, float]:
    reach = float(stats.t.ppf((1 + level) / 2, degrees)) * error
    return mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, degrees))


def _bootstrap_t(
    groups: _ClusterSums, error: float, level: float, num_resamples: int, seed: int
) -> tuple[float, float, float]:
    means, errors = _standard_errors(groups, _draws(len(groups.sums), num_resamples, seed))
    usable = errors > 1e-9 * error
    pivots = np.abs(means[usable] - groups.mean) / errors[usable]
    reach = float(np.quantile(pivots, level)) * error
    p_value = (1 + np.count_nonzero(pivots >= abs(groups.mean) / error)) / (1 + len(pivots))
    return groups.mean - reach, groups.mean + reach, float(p_value)


@lru_cache(maxsize=4)
def _draws(num_clusters: int, num_resamples: int, seed: int) -> Floats:
    """How often each resample holds each cluster, [resamples, clusters]: the same for all measures over them."""
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples)
    return draws.astype(np.float64)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value for the numbers of pairs that only the first, or only the second, got
    right.
    """
    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def proportion_interval(
    values: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's interval, 0 to 1, of the share of ones, on the sample size divided by the design effect (at
    least 1).

    The design effect is the cluster-robust variance over the binomial one (Korn and Graubard 1998). It stays honest
    at 0 and 1, where a bootstrap gives a point.
    """
    total, share = len(values), float(np.mean(values))
    binomial = share * (1 - share) / total
    error = clustered_standard_error(values, clusters)
    effect = max(1.0, error**2 / binomial) if binomial > 0 and math.isfinite(error) else 1.0
    effective = total / effect
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    reach = z * math.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2)) / (1 + z**2 / effective)
    return centre - reach if share > 0 else 0.0, centre + reach if share < 1 else 1.0


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `p_value` small means that the difference lies inside (-margin, margin)."""

    margin: float
    p_value: float
    equivalent: bool


def tost(
    differences: Sequence[float],
    clusters: Sequence[Hashable],
    margin: float,
    alpha: float = 0.05,
    value_range: float | None = None,
) -> Equivalence:
    """Test whether the mean difference lies inside (-margin, margin) (Schuirmann 1987).

    Each side is a one-sided t-test with the cluster-robust standard error and clusters - 1 degrees of freedom. The same
    as the (1 - 2 alpha) interval lying inside the margin. Where fewer than 5 clusters differ at all there is hardly a
    variance to go by. A measure with a known `value_range` then has p at least (1 - margin / range)^n: the probability
    that differences which could carry the margin stayed unseen. Without one, equal differences are not called
    equivalent.

    Raises:
        EvalError: a margin that is not positive.
    """
    if not margin > 0:
        raise EvalError(f"The equivalence margin is {margin}; expected a positive number in the metric's unit.")
    groups = _cluster_sums(differences, clusters)
    error, degrees = clustered_standard_error(differences, clusters), len(groups.sums) - 1
    if degrees < 1:
        return Equivalence(margin, 1.0, False)
    few = np.count_nonzero(groups.sums) < _LEAST_CLUSTERS
    floor = max(0.0, 1 - margin / value_range) ** len(differences) if value_range and few else 0.0
    if error <= 1e-12 * max(1.0, abs(groups.mean)):
        p_value = floor if value_range and groups.mean == 0 else 1.0
    else:
        lower = stats.t.sf((groups.mean + margin) / error, degrees)
        upper = stats.t.cdf((groups.mean - margin) / error, degrees)
        p_value = max(float(max(lower, upper)), floor)
    return Equivalence(margin, p_value, p_value < alpha)


def minimum_detectable_difference(
    differences: Sequence[float], clusters: Sequence[Hashable], alpha: float = 0.05, power: float = 0.8
) -> float:
    """Return the smallest true mean difference that this sample finds with `power` (two-sided, level alpha).

    Inf where the sample cannot say: one cluster, or no variance.
    """
    degrees = len(set(clusters)) - 1
    if degrees < 1:
        return math.inf
    error = clustered_standard_error(differences, clusters)
    if error == 0.0:
        return math.inf
    return float((stats.t.ppf(1 - alpha / 2, degrees) + stats.t.ppf(power, degrees)) * error)


def mcnemar_power(num_samples: int, discordant_rate: float, net_rate: float, alpha: float = 0.05) -> float:
    """Return the exact power of McNemar's test, unconditional: discordant pairs ~ Binomial(num_samples,
    discordant_rate).

    `net_rate` is the difference between the two discordant shares, at most `discordant_rate`.
    """
    share = 0.5 + net_rate / (2 * discordant_rate)
    counts = np.arange(num_samples + 1)
    weights = stats.binom.pmf(counts, num_samples, discordant_rate)
    likely = counts[weights > 1e-9]
    critical = stats.binom.ppf(alpha / 2, likely, 0.5).astype(int)
    critical = np.where(stats.binom.cdf(critical, likely, 0.5) > alpha / 2, critical - 1, critical)
    rejected = stats.binom.cdf(critical, likely, share) + stats.binom.sf(likely - critical - 1, likely, share)
    return float(np.sum(weights[likely] * np.where(critical >= 0, rejected, 0.0)))


def minimum_detectable_em(num_samples: int, num_discordant: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest EM difference, in percentage points, that McNemar's test finds with `power` here.

    The pairs that go the other way are as many as half the discordant ones seen; the rest of the discordance is the
    difference itself. Found by bisection on the exact power; inf where even all pairs going one way would not do.
    """
    noise = num_discordant / 2 / num_samples
    low, high = 0.0, 1.0 - 2 * noise
    if high <= 0 or mcnemar_power(num_samples, min(1.0, 2 * noise + high), high, alpha) < power:
        return math.inf
    for _ in range(30):
        middle = (low + high) / 2
        found = mcnemar_power(num_samples, 2 * noise + middle, middle, alpha) >= power
        low, high = (low, middle) if found else (middle, high)
    return 100 * high


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def identical_share(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share, 0 to 1, of positions at which the two lists of predictions hold the same text."""
    if len(first) != len(second) or not first:
        raise EvalError(f"{len(first)} predictions against {len(second)}; expected as many, and at least one.")
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
