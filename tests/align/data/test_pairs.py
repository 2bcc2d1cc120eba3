"""What becomes a pair, with which strength, and what is said of a row that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.pairs import pair_table, read_pairs, repeats
from align.data.rows import PairTable

USER = {"role": "user", "content": "Hi?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def table(*rows: dict[str, Any]) -> PairTable:
    return pair_table(("data.jsonl", number, row) for number, row in enumerate(rows, start=1))


def only_fault(**row: Any) -> tuple[str, str]:
    result = table(row)
    assert len(result.faults) == 1, result.faults
    assert not result.rows
    assert (result.faults[0].source, result.faults[0].row, result.faults[0].content) == ("data.jsonl", 1, row)
    return result.faults[0].field, result.faults[0].reason


def test_explicit_pair_is_taken_as_it_stands() -> None:
    pair = table({"prompt": " 2+2? ", "chosen": " 4\n", "rejected": "5 ", "strength": 0.25}).rows[0]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.strength) == (" 2+2? ", " 4\n", "5 ", 0.25)
    assert (pair.source, pair.row) == ("data.jsonl", 1)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER], [YES], [NO]),
        ({"prompt": [USER], "chosen": "Yes.", "rejected": [NO]}, [USER], [YES], [NO]),
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, [USER], [YES], [NO]),
        ({"prompt": "Hi?", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER], [YES], [NO]),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, [USER], [YES], [NO]),
        ({"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}, [USER, YES, USER], [YES], [NO]),
        ({"chosen": "Q: sky?\nA: blue", "rejected": "Q: sky?\nA: black"}, "Q: sky?\nA:", " blue", " black"),
        ({"chosen": "the cat sat", "rejected": "the cat\nsat"}, "the cat", " sat", "\nsat"),
        ({"chosen": "the cats", "rejected": "the cat sat"}, "the", " cats", " cat sat"),
        ({"chosen": "a  b x", "rejected": "a  b y"}, "a  b", " x", " y"),
    ],
    ids=[
        "messages",
        "text answer",
        "repeated prompt",
        "prompt text",
        "implicit",
        "turns",
        "text",
        "word end",
        "in a word",
        "blanks",
    ],
)
def test_prompt_and_answers(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    result = table(row)
    assert result.faults == []
    assert (result.rows[0].prompt, result.rows[0].chosen, result.rows[0].rejected) == (prompt, chosen, rejected)


def test_implicit_prompt_when_one_answer_begins_the_other() -> None:
    """Character by character, "The sky is" / "The sky is blue" gives the prompt "The sky i" in TRL's extract_prompt.

    Where the prompt ends is not in the data, and nothing is guessed.
    """
    field, reason = only_fault(chosen="The sky is", rejected="The sky is blue")
    assert field == "chosen"
    assert reason == "is the beginning of the other answer, so that no prompt can be told from it: add a prompt field"
    field, reason = only_fault(chosen=[USER, YES, USER, NO], rejected=[USER, YES])
    assert field == "prompt"  # what they share ends in the assistant's turn


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {"question": "x", "rejected": "y"},
            "chosen",
            "missing: the row has question, rejected; wanted [prompt,] chos",
        ),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt", "null; wanted [prompt,] chosen, rejected"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt", "a number, not text or chat messages"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt", "empty prompt: "),
        ({"prompt": [], "chosen": [YES], "rejected": [NO]}, "prompt", "empty prompt: "),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "rejected", "empty completion: there is nothing to learn"),
        ({"prompt": [USER], "chosen": "", "rejected": "b"}, "chosen", "empty completion: "),
        ({"prompt": [USER], "chosen": [], "rejected": [NO]}, "chosen", "empty completion: "),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}], "rejected": [NO]},
            "chosen",
            "empty completion: ",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen", "equal to rejected"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "chosen", "equal to rejected"),
        ({"prompt": [USER], "chosen": [YES], "rejected": "Yes."}, "chosen", "equal to rejected"),
        ({"prompt": "p", "chosen": "a", "rejected": "\ud83d"}, "rejected", "holds half a surrogate pair"),
        (
            {"prompt": [{"from": "human"}], "chosen": "a", "rejected": "b"},
            "prompt",
            "message 1 has from; wanted role, co",
        ),
        ({"prompt": ["Hi"], "chosen": "a", "rejected": "b"}, "prompt", "message 1 is a str, not an object with role"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
            "prompt",
            "message 1: content is a list, not text",
        ),
        ({"prompt": [USER, YES], "chosen": "a", "rejected": "b"}, "prompt", "ends in an assistant turn"),
        (
            {"prompt": [USER], "chosen": [YES, USER], "rejected": [NO]},
            "chosen",
            "ends in a user turn, not in an assist",
        ),
        (
            {"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [NO]},
            "chosen",
            "message 2 is a user turn: put it",
        ),
        ({"prompt": "p", "chosen": [YES], "rejected": "no"}, "chosen", "messages where another answer is text"),
        ({"prompt": "Ho?", "chosen": [USER, YES], "rejected": [USER, NO]}, "prompt", "text, but answers are messages"),
        ({"chosen": [YES], "rejected": [NO]}, "prompt", "missing, and the answers share no first message"),
        ({"chosen": "Apple", "rejected": "Ant"}, "prompt", "missing, and the answers share no first word"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "strength": float("nan")},
            "strength",
            "nan is not a finite number above 0",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "strength": 0}, "strength", "0 is not a finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "strength": -2}, "strength", "-2 is not a finite"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "strength": True}, "strength", "True is not a number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "strength": "much"}, "strength", "'much' is not a number"),
        ({**PAIR, "preference": float("nan")}, "preference", "nan is not in [0, 1]"),
        ({**PAIR, "preference": -0.1}, "preference", "-0.1 is not in [0, 1]: it is the probability that chosen"),
        ({**PAIR, "preference": 90}, "preference", "90 is not in [0, 1]"),
        ({**PAIR, "preference": True}, "preference", "True is not a number"),
        ({**PAIR, "preference": "0.9"}, "preference", "'0.9' is not a number"),
        ({"prompt": "p", "completions": "a, b", "rank": [1, 2]}, "completions", "not a list of answers"),
        ({"prompt": "p", "completions": ["a"], "rank": [1]}, "completions", "1 answer: a comparison needs two"),
        ({"prompt": "p", "completions": ["a", ""], "rank": [1, 2]}, "completions 2", "empty completion"),
        ({"prompt": "p", "completions": ["a", "b"]}, "rank", "missing: the row has prompt, completions; wanted"),
        ({"prompt": "p", "completions": ["a", "b"], "rank": [1]}, "rank", "1 numbers for 2 completions"),
        (
            {"prompt": "p", "completions": ["a", "b"], "rank": [0, 1]},
            "rank",
            "0 is not a rank: ranks are whole numbers",
        ),
        ({"prompt": "p", "completions": ["a", "b"], "rank": [1, 1.5]}, "rank", "1.5 is not a rank"),
        ({"prompt": "p", "completions": ["a", "b"], "rank": 1}, "rank", "not a list with one number per completion"),
        (
            {"prompt": "p", "completions": ["a", "b"], "ratings": [1, float("inf")]},
            "ratings",
            "inf is not a finite numb",
        ),
        (
            {"prompt": "p", "completions": ["a", "b"], "rank": [1, 2], "ratings": [1, 2]},
            "rank",
            "given beside ratings",
        ),
        (
            {"prompt": "p", "completions": ["a", "a"], "rank": [1, 2]},
            "completions 2",
            "equal to completions 1, but not",
        ),
    ],
)
def test_fault(row: dict[str, Any], field: str, reason: str) -> None:
    found = only_fault(**row)
    assert found[0] == field
    assert found[1].startswith(reason)


def test_a_row_is_told_all_that_is_wrong_with_it() -> None:
    result = table({"prompt": 1, "chosen": None, "rejected": [{}], "strength": -1, "preference": 2})
    assert [fault.field for fault in result.faults] == ["prompt", "chosen", "rejected", "strength", "preference"]
    assert (result.counts["rows"], result.counts["set_aside"], result.counts["pairs"]) == (1, 1, 0)


def test_ranking() -> None:
    """Ranks 1, 2, 2, 5: largest gap 4; pairs a>b 1/4, a>c 1/4, a>d 4/4, b>d 3/4, c>d 3/4; b and c tie."""
    result = table({"prompt": "p", "completions": list("bacd"), "rank": [2, 1, 2, 5]})
    strengths = {(pair.chosen, pair.rejected): pair.strength for pair in result.rows}
    assert strengths == {
        ("a", "b"): 0.25,
        ("a", "c"): 0.25,
        ("a", "d"): 1.0,
        ("b", "d"): 0.75,
        ("c", "d"): 0.75,
    }
    assert (result.counts["ties"], result.counts["pairs"], result.counts["rankings"]) == (1, 5, 1)


def test_ratings_are_measured_by_the_range_of_the_whole_source() -> None:
    """Ratings 1 and 3 in one row, 9 and 9 in another: range 8, one pair of strength 2/8, one tie."""
    result = table(
        {"prompt": "p", "completions": ["a", "b"], "ratings": [1, 3]},
        {"prompt": "q", "completions": ["a", "b"], "ratings": [9.0, 9.0]},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    )
    assert [(pair.chosen, pair.strength) for pair in result.rows] == [("b", 0.25), ("c", 1.0)]
    assert (result.counts["ties"], result.counts["ratings"], result.counts["explicit_prompt"]) == (1, 2, 1)


def test_ranked_messages_take_one_form() -> None:
    pair = table({"prompt": [USER], "completions": ["No.", [YES]], "rank": [2, 1]}).rows[0]
    assert (pair.chosen, pair.rejected) == ([YES], [NO])


def test_duplicates_and_contradictions_are_counted_and_kept() -> None:
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    other = {"prompt": "p", "chosen": "b", "rejected": "a"}
    for order in ([one, one, other], [other, one, one], [one, other, one]):
        result = table(*order)
        assert (result.counts["pairs"], result.counts["duplicates"], result.counts["contradictions"]) == (3, 1, 1)
    assert [(first.row, second.row) for first, second in repeats(table(one, one, other).rows)[1]] == [(1, 3)]


def test_row_id_is_of_the_content_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "strength": (n + 1) / 4} for n in range(3)]
    forward = {pair.prompt: pair.row_id for pair in table(*rows).rows}
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({**row, "strength": 1}) + "\n" for row in reversed(rows)))
    assert {pair.prompt: pair.row_id for pair in read_pairs(str(path)).rows} == forward
    assert len(set(forward.values())) == 3
    assert all(len(row_id) == 16 for row_id in forward.values())


def test_fingerprint_sees_order_and_strength() -> None:
    one, other = ({"prompt": "p", "chosen": answer, "rejected": "z"} for answer in "ab")
    prints = {table(*rows).fingerprint() for rows in ([one, other], [other, one], [one, {**other, "strength": 0.5}])}
    assert len(prints) == 3
    assert table(one).fingerprint() == table(dict(one)).fingerprint()


def test_soft_labels_are_read_and_counted() -> None:
    """0 and 1 are probabilities too; null and no field at all are a sure label, which is not counted."""
    result = table(*({**PAIR, "preference": p} for p in (0.8, 0, 1.0, None)), PAIR)
    assert [pair.preference for pair in result.rows] == [0.8, 0.0, 1.0, None, None]
    assert result.counts["soft_labels"] == 3
    assert result.unused == {}


def test_fingerprint_sees_soft_labels() -> None:
    prints = {table({**PAIR, "preference": p}).fingerprint() for p in (None, 0.5, 1.0)}
    assert len(prints) == 3
    assert table({**PAIR, "preference": None}).fingerprint() == table(PAIR).fingerprint()


def test_signed_strengths_say_which_response_is_better_and_by_how_much() -> None:
    """-2: the first; 3: the second, much; 0: a tie, which gives no pair. What is beside them is not read."""
    both = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_statement": "because"}
    result = table(*({**both, "preference_strength": strength} for strength in (-2, 3, 0)))
    found = [(pair.chosen, pair.rejected, pair.strength, pair.margin) for pair in result.rows]
    assert found == [("a", "b", 2.0, 2.0), ("b", "a", 3.0, 3.0)]
    assert (result.counts["signed_pairs"], result.counts["ties"], result.counts["pairs"]) == (3, 1, 2)
    assert (result.faults, result.unused) == ([], {"preference_statement": 3})


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"preference_strength": 4}, "preference_strength", "4 is not a number from -3 to 3"),
        ({"preference_strength": "2"}, "preference_strength", "'2' is not a number from -3 to 3"),
        ({"preference_strength": float("nan")}, "preference_strength", "nan is not a number from -3 to 3"),
        ({"preference_strength": None}, "preference_strength", "null; wanted"),
        ({"response_2": "a"}, "response_1", "equal to response_2"),
        ({"response_2": " "}, "response_2", "empty"),
    ],
)
def test_signed_strengths_that_say_nothing(change: dict[str, Any], field: str, reason: str) -> None:
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1, **change}
    found = table(row).faults
    assert [fault.field for fault in found] == [field]
    assert reason in found[0].reason


def test_rankings_have_no_soft_labels() -> None:
    """A probability speaks of two answers; beside K of them the column is named as not read."""
    result = table({"prompt": "p", "completions": ["a", "b", "c"], "rank": [1, 2, 3], "preference": 0.9})
    assert result.unused == {"preference": 1}
    assert result.counts["soft_labels"] == 0


def test_columns_that_are_not_read_are_named() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert table({**row, "strenght": 0.5}, {**row, "id": 1, "strenght": 1}).unused == {"strenght": 2, "id": 1}


def test_null_fields_of_parquet_messages_are_left_out() -> None:
    padded = [{**message, "tool_calls": None} for message in (USER, YES)]
    pair = table({"prompt": padded[:1], "chosen": padded[1:], "rejected": "No."}).rows[0]
    assert pair.prompt == [USER]
    assert pair.chosen == [YES]


def test_answers_that_repeat_a_prompt_of_text_are_counted() -> None:
    result = table(
        {"prompt": "Q: ", "chosen": "Q: a", "rejected": "Q: b"}, {"prompt": "Q", "chosen": "Q", "rejected": "b"}
    )
    assert result.counts["prompt_repeated"] == 1
