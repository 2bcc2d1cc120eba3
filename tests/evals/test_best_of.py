"""Best of n against enumeration."""

from __future__ import annotations

import itertools
import math
from itertools import product

import numpy as np
import pytest

from align.evals.best_of import best_of_judged, best_of_kl, best_of_kl_bound, best_of_reward, kl_at, weights


def exact(p: np.ndarray, rewards: np.ndarray, n: int) -> tuple[float, float]:
    """Reward and KL of best of n by the sum over all n-tuples of answers; of equal rewards any is taken alike."""
    law = np.zeros(len(p))
    for drawn in product(range(len(p)), repeat=n):
        best = max(rewards[list(drawn)])
        taken = [answer for answer in drawn if rewards[answer] == best]
        for answer in taken:
            law[answer] += math.prod(p[list(drawn)]) / len(taken)
    return float(law @ rewards), float(np.sum(law * np.log(law / p)))


def test_weights_by_hand() -> None:
    """Of 4 draws there are 6 pairs: the largest is the 2nd smallest in 1, the 3rd in 2, the 4th in 3 of them."""
    assert weights(4, 2) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert weights(4, 1) == pytest.approx([0.25] * 4)
    assert weights(4, 4) == pytest.approx([0, 0, 0, 1])
    assert best_of_reward([3.0, 1.0, 2.0], 2) == pytest.approx((3 + 3 + 2) / 3)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_another_judge_of_the_best(n: int) -> None:
    """Over all subsets, any of the best of equal reward; the rewards as their own judge are their mean again."""
    rewards, judged = [2.0, 1.0, 2.0, 0.0, 1.0], [5.0, 0.0, 1.0, 7.0, 3.0]

    def of(chosen: tuple[int, ...]) -> float:
        best = max(rewards[place] for place in chosen)
        return float(np.mean([judged[place] for place in range(5) if rewards[place] == best]))

    expected = np.mean([of(chosen) for chosen in itertools.combinations(range(5), n)])
    assert best_of_judged(rewards, judged, n) == pytest.approx(expected)
    assert best_of_judged(rewards, rewards, n) == pytest.approx(best_of_reward(rewards, n))


def test_a_judge_of_other_draws() -> None:
    with pytest.raises(ValueError, match="2 rewards and 1 of the judge"):
        best_of_judged([1.0, 2.0], [1.0], 1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_reward_is_unbiased(n: int) -> None:
    """The mean of the estimate over all samples of 4 answers, each with its probability, is the exact reward."""
    p, rewards = np.array([0.5, 0.2, 0.3]), np.array([0.0, 2.0, 1.0])
    mean = sum(
        math.prod(p[list(drawn)]) * best_of_reward(rewards[list(drawn)], n) for drawn in product(range(3), repeat=4)
    )
    assert mean == pytest.approx(exact(p, rewards, n)[0], abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_kl_of_one_outcome_and_the_rest(n: int) -> None:
    """A best outcome of mass e and 20,000 equally likely ones below: the KL by their law, and by the formula."""
    for e in (0.0, 0.05, 0.4, 0.9):
        p = np.append(np.full(20_000, (1 - e) / 20_000), e)[: 20_001 if e else 20_000]
        upto = np.minimum(np.cumsum(p), 1)
        law = upto**n - np.append(0, upto[:-1]) ** n
        assert kl_at(e, n) == pytest.approx(float(np.sum(law * np.log(law / p))), abs=2e-3)


def test_estimator_and_bound_against_enumeration() -> None:
    """Three answers of one reward, two of others: the bound is too large, and the estimator less so.

    The world is not of the kind that it is exact for: the outcomes below the best are not spread.
    """
    p, rewards = np.array([0.2, 0.2, 0.1, 0.3, 0.2]), np.array([1.0, 1.0, 1.0, 0.0, 0.5])
    rng = np.random.default_rng(0)
    for n, gap in ((2, 0.03), (4, 0.1)):
        truth = exact(p, rewards, n)[1]
        found = np.mean([best_of_kl(rewards[rng.choice(5, 16, p=p)], n) for _ in range(4000)])
        assert truth < best_of_kl_bound(n) - gap
        assert truth - 0.01 < found < truth + 0.6 * (best_of_kl_bound(n) - truth)


def test_limits() -> None:
    """No equal rewards: the bound. All equal: nothing is chosen, 0. n = 1 is the reference."""
    assert best_of_kl([1.0, 2.0, 3.0, 4.0], 4) == pytest.approx(best_of_kl_bound(4))
    assert best_of_kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    assert best_of_kl([2.0] * 6, 4) == 0
    assert best_of_kl([1.0, 2.0], 1) == 0 == best_of_kl_bound(1)
    assert kl_at([1e-12, 1 - 1e-12], 8) == pytest.approx([best_of_kl_bound(8), 0], abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="n is 5: best of n is estimated from n draws or more, and there are 4"):
        best_of_reward([1.0] * 4, 5)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan"):
        best_of_kl([1.0, math.nan], 2)
    with pytest.raises(ValueError, match="a probability"):
        kl_at(1.5, 2)


def test_kl_is_too_large_where_few_rewards_differ() -> None:
    """1 with probability 0.1, else 0, n = 4: q(1) = 1 - 0.9^4 = 0.3439 and the KL 0.3439 log 3.439 + 0.6561 log 0.729.

    That is 0.2174; the estimator is 0.3439 D(0.1) + 0.6561 D(0.9) = 0.3439 * 0.635 + 0.6561 * 0.105 = 0.287.
    """
    assert best_of_kl([1.0] * 300 + [0.0] * 2700, 4) == pytest.approx(0.287, abs=0.002)
