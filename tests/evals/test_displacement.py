"""Displacement suite on log-probs whose changes are done by hand."""

from __future__ import annotations

import json

import pytest
import torch

from align.evals.displacement import (
    displacement_suite,
    displacement_values,
    gained_tokens,
    largest_decreases,
)
from align.evals.statistics import comparisons
from align.losses.types import PairLogps, SequenceLogps


def logps(totals: list[float], lengths: list[int]) -> SequenceLogps:
    return SequenceLogps(torch.tensor(totals), torch.tensor(lengths))


def pairs(chosen: list[float], rejected: list[float], lengths: list[int]) -> PairLogps:
    return PairLogps(logps(chosen, lengths), logps(rejected, [2] * len(rejected)))


def test_by_hand():
    """Chosen changes +1, -4, -1 over 2, 4, 1 tokens: mean -4/3, per token (0.5 - 1 - 1)/3, two of three fell."""
    result = displacement_suite(
        pairs([-9.0, -14.0, -3.0], [-20.0, -20.0, -20.0], [2, 4, 1]),
        pairs([-10.0, -10.0, -2.0], [-18.0, -16.0, -20.0], [2, 4, 1]),
        ["a", "b", "c"],
    )
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values == pytest.approx(
        {
            "chosen_delta": -4 / 3,
            "chosen_delta_per_token": -0.5,
            "rejected_delta": -2.0,
            "rejected_delta_per_token": -1.0,
            "frac_chosen_down": 2 / 3,
            "largest_fall": 4.0,
        }
    )
    assert result["metrics"]["largest_fall"] == {"value": 4.0, "low": None, "high": None, "n": 3}
    assert result["rows"][1] == {
        "row_id": "b",
        "chosen_delta": -4.0,
        "rejected_delta": -4.0,
        "chosen_tokens": 4,
        "rejected_tokens": 2,
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_nothing_fell():
    """One chosen answer rose and one stayed: staying is no fall. Both pairs are of one prompt: no interval."""
    result = displacement_suite(
        pairs([-1.0, -2.0], [-3.0, -3.0], [1, 1]),
        pairs([-2.0, -2.0], [-3.0, -3.0], [1, 1]),
        ["a", "b"],
        groups=["p", "p"],
    )
    assert result["n"] == 2
    assert result["metrics"]["largest_fall"]["value"] == 0.0
    assert result["metrics"]["frac_chosen_down"] == {"value": 0.0, "low": None, "high": None, "n": 1}
    assert [metric["n"] for metric in result["metrics"].values()] == [1, 1, 1, 1, 1, 2]


def test_refuses_other_pairs():
    with pytest.raises(ValueError, match="different chosen answers"):
        displacement_suite(pairs([-1.0], [-1.0], [3]), pairs([-1.0], [-1.0], [2]), ["a"])
    with pytest.raises(ValueError, match="1 pairs and 2 row ids"):
        displacement_suite(pairs([-1.0], [-1.0], [3]), pairs([-1.0], [-1.0], [3]), ["a", "b"])


def test_a_difference_is_paired():
    """One model moved every chosen answer a nat less far than the other: 1 with no doubt, though the rows differ."""
    reference = pairs([-50.0, -10.0, -2.0], [-20.0, -20.0, -20.0], [2, 4, 1])
    other = pairs([-55.0, -9.0, -2.5], [-20.0, -20.0, -20.0], [2, 4, 1])
    policy = pairs([-54.0, -8.0, -1.5], [-22.0, -22.0, -22.0], [2, 4, 1])
    values = {"other": displacement_values(other, reference), "policy": displacement_values(policy, reference)}
    found = {one["metric"]: one for one in comparisons(values, against="other", groups=["p", "q", "r"])}
    chosen = found["chosen_delta"]
    assert [chosen[key] for key in ("value", "low", "high", "n")] == [1.0, 1.0, 1.0, 3]
    assert found["rejected_delta"]["value"] == -2.0
    assert found["frac_chosen_down"]["value"] == pytest.approx(-1 / 3)  # 1 of 3 fell, against 2 of 3


def test_largest_decrease_by_hand():
    """Of one answer .5 -> .8 -> .3 -> .4: .8 - .3, between steps 1 and 2. The other rises: 0."""
    steps = [[0.5, 0.1], [0.8, 0.2], [0.3, 0.3], [0.4, 0.4]]
    found = largest_decreases([logps(torch.tensor(row).log().tolist(), [1, 1]) for row in steps])
    assert found.tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="1 step: a decrease is between two"):
        largest_decreases([logps([-1.0], [1])])


def test_tokens_that_gained():
    """Token 2 gained .3, token 0 gained .1; token 3 stayed, token 1 lost: neither is told."""
    before, after = torch.tensor([0.1, 0.6, 0.1, 0.2]), torch.tensor([0.2, 0.2, 0.4, 0.2])
    found = gained_tokens(before, after, lambda ids: "abcd"[ids[0]])
    assert [(token["id"], token["token"]) for token in found] == [(2, "c"), (0, "a")]
    assert (found[0]["before"], found[0]["after"]) == pytest.approx((0.1, 0.4))
    result = displacement_suite(pairs([-1.0], [-1.0], [3]), pairs([-1.0], [-1.0], [3]), ["a"], gained=found)
    assert result["gained"] == found
    with pytest.raises(ValueError, match="different vocabularies"):
        gained_tokens(before, after[:2], str)
