"""The difference of two paired proportions (exact match of two modes) where discordant pairs are few or none.

Tango's score method (1998, Statistics in Medicine 17): interval and equivalence test stay honest where a t-test on the
differences has no variance to go by: six samples without a discordant pair say little, six hundred say much. Clusters
enter through a design effect that divides all counts.
"""

from __future__ import annotations

import math

from scipy import optimize, stats


def score_statistic(won: float, lost: float, total: float, difference: float) -> float:
    """Return Tango's z for the hypothesis that the true difference (share won - share lost) is `difference`, inside
    (-1, 1).
    """
    a = 2 * total
    b = -won - lost + (2 * total - won + lost) * difference
    c = -lost * difference * (1 - difference)
    lost_share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = total * (2 * lost_share + difference * (1 - difference))
    distance = won - lost - total * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def score_interval(won: float, lost: float, total: float, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the difference: all values that the score test does not reject."""
    z = float(stats.norm.ppf((1 + level) / 2))
    edge, estimate = 1 - 1e-9, (won - lost) / total

    def bound(sign: int) -> float:
        def excess(difference: float) -> float:
            return sign * score_statistic(won, lost, total, difference) - z

        far = -sign * edge
        if excess(far) <= 0:  # not even the far end is rejected
            return far
        return float(optimize.brentq(excess, far, max(-edge, min(edge, estimate))))

    return bound(1), bound(-1)


def equivalence_p(won: float, lost: float, total: float, margin: float) -> float:
    """Return the p-value of the hypothesis that the true difference lies outside (-margin, margin): two one-sided
    score tests.
    """
    above = stats.norm.sf(score_statistic(won, lost, total, -margin))
    below = stats.norm.cdf(score_statistic(won, lost, total, margin))
    return float(max(above, below))


def design_effect(standard_error: float, won: int, lost: int, total: int) -> float:
    """Return how many times the clusters widen the variance of the mean difference; at least 1."""
    mean = (won - lost) / total
    independent = ((won + lost) / total - mean**2) / total
    if independent <= 0 or not math.isfinite(standard_error):
        return 1.0
    return max(1.0, standard_error**2 / independent)
