"""The bootstrap against known coverage, hand-made cases and its promises about order."""

from __future__ import annotations

import numpy as np
import pytest

from align.evals.statistics import Estimate, bootstrap_interval, win_rate


def test_two_values_by_hand():
    """{0, 1} resampled: mean 0 w.p. 1/4, 1/2 w.p. 1/2, 1 w.p. 1/4; 95 % spans [0, 1], the middle 40 % is 1/2."""
    assert bootstrap_interval([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)
    assert bootstrap_interval([1.0, 0.0], level=0.4) == Estimate(0.5, 0.5, 0.5, 2)


def test_ratio_by_hand():
    """(1 + 2) nats over (1 + 8) tokens = 1/3; resamples are 1/1, 3/9 or 2/8, so the interval is [1/4, 1]."""
    assert bootstrap_interval([1.0, 2.0], per=[1, 8]) == Estimate(1 / 3, 0.25, 1.0, 2)


def test_binomial_endpoints():
    """30 of 100: the resampled mean is Binomial(100, 0.3)/100, and the 95 % interval [0.21, 0.39].

    P(X <= 20) = 0.0165, P(X <= 21) = 0.0288 and P(X <= 38) = 0.9660, P(X <= 39) = 0.9790: with 100,000 resamples the
    nearest of them is 7 standard errors from 0.025 or 0.975.
    """
    estimate = bootstrap_interval([1.0] * 30 + [0.0] * 70, resamples=100_000)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.3, 0.21, 0.39), abs=1e-12)


def test_coverage_of_a_normal_mean():
    """N = 50, 95 %: coverage is P(|t_49| <= 1.96 sqrt(49/50)) = 0.9419; 1,000 trials, 4 standard errors = 0.030."""
    rng = np.random.default_rng(1)
    trials = 1000
    hits = 0
    for _ in range(trials):
        estimate = bootstrap_interval(rng.normal(3.0, 2.0, size=50), resamples=500)
        hits += estimate.low <= 3.0 <= estimate.high
    assert hits / trials == pytest.approx(0.9419, abs=4 * (0.9419 * 0.0581 / trials) ** 0.5)


def test_groups_are_drawn_together():
    """Five copies of each row add nothing: by group the interval is the rows', by row it is sqrt(5) too narrow."""
    values = np.random.default_rng(2).normal(size=40)
    alone = bootstrap_interval(values)
    groups = [f"prompt {i}" for i in range(40) for _ in range(5)]
    together = bootstrap_interval(np.repeat(values, 5), groups=groups)
    assert (together.value, together.low, together.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert together.n == 40
    naive = bootstrap_interval(np.repeat(values, 5))
    assert (naive.high - naive.low) * 5**0.5 == pytest.approx(alone.high - alone.low, rel=0.05)


def test_uneven_groups_weigh_by_rows():
    """Groups {0, 0, 0} and {1}: the mean over rows is 1/4; resamples are 0, 1/4 or 1."""
    assert bootstrap_interval([0, 0, 0, 1], groups="aaab") == Estimate(0.25, 0.0, 1.0, 2)


@pytest.mark.parametrize("grouped", [False, True])
def test_order_of_rows_changes_nothing(grouped: bool):
    rng = np.random.default_rng(3)
    values, lengths = rng.normal(size=97), rng.integers(1, 90, size=97)
    groups = rng.integers(0, 30, size=97)
    shuffle = rng.permutation(97)
    first = bootstrap_interval(values, per=lengths, groups=list(groups) if grouped else None)
    second = bootstrap_interval(
        values[shuffle], per=lengths[shuffle], groups=list(groups[shuffle]) if grouped else None
    )
    assert first == second


def test_seed_decides_the_draws():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_blocks_cover_all_resamples():
    """3,000 rows are drawn in blocks of 349; the interval still has the width of 2 * 1.96 sd / sqrt(n)."""
    values = np.random.default_rng(5).normal(size=3000)
    estimate = bootstrap_interval(values, resamples=2000)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 3000**0.5, rel=0.08)


def test_one_row_has_no_interval():
    assert bootstrap_interval([2.5]) == Estimate(2.5, None, None, 1)
    assert bootstrap_interval([1.0, 3.0], groups=["p", "p"]) == Estimate(2.0, None, None, 1)


def test_equal_rows_are_a_point():
    estimate = bootstrap_interval([0.1] * 7)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.1, 0.1, 0.1))
    assert estimate.n == 7


def test_win_rate_counts_ties_as_half():
    """Two wins, one tie, one loss of four: 2.5 / 4."""
    assert win_rate([0.0, 0.0, 0.5, 1.0], [1.0, 0.2, 0.5, 0.0]).value == 0.625


def test_win_rate_is_paired():
    """After is above before on every prompt although the scores overlap: paired, the rate is 1 and certain."""
    before = np.arange(20.0)
    assert win_rate(before, before + 0.1) == Estimate(1.0, 1.0, 1.0, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "N >= 1"),
        ({"values": [[1.0]]}, "of shape"),
        ({"values": [1.0, float("nan")]}, r"values\[1\] is nan"),
        ({"values": [1.0, 2.0], "per": [1.0, 0.0]}, r"per\[1\] is not positive"),
        ({"values": [1.0, 2.0], "per": [1.0]}, "2 values and 1 denominators"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "2 values and 1 group labels"),
        ({"values": [1.0, 2.0], "level": 95}, "between 0 and 1"),
    ],
)
def test_refuses_what_it_cannot_use(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)


def test_win_rate_refuses_unpaired_scores():
    with pytest.raises(ValueError, match="paired by prompt"):
        win_rate([1.0], [1.0, 2.0])
