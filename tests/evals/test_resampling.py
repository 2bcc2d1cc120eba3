"""Resampling against values worked out by hand, enumeration of all samples, simulation and its laws."""

from __future__ import annotations

from itertools import product
from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evals.resampling import (
    ceilings,
    curve_interval,
    expected_outcomes,
    find_optimal_k,
    optimal_k_interval,
    pass_at_k,
    resampled,
    resampling_curve,
    sampled_outcomes,
    verifier_metrics,
)

MIXTURE = ((0.9, 0.5, 0.1, 0.01), 1.0, 0.2)
shares = st.floats(0, 1)


def test_one_problem_by_hand():
    """With p = 0.3, t = 0.95, f = 0.1: a = 0.285 + 0.07 = 0.355, ceiling 0.285 / 0.355.

    K = 2: 1 - 0.645^2 = 0.583975 answered, 0.285 / 0.355 of it correct; 1 + 0.645 samples.
    """
    found = resampling_curve(0.3, 0.95, 0.1, [0, 1, 2, 10])
    assert ceilings(0.3, 0.95, 0.1) == pytest.approx([0.8028169014])
    assert found["answered"] == pytest.approx([0, 0.355, 0.583975, 0.9875377303])
    assert found["correct"] == pytest.approx([0, 0.285, 0.468825, 0.7928119806])
    assert found["wrong"] == pytest.approx([0, 0.07, 0.11515, 0.1947257497])
    assert found["samples"][:3] == pytest.approx([0, 1, 1.645])
    paid = resampling_curve(0.3, 0.95, 0.1, 2, cost=4, price=0.05)
    assert paid["utility"] == pytest.approx([0.468825 - 4 * 0.11515 - 0.05 * 1.645])


def test_problems_that_differ():
    """Four problems, t = 1, f = 0.2: K = 1 gives mean p - c * 0.2 (1 - mean p) = 0.3775 - 0.1245 = 0.253 at c = 1.

    Mistakes on the hard ones cost more with each K, so that the best one is finite; at c = 4 it is not to answer.
    """
    p, t, f = MIXTURE
    assert ceilings(p, t, f) == pytest.approx([0.9782608696, 0.8333333333, 0.3571428571, 0.0480769231])
    outcomes = expected_outcomes(p, t, f, np.arange(41))
    free, even, dear = (find_optimal_k(outcomes, cost) for cost in (0, 1, 4))
    assert (free.k, free.at_edge, free.utility) == (40, True, pytest.approx(0.5542022516))
    assert (even.k, even.at_edge, even.utility) == (2, False, pytest.approx(0.258976))
    assert (dear.k, dear.at_edge, dear.utility) == (0, False, 0.0)
    assert outcomes.utility(1).mean(axis=0)[[1, 40]] == pytest.approx([0.253, 0.1084272248])


def test_edges():
    """What never passes is never answered, at the price of all samples; what always passes takes one. f = 0: no limit.

    With a = 1e-18, 1 - (1 - a)^1000 is 1e-15, which a subtraction from 1 would make a 0 or 1.1e-15.
    """
    never = expected_outcomes(0.5, 0.0, 0.0, [0, 7])
    assert (never.answered.tolist(), never.samples.tolist()) == ([[0, 0]], [[0, 7]])
    assert np.isnan(ceilings([0.5, 1.0], 0.0, [0.0, 1.0])).all()
    always = expected_outcomes(1.0, 1.0, 0.3, [0, 1, 9])
    assert (always.correct.tolist(), always.samples.tolist()) == ([[0, 1, 1]], [[0, 1, 1]])
    assert ceilings(0.01, 0.2, 0.0) == pytest.approx([1.0])
    rare = expected_outcomes(1e-18, 1.0, 0.0, [1000])
    assert rare.correct[0, 0] == pytest.approx(1e-15, rel=1e-9)
    one = find_optimal_k(expected_outcomes(1.0, 1.0, 0.0, np.arange(9)), 0.0)
    assert (one.k, one.at_edge) == (1, False)
    assert find_optimal_k(expected_outcomes(0.5, 0.0, 0.0, 0), 0.0).at_edge is False


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(shares, shares, shares), min_size=1, max_size=5), st.floats(0, 5), st.floats(0, 1))
def test_laws(problems: list[tuple[float, float, float]], cost: float, price: float):
    """One sample more gains ``(1 - a)^k (p t - c (1 - p) f - price)``, so that of one problem it never changes sign;
    the answers' accuracy is the ceiling for every k.
    """
    p, t, f = (np.array(column) for column in zip(*problems, strict=True))
    outcomes = expected_outcomes(p, t, f, np.arange(12))
    right, wrong = p * t, (1 - p) * f
    gain = (1 - right - wrong)[:, None] ** np.arange(11) * (right - cost * wrong - price)[:, None]
    np.testing.assert_allclose(np.diff(outcomes.utility(cost, price), axis=1), gain, atol=1e-9)
    np.testing.assert_allclose(outcomes.correct * wrong[:, None], outcomes.wrong * right[:, None], atol=1e-12)
    some = right + wrong > 1e-12
    limit = ceilings(p, t, f)[some, None] * outcomes.answered[some]
    np.testing.assert_allclose(outcomes.correct[some], limit, atol=1e-9)
    assert (outcomes.answered <= 1 + 1e-12).all()
    for row in range(len(p)):
        alone = expected_outcomes(p[row], t[row], f[row], np.arange(12))
        best = find_optimal_k(alone, cost, price)
        assert best.k == 0 or alone.utility(cost, price)[0, -1] == pytest.approx(best.utility, abs=1e-9)


def test_simulated():
    """100,000 problems drawn one sample after the other; shares within four standard errors."""
    rng, p, t, f, k, size = np.random.default_rng(0), 0.3, 0.8, 0.15, 5, 100_000
    correct = rng.random((size, k)) < p
    passed = rng.random((size, k)) < np.where(correct, t, f)
    first = np.where(passed.any(axis=1), passed.argmax(axis=1), k - 1)
    right = passed.any(axis=1) & correct[np.arange(size), first]
    expected = expected_outcomes(p, t, f, k)
    assert right.mean() == pytest.approx(expected.correct[0, 0], abs=4 * 0.5 / size**0.5)
    assert (passed.any(axis=1) & ~right).mean() == pytest.approx(expected.wrong[0, 0], abs=4 * 0.5 / size**0.5)
    assert (first + 1).mean() == pytest.approx(expected.samples[0, 0], abs=4 * 2 / size**0.5)


def test_samples_by_hand():
    """Four samples, of which one correct and one wrong one pass. Two of four: C(2, 2) / C(4, 2) = 1/6 that none does,
    so 5/12 each; the first sample, and the second where the first did not pass (1/2): 1.5 samples.
    """
    found = sampled_outcomes([4], [1], [1], [0, 1, 2, 4])
    assert found.correct == pytest.approx(np.array([[0, 1 / 4, 5 / 12, 1 / 2]]))
    assert found.wrong == pytest.approx(found.correct)
    assert found.samples == pytest.approx(np.array([[0, 1, 1.5, 1.5 + 1 / 6]]))
    assert pass_at_k([4, 3], [1, 0], 2) == pytest.approx(np.array([[1 / 2], [0]]))


@pytest.mark.parametrize(("p", "t", "f"), [(0.3, 0.8, 0.2), (0.05, 0.5, 0.0), (0.9, 1.0, 1.0)])
def test_samples_are_unbiased(p: float, t: float, f: float):
    """Over all that four samples can be, the estimate's mean is the truth for every k up to four; so is pass@k's."""
    n, k = 4, np.arange(5)
    right, wrong = p * t, (1 - p) * f
    total = {name: np.zeros(len(k)) for name in ("samples", "correct", "wrong")}
    for x, y in product(range(n + 1), repeat=2):
        if x + y <= n:
            ways = factorial(n) / (factorial(x) * factorial(y) * factorial(n - x - y))
            chance = ways * right**x * wrong**y * (1 - right - wrong) ** (n - x - y)
            found = sampled_outcomes([n], [x], [y], k)
            for name in total:
                total[name] += chance * getattr(found, name)[0]
    truth = expected_outcomes(p, t, f, k)
    for name, mean in total.items():
        np.testing.assert_allclose(mean, getattr(truth, name)[0], atol=1e-12)
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k([n], [c], k)[0] for c in range(n + 1))
    np.testing.assert_allclose(mean, 1 - (1 - p) ** k, atol=1e-12)


def test_coverage_over_problems():
    """200 draws of 60 problems with p uniform: the mean of ``p t`` (k = 1) is 0.4, covered 94.4 % of the time."""
    rng, hits, trials = np.random.default_rng(1), 0, 200
    for _ in range(trials):
        p = rng.random(60)
        right = rng.binomial(8, p * 0.8)
        outcomes = sampled_outcomes(np.full(60, 8), right, np.zeros(60), [1])
        found = curve_interval(outcomes.correct, resampled(outcomes, resamples=500).correct)
        hits += found["low"][0] <= 0.4 <= found["high"][0]
    assert hits / trials >= 0.944 - 4 * (0.944 * 0.056 / trials) ** 0.5


def test_intervals_of_the_best_k():
    """Of four problems the best k at cost 1 could be any; of a thousand it is 2, or 1, which is 0.006 worse."""
    p, t, f = MIXTURE
    many, few = (expected_outcomes(np.tile(p, copies), t, f, np.arange(21)) for copies in (250, 1))
    found = optimal_k_interval(many, resampled(many), 1)
    assert (found.value, found.low, found.high, found.n) == (2, 1, 2, 1000)
    found = optimal_k_interval(few, resampled(few), 1)
    assert (found.value, found.low, found.high) == (2, 0, 20)
    one = expected_outcomes(0.5, 1, 0, [0, 1])
    assert optimal_k_interval(one, resampled(one), 1).low is None
    assert curve_interval(one.correct, resampled(one).correct) == {"value": [0.0, 0.5], "low": None, "high": None}


def test_verifier_by_hand():
    """Problem 1: 3 of 4 correct, 2 of those pass and the wrong one too; problem 2: none correct, none passes.

    t = 2/3 on one problem; f = 1 of 5 wrong samples; the ceiling is of problem 1 alone; problem 2 never passed.
    """
    found = verifier_metrics([4, 4], [3, 0], [2, 0], [1, 0])
    assert found["accuracy"].value == 3 / 8
    assert (found["completeness"].value, found["completeness"].n) == (2 / 3, 1)
    assert (found["false_positives"].value, found["false_positives"].n) == (1 / 5, 2)
    assert (found["ceiling"].value, found["ceiling"].n) == (2 / 3, 1)
    assert found["never_passed"].value == 1 / 2
    assert set(verifier_metrics([2], [0], [0], [0])) == {"accuracy", "false_positives", "never_passed"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_outcomes(1.2, 1, 0, 1), r"p\[0\] is 1.2: a probability"),
        (lambda: expected_outcomes(0.5, 1, float("nan"), 1), r"f\[0\] is nan"),
        (lambda: expected_outcomes([0.5] * 2, [1] * 3, 0, 1), "2, 3, 1 problems"),
        (lambda: expected_outcomes(0.5, 1, 0, -1), r"k\[0\] is -1"),
        (lambda: expected_outcomes(0.5, 1, 0, 1.5), "a whole number"),
        (lambda: expected_outcomes(0.5, 1, 0, 1).utility(-1), "cost is -1"),
        (lambda: sampled_outcomes([4, 3], [1, 1], [0, 0], 4), "problem 1 has 3 samples"),
        (lambda: sampled_outcomes([4], [3], [2], 4), "5 of 4 samples passed"),
        (lambda: sampled_outcomes([4], [3, 1], [0], 4), "one each per problem"),
    ],
)
def test_refuses_what_it_cannot_use(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
