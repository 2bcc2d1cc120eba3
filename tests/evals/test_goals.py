"""Several rewards at once: what the means hide, the share that is good in all shows."""

from __future__ import annotations

import json

import pytest

from align.evals.goals import goals_suite
from align.evals.kl import LogRatios
from align.evals.sampling import Sample


def answers(*texts: str) -> list[Sample]:
    return [Sample(list(range(len(text))), text, True) for text in texts]


def test_means_rise_while_answers_good_in_both_fall():
    """Before, both rewards are (1, 1): good in both. After, (9, 0) and (0, 9): the means rise to 4.5, good in none."""
    found = goals_suite(
        ["p", "q"],
        answers("ab", "cd"),
        answers("abc", "d"),
        {"one": ([1, 1], [9, 0]), "two": ([1, 1], [0, 9])},
        {"one": ([1, 1], [1, 0]), "two": ([1, 1], [0, 1]), "all": ([1, 1], [0, 0])},
        kl=LogRatios([0.5, 1.5], [3, 1], 1.0),
        settings={"beta": 0.1},
    )
    value = {name: entry["value"] for name, entry in found["metrics"].items()}
    assert (value["one_before"], value["one_after"], value["one_change"]) == (1, 4.5, 3.5)
    assert (value["good_one_after"], value["good_all_before"], value["good_all_after"]) == (0.5, 1, 0)
    assert value["good_all_change"] == -1
    assert (value["length_before"], value["length_after"], value["kl_to_reference"]) == (2, 2, 1)
    assert found["rows"][1]["after"]["rewards"] == {"one": 0.0, "two": 9.0}
    assert found["rows"][1]["after"]["good"] == {"one": False, "two": True, "all": False}
    assert found["rows"][1]["kl"] == 1.5
    assert found["settings"]["beta"] == 0.1
    assert json.loads(json.dumps(found)) == found


def test_counts_that_differ():
    with pytest.raises(ValueError, match="1 answers before"):
        goals_suite(["p", "q"], answers("a"), answers("a", "b"), {}, {})
    with pytest.raises(ValueError, match="one: 1 values before and 2 after, for 2 prompts"):
        goals_suite(["p", "q"], answers("a", "b"), answers("a", "b"), {"one": ([1], [1, 2])}, {})
