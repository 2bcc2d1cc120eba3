"""Preference suite on rewards whose metrics are counted by hand."""

from __future__ import annotations

import json

import pytest
import torch

from align.evals.preference import preference_suite


def test_by_hand():
    """Margins 1, 0.5, 0, -2: two right, one tie, one wrong: accuracy 2.5/4, mean margin -0.125, ties 1/4."""
    chosen, rejected = torch.tensor([1.0, 0.0, 0.3, -1.0]), torch.tensor([0.0, -0.5, 0.3, 1.0])
    result = preference_suite(chosen, rejected, list("abcd"), settings={"loss": "dpo"})
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == {
        "accuracy": 0.625,
        "margin": -0.125,
        "ties": 0.25,
    }
    assert (result["suite"], result["schema"], result["n"]) == ("preference", 1, 4)
    assert result["rows"][1] == {"row_id": "b", "chosen_reward": 0.0, "rejected_reward": -0.5}
    assert result["settings"]["loss"] == "dpo"
    assert result["settings"]["interval"]["level"] == 0.95
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_untrained_policy_is_all_ties():
    """Policy = reference: every reward is 0, accuracy one half, and the ties say why."""
    result = preference_suite(torch.zeros(8), torch.zeros(8), [str(i) for i in range(8)])
    assert result["metrics"]["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 8}
    assert result["metrics"]["ties"]["value"] == 1.0


def test_pairs_of_a_prompt_count_once():
    chosen = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.bfloat16, requires_grad=True)
    result = preference_suite(chosen, torch.zeros(4), list("abcd"), groups=["p", "p", "q", "q"])
    assert result["n"] == 4
    assert [metric["n"] for metric in result["metrics"].values()] == [2, 2, 2]
    assert result["metrics"]["accuracy"]["low"] == 0.5  # prompt q alone: one right, one wrong


def test_soft_labels_say_which_answer_is_to_rank_first():
    """Margins 1, 1, -2, 3 under labels .9, .1, .2, .5: right, wrong, right, and one that cannot be either."""
    result = preference_suite(
        torch.tensor([1.0, 1.0, -2.0, 3.0]), torch.zeros(4), list("abcd"), preference=[0.9, 0.1, 0.2, 0.5]
    )
    found = {name: (metric["value"], metric["n"]) for name, metric in result["metrics"].items()}
    assert found == {
        "accuracy": (pytest.approx(2 / 3), 3),
        "margin": (pytest.approx((1 - 1 + 2) / 3), 3),
        "ties": (0.0, 4),
        "label_ties": (0.25, 4),
    }
    assert result["rows"][1]["preference"] == 0.1


def test_refuses_other_counts_and_nan():
    with pytest.raises(ValueError, match="all 2 pairs are ties of the label"):
        preference_suite(torch.zeros(2), torch.zeros(2), ["a", "b"], preference=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"preference\[1\] is outside"):
        preference_suite(torch.zeros(2), torch.zeros(2), ["a", "b"], preference=[0.5, 1.5])
    with pytest.raises(ValueError, match="2 chosen rewards, 2 rejected rewards, 1 row ids"):
        preference_suite(torch.zeros(2), torch.zeros(2), ["a"])
    with pytest.raises(ValueError, match=r"rejected_rewards\[1\] is nan"):
        preference_suite(torch.zeros(2), torch.tensor([0.0, float("nan")]), ["a", "b"])
