"""Generation suite on answers whose metrics are counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from align.evals.generation import compare, distinct, distinct_estimate, repetition
from align.evals.kl import LogRatios
from align.evals.sampling import Sample
from align.evals.statistics import Estimate, Z

PROMPTS = ["Name a fruit.", "Name a tree.", "Name a pet."]
BEFORE = [Sample([1, 2, 1, 2, 1], "well well", False), Sample([3, 4, 9], "oak", True), Sample([5], "cats", False)]
AFTER = [Sample([5, 9], "fig", True), Sample([6, 7, 8, 9], "elms", True), Sample([6, 7, 9], "cat", True)]


def brevity(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Minus the number of characters."""
    return [-float(len(completion)) for completion in completions]


def test_by_hand():
    """Rewards -9, -3, -4 before and -3, -4, -3 after: two wins, one loss.

    3-grams of [1,2,1,2,1] are 121, 212, 121: a third repeats, and none of the other answers'.
    2-grams before: 12, 21, 12, 21, 34, 49: 4 of 6 differ. After: 59, 67, 78, 89, 67, 79: 5 of 6.
    KL: 2 and 4 nats over 2 and 6 tokens: 3 per answer, 6/8 per token.
    """
    result = compare(
        PROMPTS,
        BEFORE,
        AFTER,
        brevity,
        kl=LogRatios([2.0, 4.0], [2, 6], 1.0),
        settings={"temperature": 0.7, "seed": 0},
    )
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == pytest.approx(
        {
            "win_rate": 2 / 3,
            "ties": 0.0,
            "reward_change": 2.0,
            "reward_before": -16 / 3,
            "length_before": 3.0,
            "unfinished_before": 2 / 3,
            "repetition_before": 1 / 9,
            "distinct_before": 4 / 6,
            "reward_after": -10 / 3,
            "length_after": 3.0,
            "unfinished_after": 0.0,
            "repetition_after": 0.0,
            "distinct_after": 5 / 6,
            "kl_to_reference": 3.0,
            "kl_to_reference_per_token": 0.75,
        }
    )
    assert result["metrics"]["win_rate"] == {"value": pytest.approx(2 / 3), "low": 0.0, "high": 1.0, "n": 3}
    assert result["metrics"]["kl_to_reference"]["n"] == 2
    assert result["rows"][0] == {
        "prompt": "Name a fruit.",
        "before": {"text": "well well", "reward": -9.0, "tokens": 5, "finished": False}
        | {"repetition": pytest.approx(1 / 3)},
        "after": {"text": "fig", "reward": -3.0, "tokens": 2, "finished": True, "repetition": 0},
        "kl": 2.0,
    }
    assert [row["kl"] for row in result["rows"]] == [2.0, 4.0, None]
    assert (result["suite"], result["n"]) == ("generation", 3)
    assert result["settings"]["temperature"] == 0.7
    assert result["settings"]["kl_unbiased"] is True
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_same_answers_tie():
    metrics = compare(PROMPTS, AFTER, AFTER, brevity)["metrics"]
    assert metrics["win_rate"]["value"] == 0.5
    assert metrics["ties"]["value"] == 1.0
    assert "kl_to_reference" not in metrics


def test_answers_at_another_temperature_are_said_to_be_biased():
    result = compare(PROMPTS, BEFORE, AFTER, brevity, kl=LogRatios([2.0], [2], 0.7))
    assert result["settings"]["kl_temperature"] == 0.7
    assert result["settings"]["kl_unbiased"] is False


def test_interval_of_distinct_by_hand():
    """Answers 12, 34 and 12: 2 of 3 differ. Without one of the same two: 2/2; without 34: 1/2. Mean 5/6, v = 1/9."""
    found = distinct_estimate([[1, 2], [3, 4], [1, 2]])
    assert (found.value, found.low, found.n) == (pytest.approx(2 / 3), pytest.approx(2 / 3 - Z / 3), 3)
    assert found.high == 1
    assert distinct_estimate([[1, 2]]).low is None
    assert distinct_estimate([[1, 2], [3]]).low is None, "all 2-grams are of one answer"
    assert distinct_estimate([[1, 2], [3, 4]]) == Estimate(1.0, None, None, 2), "all differ, so far"
    assert distinct_estimate([[], []]) == Estimate(1.0, None, None, 2)


def test_interval_of_distinct_covers():
    """Tokens by Zipf's law: the share of different ones among those of as many answers, in the mean over many."""
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, 101)
    law /= law.sum()

    def draw() -> list[list[int]]:
        return [rng.choice(100, rng.integers(3, 20), p=law).tolist() for _ in range(24)]

    truth = np.mean([distinct(draw(), 1) for _ in range(300)])
    covered = sum(found.low <= truth <= found.high for found in (distinct_estimate(draw(), 1) for _ in range(200)))
    assert covered / 200 > 0.93


def test_short_answers_repeat_nothing():
    assert repetition([7, 7]) == 0.0
    assert repetition([7] * 6) == 0.75  # four 3-grams, one kind
    assert distinct([[7], [8]]) == 1.0
    assert distinct([[1, 2], [1, 2]]) == 0.5


def test_refusals():
    with pytest.raises(ValueError, match="3 prompts, 1 answers before"):
        compare(PROMPTS, BEFORE[:1], AFTER, brevity)
    with pytest.raises(ValueError, match="gave 1 numbers for 3 answers"):
        compare(PROMPTS, BEFORE, AFTER, lambda prompts, completions: [1.0])
    with pytest.raises(ValueError, match="row 1: nan: not a finite number"):
        compare(PROMPTS, BEFORE, AFTER, lambda prompts, completions: [1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="4 log-ratios for 3 prompts"):
        compare(PROMPTS, BEFORE, AFTER, brevity, kl=LogRatios([1.0] * 4, [1] * 4, 1.0))
