"""Data of reward models: margins from scores, ties, ratings, and answers held to a limit with their end token."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data import fields
from align.data.rewards import (
    RewardRules,
    rating_table,
    read_ratings,
    reward_pairs,
    tokenize_ratings,
    tokenize_reward_pairs,
)
from align.data.splits import read_split
from align.errors import AlignError
from align.losses import types


def table(rows: list[dict[str, Any]], **rules: Any):
    return reward_pairs((("f", number, row) for number, row in enumerate(rows, 1)), "f", RewardRules(**rules))


def ratings(rows: list[dict[str, Any]], *attributes: str, file: str = "f"):
    return rating_table(((file, number, row) for number, row in enumerate(rows, 1)), file, attributes)


def pair(**more: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": " good", "rejected": " bad", **more}


def test_the_scores_of_a_judge_give_margin_and_strength():
    """Gaps 0.6, 0.2 and 0: margins 0.6 and 0.2, strengths 1 and 1/3, and one tie that gives no pair."""
    rows = [
        pair(chosen_score=0.8, rejected_score=0.2),
        pair(chosen_score=0.4, rejected_score=0.2, prompt="q"),
        pair(chosen_score=1, rejected_score=1, prompt="r"),
    ]
    found = table(rows, gap_of="score")
    assert [row.margin for row in found.rows] == pytest.approx([0.6, 0.2])
    assert [row.strength for row in found.rows] == pytest.approx([1, 1 / 3])
    assert (found.counts["rows"], found.counts["pairs"], found.counts["ties"]) == (3, 2, 1)
    assert found.unused == {}


def test_a_judge_who_disagrees_or_is_silent_is_a_fault():
    rows = [pair(chosen_score=0.1, rejected_score=0.2), pair(chosen_score=1), pair(chosen_score="x", rejected_score=0)]
    found = table(rows, gap_of="score")
    assert [(fault.row, fault.field) for fault in found.faults] == [
        (1, "chosen_score"),
        (2, "rejected_score"),
        (3, "chosen_score"),
    ]
    assert "chosen is the better answer" in found.faults[0].reason


def test_margins_stand_in_the_data_and_may_be_asked_for():
    found = table([pair(margin=2), pair(prompt="q"), pair(margin=-1), pair(margin=True)], needs_margin=True)
    assert [row.margin for row in found.rows] == [2.0]
    assert sorted((fault.row, fault.field) for fault in found.faults) == [(2, "margin"), (3, "margin"), (4, "margin")]
    assert (found.counts["pairs"], found.counts["set_aside"]) == (1, 3)


def test_a_tie_is_half_a_vote_for_either(tiny_tokenizer):
    found = table([pair(preference=0.5), pair(prompt="q")])
    rows = tokenize_reward_pairs(found.rows, tiny_tokenizer, 64).dataset()
    assert rows["preference"] == [0.5, None]
    assert "margin" not in rows.column_names


def test_equal_fingerprints_need_equal_margins():
    assert table([pair(margin=1)]).fingerprint() != table([pair(margin=2)]).fingerprint()
    assert table([pair(margin=1)]).fingerprint() != table([pair()]).fingerprint()


def test_an_answer_that_is_cut_keeps_its_end_token(tiny_tokenizer):
    """Bytes: prompt 1, chosen " abcdef" 7 + end, rejected " x" 2 + end; a limit of 6 leaves 5: 4 and the end."""
    rows = table([{"prompt": "p", "chosen": " abcdef", "rejected": " x"}]).rows
    found = tokenize_reward_pairs(rows, tiny_tokenizer, 6)
    (row,) = found.rows
    eos = tiny_tokenizer.eos_token_id
    assert len(row.prompt_ids) + len(row.chosen_ids) == 6
    assert (row.chosen_ids[-1], row.rejected_ids[-1]) == (eos, eos)
    whole = tiny_tokenizer(" abcdef")["input_ids"]
    assert row.chosen_ids[:-1] == whole[:4]
    assert (found.counts["over_long"], found.counts["truncated_chosen"], found.counts["truncated_rejected"]) == (
        1,
        1,
        0,
    )


def test_over_long_rows_are_set_aside_with_a_count(tiny_tokenizer):
    rows = table([{"prompt": "p", "chosen": " abcdef", "rejected": " x"}, pair(chosen=" y", rejected=" x")]).rows
    found = tokenize_reward_pairs(rows, tiny_tokenizer, 6, "set_aside")
    assert (len(found.rows), found.counts["pairs"], found.counts["set_aside"], found.counts["over_long"]) == (
        1,
        1,
        1,
        1,
    )
    assert found.faults[0].field == "chosen"
    assert "over data.max_length 6" in found.faults[0].reason
    assert found.counts["truncated_chosen"] == 0


def test_a_prompt_without_room_and_answers_that_become_equal_are_faults(tiny_tokenizer):
    rows = table([pair(prompt="prompt"), {"prompt": "p", "chosen": " abcx", "rejected": " abcy"}]).rows
    found = tokenize_reward_pairs(rows, tiny_tokenizer, 5)
    assert [fault.field for fault in found.faults] == ["prompt", "chosen"]
    assert "equal to rejected" in found.faults[1].reason


def test_ratings_are_columns_and_may_be_missing(tiny_tokenizer):
    rows = [
        {"prompt": "p", "completion": " a", "helpfulness": 3, "verbosity": 1.5, "id": 7},
        {"prompt": "p", "completion": " b", "helpfulness": None, "verbosity": 0},
        {"prompt": "p", "completion": " c"},
        {"prompt": "p", "completion": " d", "helpfulness": "3", "verbosity": 1},
        {"prompt": "p", "completion": " e", "helpfulness": -100},
    ]
    found = ratings(rows, "helpfulness", "verbosity")
    assert [row.ratings for row in found.rows] == [(3.0, 1.5), (None, 0.0)]
    assert [fault.field for fault in found.faults] == ["helpfulness"] * 3
    assert "the row has prompt, completion" in found.faults[0].reason
    assert (found.counts["rated_helpfulness"], found.counts["rated_verbosity"], found.unused) == (1, 2, {"id": 1})
    columns = tokenize_ratings(found.rows, tiny_tokenizer, 64).dataset()
    assert columns["ratings"] == [[3.0, 1.5], [-100.0, 0.0]]
    assert columns["completion_ids"][0][-1] == tiny_tokenizer.eos_token_id


def test_a_rated_answer_may_be_a_response():
    found = ratings([{"prompt": "p", "response": " a", "helpfulness": 3}], "helpfulness")
    assert [(row.completion, row.ratings) for row in found.rows] == [(" a", (3.0,))]
    assert (found.faults, found.unused) == ([], {})
    assert ratings([{"prompt": "p", "response": "", "helpfulness": 3}], "helpfulness").faults[0].field == "response"


def test_signed_strengths_are_strengths_and_margins():
    """What scaled and margin Bradley-Terry read of them: 3 stays 3."""
    row = {"prompt": "p", "response_1": " a", "response_2": " b", "preference_strength": 3}
    found = table([row], needs_margin=True)
    assert [(pair.chosen, pair.strength, pair.margin) for pair in found.rows] == [(" b", 3.0, 3.0)]


def test_numbers_in_a_csv_file_are_text(tmp_path):
    path = tmp_path / "rated.csv"
    path.write_text("prompt,completion,helpfulness,verbosity\np, a,3,\np, b,x,1\n")
    found = read_ratings(str(path), ["helpfulness", "verbosity"])
    assert [row.ratings for row in found.rows] == [(3.0, None)]
    assert found.faults[0].reason == "'x' is not a number"


def test_pairs_with_scores_are_two_rated_answers():
    found = ratings([pair(chosen_score=0.8, rejected_score=0.2), pair(chosen_score=0.8)], "score")
    assert [(row.completion, row.ratings) for row in found.rows] == [(" good", (0.8,)), (" bad", (0.2,))]
    assert found.faults[0].field == "rejected_score"
    assert found.counts["unpaired"] == 1


def test_the_same_answer_rated_twice_stays_twice():
    rows = [{"prompt": "p", "completion": " a", "score": score} for score in (1, 2, 2)]
    found = ratings(rows, "score")
    assert len(found.rows) == 3
    assert found.counts["duplicates"] == 1


def test_no_attribute_is_an_error():
    with pytest.raises(AlignError, match=r"set reward\.attributes"):
        ratings([], *())


def test_a_split_reads_by_the_rules(tmp_path, tiny_tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair(chosen_score=2, rejected_score=1)) + "\n")
    split = read_split(str(path), tiny_tokenizer, 64, kind="pairs", rules=RewardRules(gap_of="score"))
    assert split.tokenized.dataset()["margin"] == [1.0]
    rated = read_split(str(path), tiny_tokenizer, 64, kind="ratings", rules=RewardRules(attributes=("score",)))
    assert rated.facts["rated_score"] == 2
    assert [row.completion for row in rated.used] == [" good", " bad"]


def test_numbers_beyond_what_losses_take_are_set_aside():
    """A limit of the data, so that no run stops in its loss."""
    assert fields.LARGEST == types.LARGEST
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2e6}
    (fault,) = reward_pairs([("file", 1, row)], "file", RewardRules(needs_margin=True)).faults
    assert (fault.field, "2e+06 is beyond 1e+06" in fault.reason) == ("margin", True)
    rated = {"prompt": "p", "completion": "a", "views": 3e6}
    (fault,) = rating_table([("file", 1, rated)], "file", ["views"]).faults
    assert (fault.field, "3e+06 is beyond 1e+06" in fault.reason) == ("views", True)
