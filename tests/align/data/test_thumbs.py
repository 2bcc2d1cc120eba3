"""Answers with thumbs: what is read, what is set aside and why, and what a model gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from align.data.splits import read_split
from align.data.thumbs import ThumbTable, check_both_thumbs, describe_thumbs, read_thumbs, tokenize_thumbs
from align.errors import AlignError

USER = {"role": "user", "content": "Sky?"}
UP = {"role": "assistant", "content": "Up"}
NO = {"role": "assistant", "content": "No"}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ThumbTable]:
    def read_written(*rows: dict[str, Any]) -> ThumbTable:
        path = tmp_path / "thumbs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_thumbs(str(path))

    return read_written


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "Q:", "completion": " a", "label": True}, [("Q:", " a", True)]),
        ({"prompt": "Q:", "completion": " a", "label": 0}, [("Q:", " a", False)]),
        ({"prompt": [USER], "completion": [UP], "label": 1}, [([USER], [UP], True)]),
        ({"prompt": [USER], "completion": "Up", "label": False}, [([USER], [UP], False)]),
        ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, [("Q:", " a", True), ("Q:", " b", False)]),
        ({"chosen": [USER, UP], "rejected": [USER, NO]}, [([USER], [UP], True), ([USER], [NO], False)]),
    ],
)
def test_kinds_of_rows(read: Callable[..., ThumbTable], row: dict[str, Any], wanted: list[Any]) -> None:
    table = read(row)
    assert table.faults == []
    assert [(r.prompt, r.completion, r.label) for r in table.rows] == wanted


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "p", "completion": "a"}, "label", "missing: the row has prompt, completion; wanted prompt, comp"),
        ({"prompt": "p", "completion": "a", "label": None}, "label", "null"),
        ({"prompt": "p", "completion": "a", "label": 2}, "label", "2 is not true or 1 (thumb up), false or 0"),
        ({"prompt": "p", "completion": "a", "label": 1.0}, "label", "1.0 is not true or 1"),
        ({"prompt": "p", "completion": "a", "label": "true"}, "label", "'true' is not true or 1"),
        ({"prompt": "p", "completion": "", "label": True}, "completion", "empty completion"),
        ({"prompt": "", "completion": "a", "label": True}, "prompt", "empty prompt"),
        ({"completion": "a", "label": True}, "prompt", "missing"),
        ({"prompt": "p", "label": True}, "completion", "missing"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen", "equal to rejected"),
    ],
)
def test_faults_name_file_row_and_field(
    read: Callable[..., ThumbTable], row: dict[str, Any], field: str, reason: str
) -> None:
    table = read({"prompt": "p", "completion": "a", "label": True}, row)
    (fault,) = table.faults
    assert (Path(fault.source).name, fault.row, fault.field) == ("thumbs.jsonl", 2, field)
    assert fault.reason.startswith(reason)
    assert table.counts["set_aside"] == 1


def test_a_pair_that_is_not_sure_gives_no_thumbs(read: Callable[..., ThumbTable]) -> None:
    """Of preferences 0.3, 1, 0 and none, the first alone is set aside; 0 says that rejected is the better one."""
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    table = read({**pair, "preference": 0.3}, {**pair, "preference": 1}, {**pair, "preference": 0}, pair)
    assert [(fault.row, fault.field) for fault in table.faults] == [(1, "preference")]
    assert "thumbs are sure" in table.faults[0].reason
    assert "preference" not in table.unused
    thumbs = [(row.completion, row.label) for row in table.rows]
    assert thumbs == [("good", True), ("bad", False), ("good", False), ("bad", True), ("good", True), ("bad", False)]


def test_labels_of_a_csv_file_are_text(tmp_path: Path) -> None:
    path = tmp_path / "thumbs.csv"
    path.write_text("prompt,completion,label\np,a,TRUE\np,b,0\np,c,yes\n")
    table = read_thumbs(str(path))
    assert [row.label for row in table.rows] == [True, False]
    assert [(fault.row, fault.field) for fault in table.faults] == [(3, "label")]


def test_counts_and_fingerprint_see_the_label(read: Callable[..., ThumbTable]) -> None:
    """Four answers from three good rows: a up twice (a duplicate), a down (a contradiction), b down."""
    a, b = {"prompt": "p", "completion": "a"}, {"prompt": "p", "completion": "b"}
    rows = [{**a, "label": True}, {"prompt": "p", "chosen": "a", "rejected": "b"}, {**a, "label": 0, "who": "me"}]
    table = read(*rows)
    assert table.counts == {
        "rows": 3,
        "completions": 4,
        "set_aside": 0,
        "labelled": 2,
        "unpaired": 1,
        "up": 2,
        "down": 2,
        "duplicates": 1,
        "contradictions": 1,
    }
    assert table.unused == {"who": 1}
    before = table.fingerprint()
    assert read(*rows).fingerprint() == before
    rows[2]["label"] = 1
    assert read(*rows).fingerprint() != before
    assert read({**b, "label": 1}).rows[0].row_id != read({**b, "label": 0}).rows[0].row_id


def test_token_ids(read: Callable[..., ThumbTable], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompt and answer put together are the text; the answer ends in the end token, once."""
    table = read({"prompt": "the inner", "completion": " thing", "label": 1}, {"prompt": "x" * 50, "completion": "y"})
    tokenized = tokenize_thumbs(table.rows, tiny_tokenizer, 32)
    (row,) = tokenized.dataset()
    assert tiny_tokenizer.decode(row["prompt_ids"]) == "the inner"
    assert tiny_tokenizer.decode(row["completion_ids"]) == " thing<|im_end|>"
    assert row["label"] is True


def test_a_split_names_the_thumb_that_is_missing(
    read: Callable[..., ThumbTable], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    table = read({"prompt": "p", "completion": " a", "label": True}, {"prompt": "p", "completion": " b", "label": 1})
    split = read_split(table.source, tiny_tokenizer, 32, kind="thumbs")
    with pytest.raises(AlignError, match=r"thumbs\.jsonl: no thumb down among 2 thumbs up"):
        split.check(0.05)
    with pytest.raises(AlignError, match="no thumb up among 1 thumbs down"):
        check_both_thumbs([False], "x")


def test_facts_of_a_split(read: Callable[..., ThumbTable], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    table = read({"prompt": "p", "chosen": " a", "rejected": " b"}, {"prompt": "p", "completion": "", "label": 1})
    split = read_split(table.source, tiny_tokenizer, 32, kind="thumbs")
    facts = split.facts
    assert (facts["up"], facts["down"], facts["completions"], facts["set_aside"]) == (1, 1, 2, 1)
    assert [row.label for row in split.used] == [True, False]


def test_description(read: Callable[..., ThumbTable], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    table = read({"prompt": "p", "chosen": " a", "rejected": " b"}, {"prompt": "p", "completion": " a", "label": 0})
    lines = describe_thumbs(table, tiny_tokenizer, 32).splitlines()
    assert lines[0].endswith("thumbs.jsonl: 2 rows, 3 completions")
    assert lines[1:3] == [
        "  kinds of rows   1 labelled rows · 1 pairs, unpaired",
        "  thumbs          1 up · 2 down · 1 answers with both",
    ]
