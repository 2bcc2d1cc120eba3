"""Calibration by hand, by simulation, and what it does not depend on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.evals.calibration import (
    binned_error,
    calibration_suite,
    confidences,
    equal_mass,
    equal_width,
    if_calibrated,
    wilson,
)
from align.evals.statistics import bootstrap_interval


def suite(probabilities: Any, **more: Any) -> dict[str, Any]:
    scores = torch.logit(torch.tensor(probabilities, dtype=torch.float64))
    return calibration_suite(scores, [str(row) for row in range(len(scores))], **more)


def value(result: dict[str, Any], name: str) -> float:
    return float(result["metrics"][name]["value"])


def test_by_hand():
    """Said 0.9 three times, labels 1, 1, 0, and 0.4 with label 1: confidences 0.9 and 0.6.

    Bin of 0.9: right 2/3, gap 0.2333; bin of 0.6: the model prefers the other answer, right 0, gap 0.6.
    ECE = (3 * 0.2333 + 0.6) / 4 = 0.325. Brier = (0.01 + 0.01 + 0.81 + 0.36) / 4 = 0.2975.
    Log loss = -(2 ln 0.9 + ln 0.1 + ln 0.4) / 4.
    """
    found = suite([0.9, 0.9, 0.9, 0.4], preference=[1.0, None, 0.0, 1.0], bins=5)
    assert value(found, "ece") == pytest.approx(0.325)
    assert value(found, "ece_mass") == pytest.approx(0.325)
    assert value(found, "brier") == pytest.approx(0.2975)
    assert value(found, "log_loss") == pytest.approx(-(2 * math.log(0.9) + math.log(0.1) + math.log(0.4)) / 4)
    assert value(found, "confidence") == pytest.approx((3 * 0.9 + 0.6) / 4)
    assert value(found, "right") == pytest.approx(0.5)
    assert value(found, "overconfidence") == pytest.approx((3 * 0.9 + 0.6) / 4 - 0.5)
    assert found["metrics"]["ece"]["low"] is found["metrics"]["ece_mass"]["high"] is None
    low, high = found["reliability"]["equal_width"]
    assert (low["n"], low["confidence"], low["right"]) == (1, pytest.approx(0.6), 0)
    assert (high["n"], high["confidence"], high["right"]) == (3, pytest.approx(0.9), pytest.approx(2 / 3))
    assert low["low"] == pytest.approx(0)
    assert low["high"] < 1


def test_soft_labels_and_ties_of_the_model():
    """A label of 0.7 with p = 0.7 is calibrated, from either side; a model that cannot tell is, whatever the label."""
    found = suite([0.7, 0.3, 0.5, 0.5], preference=[0.7, 0.3, 1.0, 0.9])
    assert value(found, "ece") == pytest.approx(0)
    assert value(found, "brier") == pytest.approx((2 * (0.7 * 0.09 + 0.3 * 0.49) + 2 * 0.25) / 4)


@pytest.mark.parametrize("n", [50, 200])
def test_a_calibrated_model_is_inside_and_another_is_above(n: int):
    """In ten bins of 50 or 200 pairs a calibrated model has an ECE near 0.14 or 0.07, and 95 % are in the range.

    A model that is right in half of the pairs, whatever it says, is above: its true ECE is 1/4.
    """
    rng = np.random.default_rng(0)
    inside, plain, expected = 0, [], []
    for _ in range(40):
        p = rng.uniform(0.5, 1, n)
        of = equal_width(p, 10)
        chance = if_calibrated(p, of, 10)
        plain.append(binned_error(p, rng.random(n) < p, of))
        expected.append(chance.value)
        assert chance.low is not None
        assert chance.high is not None
        inside += chance.low <= plain[-1] <= chance.high
    assert np.mean(plain) == pytest.approx(np.mean(expected), abs=0.01)
    assert np.mean(plain) > 0.05
    assert inside >= 35
    metrics = suite(p, preference=(rng.random(n) < 0.5).astype(float).tolist())["metrics"]
    assert metrics["ece"]["value"] > metrics["ece_if_calibrated"]["high"]
    assert 0 < metrics["overconfidence"]["low"] < 0.25 < metrics["overconfidence"]["high"]


@pytest.mark.parametrize(("n", "boost"), [(60, 1.0), (200, 2.0)])
def test_coverage_of_overconfidence(n: int, boost: float):
    """Log-odds N(0, 1.5^2) that are stated ``boost`` times too large: 95 % of 300 intervals, a little less at 60."""
    rng = np.random.default_rng(3)
    odds = rng.normal(0, 1.5, 400_000)
    truth = float(np.mean(1 / (1 + np.exp(-boost * abs(odds))) - 1 / (1 + np.exp(-abs(odds)))))
    covered = 0
    for _ in range(300):
        z = rng.normal(0, 1.5, n)
        confidence, right = confidences(boost * z, (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float))
        found = bootstrap_interval(confidence - right, resamples=1000)
        covered += found.low <= truth <= found.high  # type: ignore[operator]
    assert (truth > 0.05) == (boost > 1)
    assert covered / 300 == pytest.approx(0.945, abs=4 * math.sqrt(0.945 * 0.055 / 300))


def test_neither_the_side_nor_the_order_of_pairs_counts():
    """Swapping the answers of some pairs, and all pairs in another order: the same numbers."""
    rng = np.random.default_rng(2)
    p, label = rng.uniform(0.05, 0.95, 40), rng.random(40).round(1)
    swapped = rng.random(40) < 0.5
    order = rng.permutation(40)
    groups = (np.arange(40) // 2).tolist()
    one = suite(p, preference=label.tolist(), groups=groups)
    other = suite(
        np.where(swapped, 1 - p, p)[order],
        preference=np.where(swapped, 1 - label, label)[order].tolist(),
        groups=[groups[row] for row in order],
    )
    for name, metric in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(metric), name
    assert one["metrics"]["ece"]["n"] == 20


def test_bins():
    """Ends of equal width; equal mass keeps equal confidences together: 6 of 8 are in the first of two bins."""
    assert equal_width(np.array([0.5, 0.549, 0.551, 1.0]), 10).tolist() == [0, 0, 1, 9]
    assert equal_mass(np.array([0.6] * 6 + [0.7, 0.8]), 2).tolist() == [0] * 6 + [1, 1]
    assert equal_mass(np.array([0.9, 0.6, 0.7, 0.8]), 4).tolist() == [3, 0, 1, 2]


def test_wilson_by_hand():
    """All of 4 with z = 2: (1 + 4/8 -+ 2 sqrt(4/64)) / (1 + 1) = 1/2 and 1."""
    assert wilson(1.0, 4, z=2) == (pytest.approx(0.5), 1.0)


@pytest.mark.parametrize(
    ("p", "more", "message"),
    [
        ([0.5], {"bins": 0}, "bins is 0"),
        ([0.5], {"preference": [0.5]}, "ties of the label"),
        ([1.0], {}, "finite number"),
    ],
)
def test_what_is_refused(p: list[float], more: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        suite(p, **more)
