"""The length-controlled win rate, where the true effect of length is known."""

from __future__ import annotations

import numpy as np
import pytest

from align.evals.length_control import length_controlled

QUICK = {"resamples": 400}


def drawn(theta: float, phi: float, mean: float, count: int, seed: int, *, soft: bool = False):
    """Preferences by the model itself, of answers that are longer by ``mean`` standard deviations on average."""
    rng = np.random.default_rng(seed)
    base = rng.integers(200, 400, count).astype(float)
    difference = rng.normal(50 * mean, 50, count)
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / difference.std()))))
    return p if soft else (rng.random(count) < p).astype(float), base + difference, base


def test_two_lengths_by_hand() -> None:
    """Half of the answers are 10 longer and preferred with 0.8, half 10 shorter and preferred with 0.4.

    The sd is 10 and two numbers fit two points: theta = (logit 0.8 + logit 0.4) / 2 = 0.49041, and sigmoid of it
    0.62020. The win rate itself is 0.6. The prior moves theta by less than 1e-3 here.
    """
    p, own = np.repeat([0.8, 0.4], 500), 100.0 + np.repeat([10, -10], 500)
    found = length_controlled(p, own, np.full(1000, 100.0), **QUICK)
    assert found is not None
    assert found.value == pytest.approx(0.62020, abs=1e-3)
    assert found.low < found.value < found.high
    assert found.n == 1000


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("theta", "phi"), [(0.0, 2.0), (0.5, 1.5), (-1.0, 0.0), (1.0, -2.0)])
def test_known_effects(theta: float, phi: float, soft: bool) -> None:
    """The truth is in the interval though the model's answers are much longer; soft labels give it to rounding."""
    p, own, base = drawn(theta, phi, 1.0, 3000, seed=1, soft=soft)
    truth = 1 / (1 + np.exp(-theta))
    found = length_controlled(p, own, base, **QUICK)
    assert found is not None
    if soft:
        assert found.value == pytest.approx(truth, abs=2e-3)
    else:
        assert found.low <= truth <= found.high
        assert found.high - found.low < 0.12
    if phi == 2.0:
        assert np.mean(p) > 0.68  # what length alone makes of equally good answers


def test_coverage_of_the_interval() -> None:
    """Of 95 % intervals over 150 prompts some 95 % hold the truth; 200 of them, so 90 % is four deviations away."""
    held = []
    for seed in range(200):
        found = length_controlled(*drawn(0.4, 1.0, 0.7, 150, seed=seed), resamples=200)
        assert found is not None
        held.append(found.low <= 1 / (1 + np.exp(-0.4)) <= found.high)
    assert 0.9 <= np.mean(held) <= 0.995


def test_equal_lengths_are_the_win_rate() -> None:
    p = [1.0, 0.0, 0.5, 1.0]
    found = length_controlled(p, [5, 6, 7, 8], [5, 6, 7, 8], **QUICK)
    assert found is not None
    assert found.value == 0.625


def test_what_cannot_be_told_apart() -> None:
    """Always 3 longer: None. All won: 1. What length explains without exception has a finite fit, symmetric here."""
    assert length_controlled([1, 0, 1], [8, 9, 10], [5, 6, 7]) is None
    won = length_controlled([1, 1, 1], [8, 7, 10], [5, 6, 7], **QUICK)
    assert won is not None
    assert (won.value, won.low, won.high) == (1, pytest.approx(0.025 ** (1 / 3)), 1)
    split = length_controlled([1, 1, 0, 0], [9, 9, 1, 1], [5, 5, 5, 5], **QUICK)
    assert split is not None
    assert split.value == pytest.approx(0.5, abs=1e-6)
    alone = length_controlled([0.7], [5], [5])
    assert alone is not None
    assert (alone.value, alone.low) == (pytest.approx(0.7), None)


def test_order_and_sides() -> None:
    """The order of the rows changes nothing; with the two answers changed about it is 1 less it."""
    p, own, base = drawn(0.3, 1.0, 0.5, 60, seed=3)
    order = np.random.default_rng(0).permutation(60)
    found, again = (
        length_controlled(p, own, base, **QUICK),
        length_controlled(p[order], own[order], base[order], **QUICK),
    )
    other = length_controlled(1 - p, base, own, **QUICK)
    assert found is not None
    assert again is not None
    assert other is not None
    assert (found.value, found.low, found.high) == pytest.approx((again.value, again.low, again.high), abs=1e-9)
    assert other.value == pytest.approx(1 - found.value, abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"preferences\[1\] is 2.0"):
        length_controlled([0.5, 2.0], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="2 preferences, 1 lengths"):
        length_controlled([0.5, 1.0], [1], [1, 2])
