"""Rewards and people who disagree, by hand, and the interval of the worst by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from align.evals.pluralism import clustered_interval, exact_interval, pluralism_suite, smallest

ANNOTATORS = ["ann"] * 6 + ["bob"] * 2 + ["eve"] * 4
RIGHT = [1, 1, 1, 1, 1, 0, 0, 0, 1, 0.5, 0, 0.5]


def test_by_hand():
    """Ann 5/6, bob 0/2, eve 2/4: 7/12 of judgements, (5/6 + 0 + 1/2) / 3 of people. Of those with four, eve is worst.

    Group x is ann and bob, 5/8; y is eve, 1/2.
    """
    groups = {"ann": "x", "bob": "x", "eve": "y"}
    ids = [str(row) for row in range(12)]
    found = pluralism_suite(RIGHT, ANNOTATORS, ids, groups=groups, known=["ann"], least=4)
    values = {name: (metric["value"], metric["n"]) for name, metric in found["metrics"].items()}
    assert values["accuracy"] == (pytest.approx(7 / 12), 3)
    assert values["macro"] == (pytest.approx((5 / 6 + 1 / 2) / 3), 3)
    assert values["worst_annotator"] == (0.5, 4)
    assert values["worst_group"] == (0.5, 4)
    assert values["accuracy/x"] == (pytest.approx(5 / 8), 2)
    assert values["accuracy/known"] == (pytest.approx(5 / 6), 1)
    assert values["accuracy/new"] == (pytest.approx(2 / 6), 2)
    assert found["worst"] == {"annotator": "eve", "group": "y"}
    assert [one["annotator"] for one in found["annotators"]] == ["bob", "eve", "ann"]
    assert smallest({"bob": [0, 0]}, {"bob": [1, 2]}, 5)[0] == "bob"


def test_the_interval_of_the_worst_covers():
    """Forty people of 20 judgements, all with a share of 0.7: the smallest seen is near 0.45, and 0.7 is inside."""
    rng = np.random.default_rng(0)
    seen, covered = [], 0
    for _ in range(200):
        _, worst = smallest(
            {str(one): rng.random(20) < 0.7 for one in range(40)}, {str(one): range(20) for one in range(40)}, 1
        )
        seen.append(worst.value)
        assert worst.low is not None
        assert worst.high is not None
        covered += worst.low <= 0.7 <= worst.high
    assert np.mean(seen) < 0.5
    assert covered >= 190


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_the_interval_of_the_worst_group_covers_where_annotators_differ(spread: float):
    """Three groups of six who judge 20 times each, with shares of 0.7 -+ spread: all groups are at 0.7.

    Intervals of judgements taken for independent cover in 99, 87 and 66 % of such data.
    """
    rng = np.random.default_rng(2)
    who = np.repeat(np.arange(6), 20).tolist()
    covered = 0
    for _ in range(100):
        own = rng.choice([0.7 - spread, 0.7 + spread], (3, 6, 1))
        right = (rng.random((3, 6, 20)) < own).reshape(3, -1)
        shares = {str(group): values for group, values in enumerate(right)}
        _, worst = smallest(shares, dict.fromkeys(shares, who), 1)
        covered += worst.low <= 0.7 <= worst.high  # type: ignore[operator]
    assert covered >= 94


def test_the_clustered_interval_by_hand():
    """Four annotators of two equal judgements, three of them right: e = 2/4 thrice and -6/4.

    v = 4/3 * (3/4 + 9/4) / 64 = 1/16 and p (1 - p) / v = 3: as many as there are annotators, less one, and of them
    (t_7 / t_3)^2 = (2.36462 / 3.18245)^2 as the variance is of four alone.
    """
    right, who = [1, 1, 1, 1, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c", "d", "d"]
    effective = 3 * (2.364624 / 3.182446) ** 2
    expected = exact_interval(0.75 * effective, effective, 0.95)
    assert clustered_interval(right, who, 0.95) == pytest.approx(expected, abs=1e-5)
    assert clustered_interval([1] * 8, who, 0.95) == exact_interval(4, 4, 0.95)
    assert clustered_interval(right, range(8), 0.95) == exact_interval(6, 8, 0.95)
    assert clustered_interval(right, [0] * 8, 0.95) == exact_interval(6, 8, 0.95)


def test_judgements_of_one_annotator_on_one_prompt_go_together():
    """Ann judges each of four prompts twice, the same way: her interval is wider than of eight prompts."""
    right, ids = [1, 1, 1, 1, 1, 1, 0, 0], [str(row) for row in range(8)]
    apart, together = (
        pluralism_suite(right, ["ann"] * 8, ids, prompts=prompts)["metrics"]["worst_annotator"]
        for prompts in (None, [row // 2 for row in range(8)])
    )
    assert apart["value"] == together["value"] == 0.75
    assert together["low"] < apart["low"]


def test_the_exact_interval_by_hand():
    """None of 3: the upper end is where (1 - p)^3 = 0.025; all of 3 mirrors it."""
    low, high = exact_interval(0, 3, 0.95)
    assert (low, high) == (0, pytest.approx(1 - 0.025 ** (1 / 3)))
    assert exact_interval(3, 3, 0.95) == (pytest.approx(0.025 ** (1 / 3)), 1)


@pytest.mark.parametrize(
    ("right", "message"), [([1, 2], "outside"), ([1], "1 values, 2 annotators"), ([1, np.nan], "finite")]
)
def test_what_is_refused(right: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        pluralism_suite(right, ["a", "b"], ["1", "2"])
