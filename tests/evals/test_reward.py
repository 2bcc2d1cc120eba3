"""The reward suite on numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.evals.reward import ratings_suite, reward_suite


def value(result, name):
    return result["metrics"][name]["value"]


def test_pairs_ties_and_the_log_loss():
    """Scores 2, -1, 0: one right, one wrong, one tie: (1 + 0 + 1/2) / 3; margins 1/3; log loss by hand."""
    found = reward_suite(torch.tensor([2.0, -1.0, 0.0]), ["a", "b", "c"])
    assert value(found, "accuracy") == pytest.approx(0.5)
    assert value(found, "ties") == pytest.approx(1 / 3)
    assert value(found, "margin") == pytest.approx(1 / 3)
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    assert value(found, "log_loss") == pytest.approx(wanted)
    assert found["n"] == 3


def test_a_label_below_one_half_turns_the_pair_and_one_half_decides_nothing():
    """Preferences 0, 0.5, 1 with scores -1, 3, 1: both decided pairs are right, and one label in three is a tie."""
    found = reward_suite(torch.tensor([-1.0, 3.0, 1.0]), ["a", "b", "c"], preference=[0.0, 0.5, None])
    assert value(found, "accuracy") == 1
    assert value(found, "margin") == 1
    assert value(found, "label_ties") == pytest.approx(1 / 3)
    assert found["metrics"]["accuracy"]["n"] == 2
    tie = (math.log1p(math.exp(-3)) + math.log1p(math.exp(3))) / 2
    assert value(found, "log_loss") == pytest.approx((2 * math.log1p(math.exp(-1)) + tie) / 3)


def test_prompts_are_resampled_together():
    scores = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert reward_suite(scores, list("abcd"), groups=["p", "p", "q", "q"])["metrics"]["accuracy"]["n"] == 2


@pytest.mark.parametrize(
    ("scores", "preference", "message"),
    [
        ([math.nan, 1.0], None, r"scores\[0\] is nan"),
        ([1.0, 1.0], [0.5, 0.5], "all 2 pairs are ties of the label"),
        ([1.0, 1.0], [0.5, 1.5], r"preference\[1\] is outside"),
        ([1.0], None, "1 scores, 2 row ids"),
    ],
)
def test_bad_input_is_named(scores, preference, message):
    with pytest.raises(ValueError, match=message):
        reward_suite(torch.tensor(scores), ["a", "b"], preference=preference)


def test_ratings_their_errors_and_the_pairs_that_they_rank():
    """Errors 1, -1 and 0 of the first attribute: RMSE sqrt(2/3). Of prompt p, 3 > 1 is ranked 4 > 0: right."""
    values = torch.tensor([[4.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    ratings = [(3.0, None), (1.0, 2.0), (2.0, 1.0)]
    found = ratings_suite(values, ratings, ["good", "long"], [1.0, 0.0], list("abc"), ["p", "p", "q"])
    assert value(found, "rmse_good") == pytest.approx(math.sqrt(2 / 3))
    assert value(found, "spread_good") == pytest.approx(math.sqrt(2 / 3))
    assert value(found, "rmse_long") == pytest.approx(math.sqrt(2))
    assert value(found, "accuracy") == 1
    assert found["settings"]["pairs"] == 1


def test_answers_that_people_did_not_rank_are_no_pair():
    """By the sum, both answers are worth 3; and one rating is missing in the other prompt."""
    values = torch.zeros(4, 2)
    ratings = [(3.0, 0.0), (1.0, 2.0), (None, 1.0), (2.0, 1.0)]
    found = ratings_suite(values, ratings, ["a", "b"], [1.0, 1.0], list("wxyz"), ["p", "p", "q", "q"])
    assert "accuracy" not in found["metrics"]
    assert found["settings"]["pairs"] == 0


def test_an_attribute_without_ratings_is_named():
    with pytest.raises(ValueError, match="b: nobody rated it"):
        ratings_suite(torch.zeros(1, 2), [(1.0, None)], ["a", "b"], [1.0, 0.0], ["x"], ["p"])
