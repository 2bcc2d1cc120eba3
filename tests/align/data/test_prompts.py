"""Prompts to answer: from prompts and from pairs, with reference rewards that are there or a fault."""

from __future__ import annotations

import copy
import json

import pytest

from align.data.prompts import ROW_ID, describe_prompts, read_prompts, tokenize_prompts, unpacked
from align.data.tokenize import encode_prompt
from align.errors import AlignError

CHAT = [{"role": "user", "content": "Say it"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_pairs_and_repeats(tmp_path):
    source = write(
        tmp_path / "rows.jsonl",
        {"prompt": CHAT},
        {"prompt": CHAT, "chosen": "yes", "rejected": "no"},
        {"prompt": "the cat", "other": 1},
    )
    table = read_prompts(source)
    assert [row.prompt for row in table.rows] == [CHAT, "the cat"]
    assert table.counts == {"rows": 3, "prompts": 2, "set_aside": 0, "duplicates": 1}
    assert table.unused == {"chosen": 1, "rejected": 1, "other": 1}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": " "}, "prompt", "empty prompt"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "It"}]}, "prompt", "ends in an assistant turn"),
        ({"prompt": "a"}, "usual", "missing"),
        ({"prompt": "a", "usual": None}, "usual", "null"),
        ({"prompt": "a", "usual": "high"}, "usual", "not a number"),
        ({"prompt": "a", "usual": True}, "usual", "not a finite number"),
        ({"prompt": "a", "usual": float("nan")}, "usual", "not a finite number"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, field, reason):
    table = read_prompts(write(tmp_path / "rows.jsonl", row, {"prompt": "b", "usual": 1}), ["usual"])
    assert len(table.rows) == 1
    assert (table.faults[0].field, table.faults[0].row) == (field, 1)
    assert reason in table.faults[0].reason


def test_references_are_columns_and_in_the_fingerprint(tmp_path, tiny_tokenizer):
    """Of a CSV file they are text, and numbers here."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,usual\nthe cat,0.5\nan ant,-2\n")
    table = read_prompts(str(path), ["usual"])
    dataset = tokenize_prompts(table.rows, tiny_tokenizer, 64, answer=8).dataset()
    first, second = (row.row_id for row in table.rows)
    assert dataset[ROW_ID][:] == [first, second]
    assert [unpacked(row) for row in dataset] == [
        {"prompt": "the cat", "usual": 0.5},
        {"prompt": "an ant", "usual": -2.0},
    ]
    before = table.fingerprint()
    path.write_text("prompt,usual\nthe cat,0.6\nan ant,-2\n")
    assert read_prompts(str(path), ["usual"]).fingerprint() != before
    assert "usual           -2 to 0.5" in describe_prompts(table, tiny_tokenizer)


def test_columns_that_rules_ask_for_tell_prompts_apart_and_are_in_the_fingerprint(tmp_path, tiny_tokenizer):
    """The same prompt with another value is another prompt, with the same value a repeat; ``note`` nobody asks for."""
    rows = [{"prompt": "a", "wanted": 1}, {"prompt": "a", "wanted": 2}, {"prompt": "a", "wanted": 2, "note": "x"}]
    asked = {"wanted": "m:near", "hint": None}
    table = read_prompts(write(tmp_path / "rows.jsonl", *rows), columns=asked)
    assert [row.columns for row in table.rows] == [{"wanted": 1}, {"wanted": 2}]
    assert table.counts["duplicates"] == 1
    assert table.unused == {"note": 1}
    dataset = tokenize_prompts(table.rows, tiny_tokenizer, 64).dataset()
    assert [(row["prompt"], row["wanted"]) for row in map(unpacked, dataset)] == [("a", 1), ("a", 2)]
    rows[0]["wanted"] = 3
    assert read_prompts(write(tmp_path / "rows.jsonl", *rows), columns=asked).fingerprint() != table.fingerprint()
    (fault,) = read_prompts(write(tmp_path / "rows.jsonl", *rows, {"prompt": "b"}), columns=asked).faults
    assert (fault.field, fault.reason) == ("wanted", "missing, and m:near asks for it")


def test_a_rule_that_takes_every_column_gets_them(tmp_path, tiny_tokenizer):
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "solution": "1"}, {"prompt": "b", "other": 2.5})
    table = read_prompts(source, every=True)
    found = [unpacked(row) for row in tokenize_prompts(table.rows, tiny_tokenizer, 64).dataset()]
    assert [(row["solution"], row["other"]) for row in found] == [("1", None), (None, 2.5)]
    assert table.unused == {}


def test_columns_are_what_the_rows_say(tmp_path, tiny_tokenizer):
    """Of several JSON types, which Arrow refuses; of mappings with other keys, which it would make alike."""
    values = [5, "five", {"k": 1}, {"k": []}, {"j": 2.5}, [1, "a"], None, True]
    rows = [{"prompt": f"ask {n}", "solution": value} for n, value in enumerate(values)]
    table = read_prompts(write(tmp_path / "rows.jsonl", *rows), columns={"solution": "m:solved"})
    found = [unpacked(row)["solution"] for row in tokenize_prompts(table.rows, tiny_tokenizer, 64).dataset()]
    assert [(type(one), one) for one in found] == [(type(one), one) for one in values]


def test_room_for_the_answer(tmp_path, tiny_tokenizer):
    """Bytes are tokens: "abcd" has 4 and fits 12 with 8 for the answer, "abcde" does not."""
    table = read_prompts(write(tmp_path / "rows.jsonl", {"prompt": "bcdf"}, {"prompt": "bcdfg"}))
    found = tokenize_prompts(table.rows, tiny_tokenizer, 12, answer=8)
    assert [row.prompt for row in found.rows] == ["bcdf"]
    assert found.faults[0].reason == "5 tokens, over 4: data.max_length 12 less 8 for the answer"


def test_text_and_messages_in_one_source(tmp_path, tiny_tokenizer):
    """TRL reads a batch by its first prompt, and Arrow refuses the column: what is not as the first is set aside."""
    rows = read_prompts(write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": CHAT}, {"prompt": "b"})).rows
    found = tokenize_prompts(rows, tiny_tokenizer, 64)
    assert found.dataset()["prompt"][:] == ["a", "b"]
    ((row, field, reason),) = [(fault.row, fault.field, fault.reason) for fault in found.faults]
    assert (row, field) == (2, "prompt")
    assert reason == "messages, and the first prompt is text: write all of them as one or the other"
    assert (
        tokenize_prompts(rows[1:], tiny_tokenizer, 64).faults[0].reason.startswith("text, and the first prompt is m")
    )


def test_a_prompt_that_the_template_refuses_costs_that_row(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tiny_tokenizer.chat_template
    )
    refused = [{"role": "system", "content": "Be brief."}, *CHAT]
    rows = read_prompts(write(tmp_path / "rows.jsonl", {"prompt": refused}, {"prompt": CHAT})).rows
    found = tokenize_prompts(rows, tokenizer, 64)
    assert [fault.reason for fault in found.faults] == ["refused by the chat template: no system turns"]
    assert [row.input_ids for row in found.rows] == [encode_prompt(CHAT, tokenizer)]


@pytest.mark.parametrize("name", ["prompts", "completions", "completion", "completion_ids", "trainer_state"])
def test_columns_with_the_names_of_what_trl_gives_rewards(tmp_path, name):
    """Left out for a rule that takes all columns; an error for a recipe or a rule that asks for this one."""
    source = write(tmp_path / "rows.jsonl", {"prompt": "a", name: 1, "note": 2})
    table = read_prompts(source, every=True)
    assert table.rows[0].columns == {"note": 2}
    assert table.unused == {name: 1}
    for asked in ({"references": [name]}, {"columns": {name: "rules:own"}}):
        with pytest.raises(AlignError, match=rf"rows\.jsonl: grpo\.rewards asks for column {name}, and TRL gives"):
            read_prompts(source, **asked)
