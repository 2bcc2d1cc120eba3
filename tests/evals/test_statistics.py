"""The bootstrap and the sign-flip test against known coverage and level, hand-made cases, promises about order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from align.evals.result import compared_result, suite_result
from align.evals.statistics import (
    Estimate,
    bootstrap_draws,
    bootstrap_interval,
    comparisons,
    holm,
    paired_difference,
    paired_p,
    share_interval,
    win_rate,
)


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


def test_shares_at_the_ends_by_hand():
    """All 20 right: 0.025^(1/20) = 0.83157. Of 3 prompts: 0.025^(1/3) = 0.29240. In between it is the bootstrap."""
    right = share_interval(np.ones(20))
    assert (right.value, right.low, right.high, right.n) == (1, pytest.approx(0.831567, abs=1e-6), 1, 20)
    wrong = share_interval([0, 0, 0, 0], groups="aabc")
    assert (wrong.low, wrong.high, wrong.n) == (0, pytest.approx(1 - 0.292402, abs=1e-6), 3)
    assert share_interval([1.0, 2.0], per=[1.0, 2.0]).low == pytest.approx(0.025**0.5)
    mixed = [1, 0, 0.5, 1, 1]
    assert share_interval(mixed, seed=3) == bootstrap_interval(mixed, seed=3)
    assert share_interval([1.0]).low is None
    assert share_interval([1.0, 1.0], level=0.9).low == pytest.approx(0.05**0.5)
    for values, per in (([1.2, 0], None), ([-0.1, 0], None), ([2, 1], [1, 1])):
        with pytest.raises(ValueError, match=r"values\[0\] is no share"):
            share_interval(values, per=per)


@pytest.mark.parametrize(("n", "p", "alone"), [(20, 0.95, 0.639), (20, 0.99, 0.182), (60, 0.99, 0.450)])
def test_coverage_of_shares_near_one(n: int, p: float, alone: float):
    """Over all counts of rows that are right, by their chance; the bootstrap by itself covers what ``alone`` says."""

    def coverage(interval: Callable[..., Estimate]) -> float:
        counts = [right for right in range(n + 1) if binom.pmf(right, n, p) > 1e-5]
        found = {right: interval(np.arange(n) < right) for right in counts}
        return float(sum(binom.pmf(k, n, p) for k, one in found.items() if one.low <= p <= one.high))

    assert coverage(partial(bootstrap_interval, resamples=2000)) == pytest.approx(alone, abs=0.01)
    assert coverage(share_interval) > 0.97


def test_win_rate_counts_ties_as_half():
    """Two wins, one tie, one loss of four: 2.5 / 4."""
    assert win_rate([0.0, 0.0, 0.5, 1.0], [1.0, 0.2, 0.5, 0.0]).value == 0.625


def test_win_rate_is_paired():
    """After is above before on every prompt although the scores overlap: paired, the rate is 1, and 0.025^(1/20)."""
    before = np.arange(20.0)
    found = win_rate(before, before + 0.1)
    assert (found.value, found.low, found.high) == (1, pytest.approx(0.025 ** (1 / 20)), 1)


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


def test_paired_difference_is_of_rows():
    """Differences 1, 3 of two rows: mean 2, resamples 1, 2 or 3; unpaired, the rows' 100 would drown them."""
    assert paired_difference([0.0, 100.0], [1.0, 103.0]) == Estimate(2.0, 1.0, 3.0, 2)
    assert paired_difference([0.0, 0.0, 0.0], [1.0, 1.0, 4.0], groups="aab") == Estimate(2.0, 1.0, 4.0, 2)


def test_differences_of_verdicts_that_are_all_the_same():
    """0.025^(1/20) = 0.831567, so 0.168433 of rows may differ unseen, each by up to 2. Groups count once."""
    no, yes, unseen = np.zeros(20), np.ones(20), 0.168433
    for pair, value, low, high in (
        ((no, yes), 1, 1 - 2 * unseen, 1),
        ((yes, no), -1, -1, 2 * unseen - 1),
        ((yes, yes), 0, -unseen, unseen),
        ((yes / 2, yes), 0.5, 0.5 - 1.5 * unseen, 0.5 + 0.5 * unseen),
    ):
        found = paired_difference(*pair)
        assert (found.value, found.low, found.high) == pytest.approx((value, low, high), abs=1e-6)
    grouped = paired_difference(no, yes, groups=np.repeat(range(4), 5).tolist())
    assert (grouped.low, grouped.n) == (pytest.approx(2 * 0.025**0.25 - 1), 4)
    assert paired_difference(3 * yes, 4 * yes) == Estimate(1.0, 1.0, 1.0, 20), "no verdicts"
    assert paired_difference([0.0], [1.0]).low is None


@pytest.mark.parametrize("lost", [0.03, 0.95])
def test_coverage_of_differences_of_verdicts(lost: float):
    """Of 20 rows that were right a share is no longer: all or none are in about half or a third of samples."""
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        found = paired_difference(np.ones(20), (rng.random(20) >= lost).astype(float), resamples=400)
        covered += found.low <= -lost <= found.high
    assert covered / 200 > 0.93


def test_coverage_of_a_paired_difference():
    """94.19 % at n = 50 as above. Rows correlate at 0.9, so a difference has variance 2 (1 - 0.9) = 0.2, and intervals
    are 3.92 sqrt(0.2 / 50) = 0.248 wide and not 0.78, as those of unpaired rows.
    """
    rng = np.random.default_rng(6)
    trials, hits, widths = 300, 0, []
    for _ in range(trials):
        shared, own = rng.normal(size=50), rng.normal(size=(2, 50))
        first, second = 0.9**0.5 * shared + 0.1**0.5 * own
        estimate = paired_difference(first, second + 0.3, resamples=500)
        hits += estimate.low <= 0.3 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(0.248, rel=0.05)
    assert hits / trials == pytest.approx(0.9419, abs=4 * (0.9419 * 0.0581 / trials) ** 0.5)


def test_coverage_by_group():
    """30 prompts of four rows that share the prompt's effect: by group 93.7 % (t of 29), by row far too few."""
    rng = np.random.default_rng(7)
    trials, hits, naive = 400, 0, 0
    prompts = [prompt for prompt in range(30) for _ in range(4)]
    for _ in range(trials):
        values = np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120)
        by_prompt, by_row = (bootstrap_interval(values, groups=g, resamples=500) for g in (prompts, None))
        hits += by_prompt.low <= 0 <= by_prompt.high
        naive += by_row.low <= 0 <= by_row.high
    assert hits / trials == pytest.approx(0.937, abs=4 * (0.937 * 0.063 / trials) ** 0.5)
    assert naive / trials < 0.8


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 1.0, 1.0], 2 / 8),  # +++ and --- are as far out
        ([1.0, 2.0, 3.0, -4.0], 14 / 16),
        ([0.5] * 10, 2 / 1024),
        ([1.0, 0.0, 0.0, 1.0], 2 / 4),  # rows that are equal say nothing
        ([0.0, 0.0], 1.0),
        ([7.0], 1.0),
    ],
)
def test_sign_flips_by_hand(differences: list[float], expected: float):
    """Of 1, 2, 3 and -4, |sum| = 2. With any signs the sum of 1, 2, 3, 4 is 10 less twice those that are negative: it
    is nearer to 0 only where they add up to 5, which is {1, 4} and {2, 3}. So 14 of 16 are as far out.
    """
    zeros = np.zeros(len(differences))
    assert paired_p(zeros, differences) == expected
    assert paired_p(differences, zeros) == expected


def test_sign_flips_of_groups():
    """Two prompts whose sums are 3 and 1: ++ and -- of four patterns; as four single rows 1, 1, 1, 1: 2 of 16."""
    assert paired_p(np.zeros(4), np.ones(4), groups="aaab") == 2 / 4
    assert paired_p(np.zeros(4), np.ones(4)) == 2 / 16


def test_drawn_flips_agree_with_all_flips():
    """13 rows: 8,192 patterns are all counted; 5,000 drawn ones are within four standard errors of that."""
    differences = np.random.default_rng(8).normal(0.4, 1.0, size=13)
    exact = paired_p(np.zeros(13), differences)
    drawn = paired_p(np.zeros(13), differences, resamples=5000)
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 5000) ** 0.5)
    assert 0.01 < exact < 0.9


def test_no_p_value_is_zero():
    assert paired_p(np.zeros(100), np.ones(100)) == 1 / 10_001
    assert paired_p(np.zeros(100), np.ones(100), resamples=99) == 1 / 100


def test_order_and_direction_change_no_p_value():
    rng = np.random.default_rng(9)
    first, second, groups = rng.normal(size=90), rng.normal(size=90), rng.integers(0, 40, size=90)
    shuffle = rng.permutation(90)
    one = paired_p(first, second, groups=list(groups))
    assert one == paired_p(first[shuffle], second[shuffle], groups=list(groups[shuffle]))
    assert one == paired_p(second, first, groups=list(groups))
    assert (
        one
        == paired_p(first, second, groups=list(groups), seed=0)
        != paired_p(first, second, groups=list(groups), seed=1)
    )


def test_level_of_the_sign_flip_test():
    """Where neither is better, P(p <= 0.05) is 0.05 whatever the distribution (here a skewed one of both); where one
    is better by 0.5 sd at n = 30, a t-test finds it with probability 0.75 and this one about as often.
    """
    rng = np.random.default_rng(10)
    trials = 1000
    found = lambda shift: np.mean(  # noqa: E731
        [
            paired_p(rng.exponential(size=30), rng.exponential(size=30) + shift, resamples=399) <= 0.05
            for _ in range(trials)
        ]
    )
    assert found(0.0) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / trials) ** 0.5)
    assert found(0.5 * 2**0.5) == pytest.approx(0.75, abs=0.06)


def test_holm_by_hand():
    """0.01, 0.03, 0.04 of three: 3 * 0.01, 2 * 0.03, and 1 * 0.04 which may not fall below 0.06; all at most 1."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"p_values\[1\] is nan"):
        holm([0.1, float("nan")])


def test_comparisons_against_one():
    """Two models of 20 rows on two metrics: b is better by 1 on each row, c is a itself; p of b is 1/10,001."""
    rng = np.random.default_rng(11)
    scores, lengths = rng.normal(size=20), rng.normal(size=20)
    values = {
        "b": {"reward": scores + 1, "length": lengths},
        "a": {"reward": scores, "length": lengths},
        "c": {"reward": scores, "length": lengths},
    }
    found = comparisons(values, against="a")
    assert [(one["model"], one["metric"], one["against"]) for one in found] == [
        ("b", "reward", "a"),
        ("b", "length", "a"),
        ("c", "reward", "a"),
        ("c", "length", "a"),
    ]
    assert (found[0]["value"], found[0]["low"], found[0]["high"]) == pytest.approx((1, 1, 1))
    assert (found[0]["p"], found[0]["n"], found[0]["clear"]) == (1 / 10_001, 20, True)
    assert found[0]["p_holm"] == pytest.approx(4 / 10_001)
    assert [(one["value"], one["p"], one["clear"]) for one in found[1:]] == [(0.0, 1.0, False)] * 3
    assert comparisons({"a": values["a"]}, against="a") == []
    with pytest.raises(ValueError, match="'d': the models are 'b'"):
        comparisons(values, against="d")
    with pytest.raises(ValueError, match="b has metrics"):
        comparisons({**values, "b": {"reward": scores}}, against="a")
    with pytest.raises(ValueError, match="paired by row"):
        comparisons({"a": {"x": [1.0]}, "b": {"x": [1.0, 2.0]}}, against="a")


def test_results_of_several_models():
    """What both models have in common stands once; how intervals and tests are made is said."""
    models = {name: suite_result("speed", {"x": Estimate(1.0, 0.0, 2.0, 3)}, [{}] * 3, None) for name in "ab"}
    found = compared_result("speed", models, [{"metric": "x"}], {"source": "d"}, "a", {"seed": 1}, note="n")
    assert (found["suite"], found["schema"], found["n"], found["reference"], found["note"]) == (
        "speed",
        1,
        3,
        "a",
        "n",
    )
    assert found["settings"]["seed"] == 1
    assert found["settings"]["test"]["correction"] == "Holm"
    assert found["models"]["b"]["metrics"]["x"]["n"] == 3
    models["b"]["n"] = 4
    with pytest.raises(ValueError, match="the same rows"):
        compared_result("speed", models, [], {}, None, None)
    assert compared_result("speed", models, [], {}, None, None, n=7)["n"] == 7


def test_draws_of_sums():
    """Their ratio has the percentiles of ``bootstrap_interval``, with groups too, and in any order of the rows."""
    rng = np.random.default_rng(0)
    rows, groups = rng.random((30, 2)) + 1, [number // 3 for number in range(30)]
    drawn = bootstrap_draws(rows, groups=groups)
    assert drawn.shape == (10_000, 2)
    estimate = bootstrap_interval(rows[:, 0], per=rows[:, 1], groups=groups)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert (low, high) == pytest.approx((estimate.low, estimate.high), abs=0.005)
    order = rng.permutation(30)
    again = bootstrap_draws(rows[order], groups=[groups[row] for row in order])
    assert np.allclose(again, drawn, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="3 rows and 1 group"):
        bootstrap_draws(np.ones((3, 1)), groups=["a"])
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap_draws([[np.nan]])
