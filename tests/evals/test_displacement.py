"""Displacement suite on log-probs whose changes are done by hand."""

from __future__ import annotations

import json

import pytest
import torch

from align.evals.displacement import displacement_suite
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
    assert [metric["n"] for metric in result["metrics"].values()] == [1, 1, 1, 1, 2]


def test_refuses_other_pairs():
    with pytest.raises(ValueError, match="different chosen answers"):
        displacement_suite(pairs([-1.0], [-1.0], [3]), pairs([-1.0], [-1.0], [2]), ["a"])
    with pytest.raises(ValueError, match="1 pairs and 2 row ids"):
        displacement_suite(pairs([-1.0], [-1.0], [3]), pairs([-1.0], [-1.0], [3]), ["a", "b"])
