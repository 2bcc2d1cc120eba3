"""Answers to imitate: what is read, what is scored, and what TRL's SFTTrainer makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from align.data.completions import read_completions
from align.data.rows import CompletionTable
from align.data.tokenize import tokenize_completions

USER = {"role": "user", "content": "Sky?"}
UP = {"role": "assistant", "content": "Up"}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., CompletionTable]:
    def read_rows(*rows: dict[str, Any]) -> CompletionTable:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_completions(str(path))

    return read_rows


@pytest.mark.parametrize(
    ("row", "kind", "prompt", "completion"),
    [
        ({"prompt": "Q:", "completion": " a"}, "prompt_completion", "Q:", " a"),
        ({"prompt": [USER], "completion": "Up"}, "prompt_completion", [USER], [UP]),
        ({"prompt": "Sky?", "completion": [USER, UP]}, "prompt_completion", [USER], [UP]),
        ({"messages": [USER, UP, USER, UP]}, "messages", [USER, UP, USER], [UP]),
        ({"text": "All of it."}, "text", "", "All of it."),
        ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, "chosen", "Q:", " a"),
        ({"chosen": [USER, UP], "rejected": [USER, {**UP, "content": "No"}]}, "chosen", [USER], [UP]),
    ],
)
def test_kinds_of_rows(
    read: Callable[..., CompletionTable], row: dict[str, Any], kind: str, prompt: Any, completion: Any
) -> None:
    table = read(row)
    assert table.faults == []
    assert (table.rows[0].prompt, table.rows[0].completion) == (prompt, completion)
    assert (table.counts[kind], table.counts["rows"], table.counts["completions"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        (
            {"question": "x"},
            "prompt",
            "missing: the row has question; wanted prompt, completion; or messages; or text",
        ),
        ({"prompt": "Q", "completion": ""}, "completion", "empty completion"),
        ({"prompt": "Q", "completion": None}, "completion", "null; wanted prompt, completion"),
        ({"messages": [USER]}, "messages", "1 message: wanted a prompt and an assistant turn"),
        ({"messages": [UP, USER]}, "prompt", "ends in an assistant turn"),
        ({"messages": [USER, UP, USER]}, "prompt", "ends in an assistant turn"),
        ({"messages": [USER, USER]}, "messages", "ends in a user turn"),
        ({"messages": "text"}, "messages", "text: name the field text"),
        ({"text": [USER, UP]}, "text", "messages: name the field messages"),
        ({"text": " "}, "text", "empty completion"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "chosen", "equal to rejected"),
    ],
)
def test_faults(read: Callable[..., CompletionTable], row: dict[str, Any], field: str, reason: str) -> None:
    table = read(row)
    assert (table.rows, table.counts["set_aside"]) == ([], 1)
    assert table.faults[0].field == field
    assert table.faults[0].reason.startswith(reason)


def test_rows_share_the_rules_of_pairs(
    read: Callable[..., CompletionTable], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Limit 8: "Q1:" has 3 tokens and leaves 5; "Say t" + "he" begins its answer before the "t"."""
    table = read(
        {"prompt": "Q1:", "completion": "up<|im_end|>\n"},
        {"prompt": "Q1:", "completion": "downwards"},
        {"prompt": "Say t", "completion": "he"},
        {"text": "up"},
        {"prompt": "12345678", "completion": "9"},
    )
    result = tokenize_completions(table.rows, tiny_tokenizer, 8)
    shown = [(tiny_tokenizer.decode(row.input_ids), row.completion_mask) for row in result.rows]
    assert shown == [
        ("Q1:up<|im_end|>", [0, 0, 0, 1, 1, 1]),
        ("Q1:downw", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("Say the<|im_end|>", [0, 0, 0, 1, 1]),
        ("up<|im_end|>", [1, 1, 1]),
    ]
    assert [(fault.row, fault.field) for fault in result.faults] == [(5, "prompt")]
    assert result.counts == {
        "completions": 4,
        "set_aside": 1,
        "truncated_completion": 1,
        "boundary_moved": 1,
        "eos_inside": 0,
    }


def test_sft_trainer_learns_the_answers_and_nothing_else(
    read: Callable[..., CompletionTable],
    tiny_tokenizer: PreTrainedTokenizerFast,
    make_tiny_model: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
) -> None:
    """With the trainer's defaults, under which it would not read completion_mask."""
    table = read({"messages": [USER, UP]}, {"prompt": "Q1:", "completion": "downwards"})
    tokenized = tokenize_completions(table.rows, tiny_tokenizer, 32)
    args = SFTConfig(output_dir=str(tmp_path), max_length=32, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(make_tiny_model(), args, train_dataset=tokenized.dataset(), processing_class=tiny_tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    learnt = [tiny_tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == ["Up<|im_end|>", "downwards<|im_end|>"]
