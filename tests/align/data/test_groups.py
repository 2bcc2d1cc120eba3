"""Groups of answers: what is read, what is set aside and why, and what a model gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from align.data.groups import GroupRules, GroupTable, describe_groups, read_groups, tokenize_groups
from align.data.report import show_masks
from align.data.splits import read_split
from align.errors import AlignError

USER = {"role": "user", "content": "Sky?"}
ROW = {"prompt": "Q:", "completions": [" a", " b", " c"], "scores": [0.5, -1, 0.5], "win_rates": [0.6, 0.2, 0.7]}
ALL = GroupRules("scores")
Read = Callable[..., GroupTable]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def written(*rows: dict[str, Any]) -> str:
        path = tmp_path / "groups.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return written


def without(*names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name not in names} | more


def test_text_and_messages(write: Callable[..., str]) -> None:
    """Text of an answer to messages becomes a message; the column that is not learnt may be missing."""
    table = read_groups(write(ROW, without("win_rates", prompt=[USER], extra=1)), ALL)
    assert table.faults == []
    text, talk = table.rows
    assert (text.prompt, text.completions, text.scores, text.win_rates) == tuple(ROW.values())
    assert talk.completions[1] == [{"role": "assistant", "content": " b"}]
    assert talk.win_rates is None
    assert (table.counts["groups"], table.counts["answers"]) == (2, 6)
    assert table.unused == {"extra": 1}


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (without("scores"), "scores", "missing: the row has prompt, completions, win_rates"),
        (without(scores=[1, 2]), "scores", "not a list of 3 numbers, one an answer"),
        (without(scores=[1, 2, None]), "scores", "number 3 is None, not a finite number"),
        (without(scores=[1, True, 2]), "scores", "number 2 is True"),
        (without(scores=[1, float("nan"), 2]), "scores", "number 2 is nan"),
        (without(scores=[1, 2e6, 2]), "scores", "2e+06 is beyond 1e+06"),
        (without(win_rates=[0.5, 1.5, 0]), "win_rates", "number 2 is 1.5: a win rate is in [0, 1]"),
        (without("prompt"), "prompt", "missing"),
        (without(prompt=""), "prompt", "empty prompt"),
        (without(completions=[" a"], scores=[1], win_rates=[1]), "completions", "not a list of two answers or more"),
        (without(completions=[" a", "", " c"]), "completions 2", "empty completion"),
        (without(completions=[" a", 3, " c"]), "completions 2", "a number, not text or chat messages"),
        (without(completion_ids=[[1], [2], [3]]), "prompt_ids", "missing"),
        (without(prompt_ids=[1], completion_ids=[[1], [2]]), "completion_ids", "not a list of 3 lists of token ids"),
        (without(prompt_ids=[1], completion_ids=[[1], [], [2]]), "completion_ids 2", "not a list of token ids"),
        (without(prompt_ids=["a"], completion_ids=[[1], [1], [2]]), "prompt_ids", "not a list of token ids"),
        (
            {"prompt": "p", "completions": [" a", " b"], "scores": [1, 2]},
            "completions",
            "2 answers, and the rows before have 3: give every prompt as many",
        ),
    ],
)
def test_what_is_set_aside(write: Callable[..., str], row: dict[str, Any], field: str, reason: str) -> None:
    table = read_groups(write(ROW, row), ALL)
    (fault,) = table.faults
    assert (fault.row, fault.field) == (2, field)
    assert reason in fault.reason
    assert table.counts["set_aside"] == 1


def test_best_and_worst(write: Callable[..., str]) -> None:
    """The first of equal ones; by the column that is learnt; a prompt whose answers are worth the same is left out."""
    source = write(ROW, without(scores=[1, 1, 1]))
    table = read_groups(source, GroupRules("scores", "best_and_worst"))
    (row,) = table.rows
    assert (row.completions, row.scores, row.win_rates) == ([" a", " b"], [0.5, -1], [0.6, 0.2])
    assert row.compared == 3
    assert table.counts["ties"] == 1
    assert "1: best and worst are worth the same; left out" in describe_groups(table)
    by_rate = read_groups(source, GroupRules("win_rates", "best_and_worst"))
    assert [row.completions for row in by_rate.rows] == [[" c", " b"]] * 2


def test_the_fingerprint_is_of_all_that_is_learnt(write: Callable[..., str]) -> None:
    found = set()
    for row in (ROW, without(scores=[0.5, -1, 0.4]), without(win_rates=[0.6, 0.2, 0.8]), without(prompt="R:")):
        found.add(read_groups(write(row), ALL).fingerprint())
    assert len(found) == 4


def test_text_is_tokenised_as_answers_of_pairs_are(
    tiny_tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]
) -> None:
    """Each answer with one end token; what is over the limit is cut, and has none."""
    split = read_split(write(ROW), tiny_tokenizer, 100, kind="groups", rules=ALL)
    (row,) = split.tokenized.rows
    assert tiny_tokenizer.decode(row.input_ids) == "Q:"
    assert [tiny_tokenizer.decode(ids) for ids in row.answer_ids] == [f" {x}<|im_end|>" for x in "abc"]  # type: ignore[attr-defined]
    data = split.dataset()
    assert data.column_names == ["prompt_ids", "answer_ids", "row_id", "compared", "scores", "win_rates"]
    assert (data[0]["scores"], data[0]["compared"]) == ([0.5, -1.0, 0.5], 3)
    short = tokenize_groups(read_groups(write(ROW), ALL).rows, tiny_tokenizer, 4)
    assert short.counts["truncated_completions"] == 2, "' a' is one token, ' b' and ' c' are two"
    console = Console(width=100, force_terminal=False, record=True)
    console.print(show_masks(split.tokenized, tiny_tokenizer))
    assert "prompt 2 · answer 1 2 · answer 2 3 · answer 3 3 tokens" in console.export_text()


def test_ids_are_taken_as_they_were_drawn(tiny_tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    """An answer that was cut has no end token, an empty one is the end token, and halves of a character stay.

    The text of a half is U+FFFD, whose own tokens are three others.
    """
    end = tiny_tokenizer.eos_token_id
    half = tiny_tokenizer("é")["input_ids"][0]
    drawn = [[half], [end], tiny_tokenizer(" c")["input_ids"]]
    texts = [tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    assert texts == ["�", "", " c"]
    row = without(completions=texts, prompt=[USER], prompt_ids=[5, 6, 7], completion_ids=drawn)
    table = read_groups(write(row), ALL)
    assert table.faults == []
    found = tokenize_groups(table.rows, tiny_tokenizer, 4)
    assert found.rows[0].input_ids == [5, 6, 7]
    assert found.rows[0].answer_ids == [[half], [end], drawn[2][:1]]
    assert (found.counts["as_drawn"], found.counts["truncated_completions"]) == (1, 1)
    picture = describe_groups(table, tiny_tokenizer, 4)
    assert "1 groups with the ids of their model" in picture
    assert "cuts 1 answers" in picture


@pytest.mark.parametrize(
    ("prompt_ids", "answer", "limit", "field", "reason"),
    [
        ([5], [5], 9, "completion_ids 1", "not the answer in this model's tokens"),
        ([2**31 - 1], None, 9, "prompt_ids", "is no token of this model"),
        ([5, 6], None, 2, "prompt_ids", "2 tokens, over data.max_length 2 before any answer"),
    ],
)
def test_ids_that_do_not_fit(
    tiny_tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., str],
    prompt_ids: list[int],
    answer: list[int] | None,
    limit: int,
    field: str,
    reason: str,
) -> None:
    drawn = [tiny_tokenizer(text)["input_ids"] for text in (" a", " b", " c")]
    row = without(prompt_ids=prompt_ids, completion_ids=[answer or drawn[0], *drawn[1:]])
    found = tokenize_groups(read_groups(write(row, ROW), ALL).rows, tiny_tokenizer, limit)
    fault = found.faults[0]
    assert fault.field == field
    assert reason in fault.reason


def test_nothing_to_learn_from(tiny_tokenizer: PreTrainedTokenizerFast, write: Callable[..., str]) -> None:
    rules = GroupRules("scores", "best_and_worst")
    split = read_split(write(without(scores=[1, 1, 1])), tiny_tokenizer, 100, kind="groups", rules=rules)
    with pytest.raises(AlignError, match="nothing to learn from: its 1 rows are ties or set aside"):
        split.check(0.05)
