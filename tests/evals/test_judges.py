"""Judges against people, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.evals.judges import Judged, judge_suite, people_agree

SAME = [[2, 1]]


def suite(said: Any, label: Any, lengths: Any = None, **more: Any) -> dict[str, Any]:
    judged = said if isinstance(said, Judged) else Judged(said)
    sizes = SAME * len(label) if lengths is None else lengths
    return judge_suite(judged, label, sizes, [str(row) for row in range(len(label))], **more)


def value(result: dict[str, Any], name: str) -> float:
    return float(result["metrics"][name]["value"])


def test_agreement_and_kappa_without_ties():
    """Three of four: chance agrees in 1/2, so kappa = (3/4 - 1/2) / (1/2) = 1/2. A soft 0.9 label is a 1."""
    found = suite([0.9, 0.8, 0.2, 0.6], [1, 0.9, 0, 0])
    assert value(found, "agreement") == 0.75
    assert value(found, "kappa") == pytest.approx(0.5)
    assert value(found, "ties") == 0
    assert found["position"] == "none by construction"
    assert "inconsistent" not in found["metrics"]


def test_ties_of_both():
    """Judge: right, tie, tie, wrong; people: 1, 1, tie, 1. Agreement (1 + 1/2 + 0) / 3 over three decided pairs.

    Same verdicts: 2 of 4; chance 1/2 * 1/4 + 1/2 * 3/4 / 2 = 5/16; kappa = (8/16 - 5/16) / (11/16) = 3/11.
    """
    found = suite([1, 0.5, 0.5, 0], [1, 1, 0.5, 1])
    assert value(found, "agreement") == pytest.approx(0.5)
    assert found["metrics"]["agreement"]["n"] == 3
    assert value(found, "kappa") == pytest.approx(3 / 11)
    assert value(found, "ties") == 0.5


def test_kappa_is_the_textbooks_when_each_pair_stands_both_ways_round():
    """Against a table of counts of 60 random verdicts, each counted from either side."""
    rng = np.random.default_rng(0)
    said, label = rng.integers(0, 3, 60) / 2, rng.integers(0, 3, 60) / 2
    table = np.zeros((3, 3))
    for p, y in zip(said, label, strict=True):
        table[int(2 * p), int(2 * y)] += 1
        table[int(2 - 2 * p), int(2 - 2 * y)] += 1
    table /= table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    assert value(suite(said, label), "kappa") == pytest.approx((np.trace(table) - chance) / (1 - chance))


def test_kappa_of_the_same_verdicts_throughout():
    """Four of four: a share of 0.025^(1/4) = 0.398 shows that once in forty; less chance, (0.398 - 1/2) / (1/2)."""
    found = suite([0.9, 0.8, 0.2, 0.6], [1, 1, 0, 1])["metrics"]["kappa"]
    assert found["value"] == found["high"] == 1
    assert found["low"] == pytest.approx(2 * 0.025**0.25 - 1)


def test_position():
    """Verdicts in both orders: twice the same, a flip towards the first place, and a tie in one order alone.

    The first is preferred: chosen first 1, 0, 1, 1/2 and rejected first 0, 1, 1, 0, mean of eight 9/16.
    """
    judged = Judged([0.9, 0.1, 0.5, 0.7], [0.9, 0.2, 0.8, 0.5], [0.9, 0.0, 0.2, 0.9])
    found = suite(judged, [1, 1, 1, 1])
    assert value(found, "inconsistent") == 0.5
    assert value(found, "first_preferred") == pytest.approx(9 / 16)
    assert found["position"] == "asked in both orders"
    assert found["rows"][2] == {
        "row_id": "2",
        "preference": 0.5,
        "label": 1.0,
        "chosen_first": 0.8,
        "rejected_first": 0.2,
    }


def test_length():
    """Longer: chosen, rejected, chosen, none. The judge likes the chosen answer of all: longer 2/3; people of the
    first alone: 1, then the rejected and longer one, then the rejected and shorter one: 2/3. No bias. A judge of
    length: 1, and a bias of 1/3.
    """
    lengths = [[5, 3], [3, 5], [5, 3], [4, 4]]
    found = suite([0.9] * 4, [1, 0, 0, 1], lengths)
    assert value(found, "longer") == pytest.approx(2 / 3)
    assert value(found, "longer_people") == pytest.approx(2 / 3)
    assert value(found, "length_bias") == pytest.approx(0)
    assert found["metrics"]["longer"]["n"] == 3
    assert value(suite([0.9, 0.1, 0.9, 0.5], [1, 0, 0, 1], lengths), "length_bias") == pytest.approx(1 / 3)


def test_pairs_without_a_verdict_and_prompts():
    found = suite([1.0, 1.0, 0.0], [1, 1, 1], groups=["a", "a", "b"], unjudged=["b"])
    assert value(found, "unjudged") == 0.25
    unjudged = found["metrics"]["unjudged"]  # prompt a 0 of 2, b 1 of 2
    assert (unjudged["low"], unjudged["high"], unjudged["n"]) == (0, 0.5, 2)
    assert found["metrics"]["agreement"]["n"] == 2


def test_people_among_themselves():
    """(1, 1, 0): one pair of people of three agrees; (1, 1): all; one person alone says nothing: (1/3 + 1) / 2."""
    found = people_agree([[1, 1, 0], [1, 1], [0]], ["a", "b", "c"])
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    assert people_agree([[1]], ["a"]) is None


@pytest.mark.parametrize(
    ("said", "label", "message"),
    [
        ([1.2], [1], r"preference\[0\] is outside"),
        ([1.0], [0.5], "all 1 labels are ties"),
        ([1.0, 0.0], [1], "2 verdicts, 1 labels"),
    ],
)
def test_what_is_refused(said: list[float], label: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        suite(said, label)
