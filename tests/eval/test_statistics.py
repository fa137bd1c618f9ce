"""The statistics, against scipy, published worked examples and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eval.errors import EvalError
from eval.reporting.paired_proportions import equivalence_p, score_interval, score_statistic
from eval.reporting.significance import (
    clustered_interval,
    clustered_standard_error,
    holm,
    identical_share,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_difference,
    minimum_detectable_em,
    proportion_interval,
    tost,
)


def test_mcnemar_is_the_exact_binomial_test_and_the_notes_worked_examples() -> None:
    # +10 -1: p = 12/1024; +9 -2: p = 134/2048; +3 -2: p = 1.
    assert mcnemar_exact(10, 1) == pytest.approx(12 / 1024)
    assert mcnemar_exact(9, 2) == pytest.approx(2 * (55 + 11 + 1) / 2048)
    assert mcnemar_exact(3, 2) == 1.0
    assert mcnemar_exact(0, 0) == 1.0
    # Agresti 1990, approval of the prime minister: 86 and 150 discordant, z = 4.17, two-sided p about 3e-5.
    assert mcnemar_exact(86, 150) == pytest.approx(stats.binomtest(86, 236).pvalue)
    assert 1e-5 < mcnemar_exact(86, 150) < 6e-5


def test_holm_on_a_worked_example() -> None:
    # Holm 1979 as worked in the R manual's style: 0.01 0.02 0.03 0.04 -> 0.04 0.06 0.06 0.06, in any order.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_standard_error_with_one_sample_a_cluster_is_the_ordinary_one() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert clustered_standard_error(values, range(40)) == pytest.approx(stats.sem(values))


def test_clusters_widen_the_error_of_values_that_go_together() -> None:
    clusters = np.repeat(np.arange(10), 20)
    values = np.random.default_rng(0).normal(size=10)[clusters]
    assert clustered_standard_error(values, clusters) > 3 * stats.sem(values)
    # Values that are constant in each cluster carry no more than the ten cluster means.
    assert clustered_standard_error(values, clusters) == pytest.approx(stats.sem(values[::20]))


def test_bootstrap_interval_agrees_with_student_on_normal_samples() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, size=400)
    found = clustered_interval(values, range(400))
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-3)
    scipy_interval = stats.bootstrap((values,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    assert found.low == pytest.approx(scipy_interval.low, abs=0.05)


@pytest.mark.parametrize(("num_clusters", "sparse"), [(11, False), (23, True)])
def test_false_positive_rates_are_nominal_in_simulation(num_clusters: int, sparse: bool) -> None:
    generator = np.random.default_rng(num_clusters)
    rejected = covered = equivalent = 0
    trials = 400
    for trial in range(trials):
        clusters = np.repeat(np.arange(num_clusters), generator.integers(1, 25, num_clusters))
        noise = generator.normal(0, 1, len(clusters)) * (generator.random(len(clusters)) < 0.25 if sparse else 1.0)
        values = noise + 0.5 * generator.normal(0, 1, num_clusters)[clusters]
        found = clustered_interval(values, clusters, num_resamples=1000, seed=trial)
        rejected += found.p_value <= 0.05
        covered += found.low <= 0 <= found.high
        # A true difference that lies exactly on the margin may be called equivalent in 5% of samples.
        equivalent += tost(values + 0.3, clusters, 0.3).equivalent
    limit = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert abs(rejected / trials - 0.05) < limit
    assert abs(covered / trials - 0.95) < limit
    assert equivalent / trials < 0.05 + limit


def test_ignoring_the_clusters_would_reject_far_too_often() -> None:
    generator = np.random.default_rng(5)
    clusters = np.repeat(np.arange(11), 12)
    naive = [
        stats.ttest_1samp(generator.normal(size=132) + generator.normal(size=11)[clusters], 0).pvalue < 0.05
        for _ in range(200)
    ]
    assert np.mean(naive) > 0.2


def test_tost_with_one_sample_a_cluster_is_the_pair_of_t_tests() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, size=60)
    found = tost(values, range(60), margin=0.5)
    upper = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
    assert found.p_value == pytest.approx(max(upper, lower))
    assert found.equivalent == (max(upper, lower) < 0.05)
    # The same as the 90% interval lying inside the margin.
    low, high = stats.t.interval(0.90, 59, values.mean(), stats.sem(values))
    assert found.equivalent == (low > -0.5 and high < 0.5)


def test_tost_of_identical_arms_needs_enough_of_them_and_a_margin_must_be_positive() -> None:
    assert not tost([0.0] * 8, "aabbccdd", 1.0, value_range=100).equivalent  # eight samples say too little
    assert tost([0.0] * 400, [i % 20 for i in range(400)], 1.0, value_range=100).p_value == pytest.approx(0.99**400)
    assert not tost([0.0] * 400, [i % 20 for i in range(400)], 1.0).equivalent
    one_differs = [1.0] + [0.0] * 10
    assert tost(one_differs, range(11), 1.0).equivalent  # what the t-tests alone would say
    assert not tost(one_differs, range(11), 1.0, value_range=100).equivalent
    assert not tost([2.0] * 8, "aabbccdd", 1.0).equivalent
    assert not tost([0.0] * 3, "aaa", 1.0).equivalent
    with pytest.raises(EvalError, match="margin"):
        tost([0.0], "a", 0.0)


def test_minimum_detectable_difference_has_the_power_it_states() -> None:
    generator = np.random.default_rng(2)
    clusters = np.arange(50)
    detectable = minimum_detectable_difference(generator.normal(size=50), clusters)
    detectable_known = (stats.t.ppf(0.975, 49) + stats.t.ppf(0.8, 49)) / math.sqrt(50)
    assert detectable == pytest.approx(detectable_known, rel=0.25)
    samples = generator.normal(detectable_known, 1, size=(4000, 50))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)
    assert minimum_detectable_difference([1.0, 2.0], "aa") == math.inf


def test_power_of_mcnemar_matches_simulation_and_the_detectable_em_has_it() -> None:
    generator = np.random.default_rng(4)
    won, lost = generator.binomial(200, 0.07, size=3000), generator.binomial(200, 0.02, size=3000)
    simulated = np.mean([mcnemar_exact(int(a), int(b)) < 0.05 for a, b in zip(won, lost, strict=True)])
    assert mcnemar_power(200, 0.09, 0.05) == pytest.approx(simulated, abs=0.03)
    detectable = minimum_detectable_em(200, 5)
    assert mcnemar_power(200, 0.025 + detectable / 100, detectable / 100) == pytest.approx(0.8, abs=0.01)
    # With no discordance at all, six pairs that go one way are the least that p < 0.05 allows.
    assert minimum_detectable_em(200, 0) > 100 * 6 / 200
    assert minimum_detectable_em(5, 0) == math.inf


def test_proportion_interval_is_wilson_where_clusters_add_nothing() -> None:
    values = [1.0] * 3 + [0.0] * 97
    low, high = proportion_interval(values, range(100))
    known = stats.binomtest(3, 100).proportion_ci(method="wilson")
    # With one sample a cluster the design effect is n / (n - 1).
    assert (low, high) == pytest.approx((known.low, known.high), abs=1e-3)
    low, high = proportion_interval([0.0] * 100, [i // 10 for i in range(100)])
    assert low == 0.0
    assert high == pytest.approx(0.037, abs=1e-3)


def test_tango_interval_inverts_the_score_test_and_meets_a_published_example_and_no_discordance() -> None:
    # Agresti's approval ratings: 1600 people, 86 and 150 discordant, published 95% interval (-0.059, -0.021).
    assert score_interval(86, 150, 1600) == pytest.approx((-0.059, -0.021), abs=1e-3)
    low, high = score_interval(2, 0, 44)
    assert score_statistic(2, 0, 44, low) == pytest.approx(1.96, abs=1e-3)
    assert score_statistic(2, 0, 44, high) == pytest.approx(-1.96, abs=1e-3)
    assert score_interval(0, 2, 44) == pytest.approx((-high, -low))
    # z at 0 is McNemar's (b - c) / sqrt(b + c).
    assert score_statistic(9, 2, 269, 0.0) == pytest.approx(7 / math.sqrt(11))
    # No discordant pair: six samples say next to nothing, six hundred that the difference is below a point.
    assert equivalence_p(0, 0, 6, 0.01) > 0.3
    assert equivalence_p(0, 0, 600, 0.01) < 0.01
    assert score_interval(0, 0, 6)[1] > 0.3
    assert score_interval(0, 0, 600)[1] < 0.01


def test_tango_interval_covers_at_its_level_in_simulation() -> None:
    generator = np.random.default_rng(7)
    draws = generator.multinomial(120, [0.05, 0.02, 0.93], size=1000)
    intervals = [score_interval(int(won), int(lost), 120) for won, lost, _ in draws]
    assert np.mean([low <= 0.03 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.025)


def test_degenerate_samples_claim_nothing() -> None:
    one_repository = clustered_interval([1.0, 2.0, 3.0], "aaa")
    assert (one_repository.low, one_repository.high, one_repository.p_value) == (-math.inf, math.inf, 1.0)
    nothing = clustered_interval([0.0] * 6, "aabbcc")
    assert (nothing.mean, nothing.low, nothing.high, nothing.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert identical_share(["a", "b"], ["a", "c"]) == 0.5
    with pytest.raises(EvalError):
        identical_share(["a"], [])
    with pytest.raises(EvalError):
        clustered_interval([], [])
