"""Comparisons with the name of who made them."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.judgements import judgement_table, read_judgements


def table(*rows: dict[str, Any]):
    return judgement_table(("file", number, row) for number, row in enumerate(rows, start=1))


PAIR = {"prompt": "Hi", "chosen": " yes", "rejected": " no"}


def test_annotators_who_disagree_are_data():
    """Two names on the same pair, both ways round: three rows, three ids, and nothing is a contradiction."""
    turned = {"prompt": "Hi", "chosen": " no", "rejected": " yes"}
    found = table({**PAIR, "annotator": "ann"}, {**PAIR, "annotator": 7}, {**turned, "annotator": "bob"})
    assert [row.annotator for row in found.rows] == ["ann", "7", "bob"]
    assert len({row.row_id for row in found.rows}) == 3
    assert found.counts["annotators"] == found.counts["pairs"] == 3
    assert found.counts["contradictions"] == found.counts["duplicates"] == 0
    assert table({**PAIR, "annotator": "ann"}, {**PAIR, "annotator": "ann"}).counts["duplicates"] == 1


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({}, "annotator", "missing"),
        ({"annotator": None}, "annotator", "null"),
        ({"annotator": " "}, "annotator", "' ' is not a name"),
        ({"annotator": True}, "annotator", "True is not a name"),
        ({"annotator": "ann", "rejected": " yes"}, "chosen", "equal to rejected"),
    ],
)
def test_faults(change: dict[str, Any], field: str, reason: str):
    found = table({**PAIR, **change})
    assert not found.rows
    assert found.counts["set_aside"] == 1
    assert (found.faults[0].field, reason in found.faults[0].reason) == (field, True)


def test_a_preference_turns_the_pair_or_ties_it():
    """Of 1, 0, 0.5 and 0.7: as it stands, turned, left out as a tie, and set aside."""
    found = table(*({**PAIR, "annotator": "ann", "preference": p} for p in (1, 0, 0.5, 0.7)))
    assert [(row.chosen, row.rejected) for row in found.rows] == [(" yes", " no"), (" no", " yes")]
    assert (found.counts["ties"], found.counts["set_aside"], found.unused) == (1, 1, {})
    assert (found.faults[0].row, found.faults[0].field) == (4, "preference")


def test_strengths_are_not_read():
    found = table({**PAIR, "annotator": "ann", "strength": 9, "topic": "x"})
    assert found.rows[0].strength == 1.0
    assert found.unused == {"strength": 1, "topic": 1}


def test_the_data_that_comes_with_the_package():
    """Twenty annotators judge 24 pairs each; ten of the new ones come in with the held-out questions."""
    train, heldout = (read_judgements(f"align:annotators/{split}") for split in ("train", "heldout"))
    assert not train.faults
    assert not heldout.faults
    assert (len(train.rows), train.counts["annotators"]) == (480, 20)
    assert (len(heldout.rows), heldout.counts["annotators"]) == (440, 30)
    prompts = [{row.prompt[0]["content"] for row in part.rows} for part in (train, heldout)]
    assert not prompts[0] & prompts[1]
