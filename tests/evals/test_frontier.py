"""KL of decoders against laws that can be summed over."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evals.frontier import common, decoder_log_ratio, of_rows, point, weighted_point


def test_decoder_log_ratio_in_the_mean() -> None:
    """Over pi the mean of the log-ratios is KL(pi || p), p being of all tokens and pi of the candidates alone."""
    p, values, alpha = np.array([0.4, 0.25, 0.1]), [0.2, 1.0, -0.5], 0.5
    tilted = p * np.exp(np.array(values) / alpha)
    pi = tilted / tilted.sum()
    ratios = [decoder_log_ratio(np.log(p), values, alpha, chosen) for chosen in range(3)]
    assert ratios == pytest.approx(np.log(pi / p))
    assert pi @ ratios == pytest.approx(float(np.sum(pi * np.log(pi / p))))
    assert decoder_log_ratio([math.log(0.25)], [None], alpha, 0) == pytest.approx(math.log(4))
    assert decoder_log_ratio(np.log([0.5, 0.5]), [1.0, -math.inf], alpha, 0) == pytest.approx(math.log(2))


def test_weighted_point_of_all_answers() -> None:
    """Weights p exp(s r), each answer once: reward, normaliser and KL of the target, by hand.

    p = (1/2, 1/2), r = (0, 1), s = log 3: the target is (1/4, 3/4), Z = 2, so KL = 3/4 log 3 - log 2 = 0.1308, which
    is log 2 - H(1/4).
    """
    strength = math.log(3)
    reward, kl = weighted_point([math.log(0.5), math.log(1.5)], [0.0, 1.0], math.log(2), strength)
    assert reward == pytest.approx(0.75)
    assert kl == pytest.approx(math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))


def test_weighted_point_of_equal_weights() -> None:
    """Samples of the reference with the same reward are the reference: no KL."""
    reward, kl = weighted_point([0.6, 0.6, 0.6], [0.3] * 3, 0.6, 2.0)
    assert (reward, kl) == pytest.approx((0.3, 0.0))


def test_point_and_pairs() -> None:
    rows = [{"row_id": f"{i}", "reward": float(i), "kl": 2.0, "tokens": 5 + i} for i in range(3)]
    found = point("smc", "s", rows, "how", settings={"a": 1})
    assert found["reward"]["value"] == 1
    assert found["kl"] == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 3, "how": "how"}
    assert found["cost"] == {"tokens": 6.0}
    first, second = common(of_rows(rows, "reward"), of_rows(rows[:0:-1], "kl"))
    assert (first.tolist(), second.tolist()) == ([1.0, 2.0], [2.0, 2.0])


def test_few_particles_hold_the_kl_below_the_target() -> None:
    """Rewards 0 to 1 of 400 answers alike, s = 30: the target's KL is 2.4; 8 draws say less, at most log 8."""
    rng, strength, rewards = np.random.default_rng(0), 30.0, np.linspace(0, 1, 400)
    log_z = np.logaddexp.reduce(strength * rewards) - math.log(400)
    target = np.exp(strength * rewards - log_z) / 400
    exact = strength * float(target @ rewards) - log_z
    found = []
    for _ in range(200):
        own = rng.choice(rewards, 8)
        weights = strength * own
        found.append(weighted_point(weights, own, float(np.logaddexp.reduce(weights)) - math.log(8), strength)[1])
    assert max(found) <= math.log(8) + 1e-9
    assert np.mean(found) < 0.8 * exact
    assert exact > math.log(8)
