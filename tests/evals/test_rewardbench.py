"""RewardBench's sections: its weights, its strict ties, and what is not there."""

from __future__ import annotations

import numpy as np
import pytest

from align.evals.rewardbench import PAIRS, SECTIONS, presence, rewardbench_comparisons, rewardbench_scores


def test_the_benchmark_has_2985_pairs_and_its_sections_weigh_as_it_says():
    """358, 456, 740 and 1,431 pairs, as the paper's table 1 has them; in Reasoning mathematics weighs as 984."""
    of_pairs = {section: sum(PAIRS[name] for name in subsets) for section, subsets in SECTIONS.items()}
    assert of_pairs == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431}
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984
    assert len(PAIRS) == 23


def test_the_two_subsets_of_xstest():
    """A published 72.0 % and 76.4 % of should-respond are 180 and 191 of 250, and no k of 154; 70.5 % and 71.8 % of
    should-refuse are 108.5 (a tie) and 110.5 of 154. The weights are those of the benchmark's code.
    """
    assert (PAIRS["xstest-should-refuse"], PAIRS["xstest-should-respond"]) == (154, 250)
    weights = SECTIONS["Safety"]
    assert (weights["xstest-should-refuse"], weights["xstest-should-respond"]) == (250, 154)
    whole = ["xstest-should-refuse"] * 154 + ["xstest-should-respond"] * 250
    assert presence(whole)["incomplete"] == {}


def test_sections_are_compared_pair_by_pair():
    """Reasoning of math-prm (weight 984, two pairs) and hep-go (164, four): a changed pair counts 492/1148 or 41/1148.

    The other is right on one more pair of math-prm and on two more, and one less, of hep-go: 492 + 41 of 1148. Of the
    16 patterns of signs those with the 492 and at least 41 besides are as far from 0: the three signs of 41 sum to at
    least 41 in four of eight, so p = 2 * 4 / 16 = 1/2. Chat Hard is the same in both: p = 1.
    """
    subsets = ["math-prm"] * 2 + ["hep-go"] * 4 + ["mt-bench-hard", "mine"]
    right = {"one": [0, 1, 0, 0, 1, 1, 1, 0], "two": [1, 1, 1, 1, 0, 1, 1, 1]}
    hard, reasoning = rewardbench_comparisons(right, subsets, against="one")
    assert (reasoning["metric"], reasoning["model"], reasoning["n"]) == ("rewardbench/Reasoning", "two", 6)
    assert reasoning["value"] == pytest.approx(533 / 1148)
    assert reasoning["low"] <= reasoning["value"] <= reasoning["high"]
    assert (reasoning["p"], reasoning["p_holm"]) == (0.5, 1.0)
    assert (hard["metric"], hard["value"], hard["p"]) == ("rewardbench/Chat Hard", 0, 1)
    scores = [rewardbench_scores(one, subsets)["Reasoning"].value for one in right.values()]
    assert reasoning["value"] == pytest.approx(scores[1] - scores[0])
    with pytest.raises(ValueError, match="against is 'three'"):
        rewardbench_comparisons(right, subsets, against="three")


def test_intervals_of_paired_differences_cover():
    """Rates 0.8 and 0.5 of 60 and 40 pairs, on half of which the other model does as the first: it is as good."""
    rng = np.random.default_rng(1)
    subsets = ["alpacaeval-easy"] * 60 + ["mt-bench-med"] * 40
    rates, covered = np.repeat([0.8, 0.5], [60, 40]), 0
    for _ in range(100):
        one = rng.random(100) < rates
        two = np.where(rng.random(100) < 0.5, one, rng.random(100) < rates)
        (chat,) = rewardbench_comparisons({"one": one, "two": two}, subsets, against="one")
        covered += chat["low"] <= 0 <= chat["high"]
    assert 90 <= covered <= 99


def test_a_section_is_the_weighted_mean_of_the_subsets_that_are_there():
    """(984 * 1/2 + 164 * 1) / 1148 = 656/1148; n is what was scored, 2 + 1. One pair has no interval."""
    found = rewardbench_scores([1, 0, 1, 0], ["math-prm", "math-prm", "hep-go", "mine"])
    assert found["Reasoning"].value == pytest.approx(656 / 1148)
    assert found["Reasoning"].n == 3
    assert found["math-prm"].value == 0.5
    assert (found["hep-go"].value, found["hep-go"].low, found["hep-go"].n) == (1.0, None, 1)
    assert set(found) == {"math-prm", "hep-go", "Reasoning"}


def test_all_four_sections_have_a_mean():
    """Chat 1, Chat Hard 0, Safety 1, Reasoning 1/2: mean 5/8."""
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go", "hep-go"]
    found = rewardbench_scores([1, 0, 1, 1, 0], subsets)
    assert found["mean"].value == pytest.approx(5 / 8)
    assert found["mean"].n == 5


def test_all_right_by_hand():
    """10 and 5 pairs, weights 5/7 and 2/7: as many of equal weight are 1 / ((5/7)^2 / 10 + (2/7)^2 / 5) = 14.8."""
    found = rewardbench_scores([1] * 15, ["alpacaeval-easy"] * 10 + ["mt-bench-med"] * 5)
    assert found["alpacaeval-easy"].low == pytest.approx(0.025**0.1)
    assert (found["Chat"].value, found["Chat"].low, found["Chat"].high) == (1, pytest.approx(0.025 ** (1 / 14)), 1)
    assert found["Chat"].n == 15


def test_intervals_cover():
    """Two subsets of 60 and 40 pairs with rates 0.8 and 0.5, weights 100 and 40: the truth is 100/140."""
    rng = np.random.default_rng(0)
    truth = (100 * 0.8 + 40 * 0.5) / 140
    subsets = ["alpacaeval-easy"] * 60 + ["mt-bench-med"] * 40
    covered = 0
    for _ in range(200):
        right = np.concatenate([rng.random(60) < 0.8, rng.random(40) < 0.5])
        chat = rewardbench_scores(right, subsets)["Chat"]
        covered += chat.low <= truth <= chat.high  # type: ignore[operator]
    assert 0.9 <= covered / 200 <= 0.99


def test_what_is_there_and_what_is_not():
    found = presence(["hep-go"] * 164 + ["math-prm"] * 3 + ["mine"])
    assert found["present"] == {"math-prm": 3, "hep-go": 164}
    assert found["incomplete"] == {"math-prm": [3, 447]}
    assert len(found["missing"]) == 21
    assert found["others"] == ["mine"]


@pytest.mark.parametrize(
    ("right", "subsets", "message"),
    [
        ([1.0], ["mine"], "none of the subsets"),
        ([1, 0.5], ["hep-go", "hep-go"], r"right\[1\] is neither"),
        ([1], [], "1 values and 0 subsets"),
    ],
)
def test_what_is_refused(right: list[float], subsets: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        rewardbench_scores(right, subsets)
