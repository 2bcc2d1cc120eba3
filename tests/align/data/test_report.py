"""What a user reads about the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from align.data.completions import read_completions
from align.data.pairs import pair_table
from align.data.report import check_fraction, describe, fault_report, show_masks, write_rejected
from align.data.rows import Fault, PairTable
from align.data.tokenize import tokenize_completions, tokenize_pairs
from align.errors import AlignError

FAULTS = [
    Fault("data/pairs.jsonl", 17, "rejected", "empty completion: drop the row", {"prompt": "p"}),
    Fault("data/pairs.jsonl", 90, "chosen", "equal to rejected", {"when": Path("x")}),
    Fault("data/pairs.jsonl", 311, "prompt", "1,902 tokens, over data.max_length 1,024", None),
    Fault("data/pairs.jsonl", 1204, "prompt", "1,911 tokens, over data.max_length 1,024", "\ud83d"),
    Fault("data/pairs.jsonl", 90, "strength", "2 is not in (0, 1]", {"when": Path("x")}),
]


def table(*rows: dict[str, Any]) -> PairTable:
    return pair_table((("data.jsonl", number, row) for number, row in enumerate(rows, start=1)), "data.jsonl")


def printed(renderable: Any) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_fault_report_groups_rows_of_one_kind() -> None:
    assert fault_report(FAULTS, 1204, "runs/a/rejected_rows.jsonl").splitlines() == [
        "data/pairs.jsonl: 4 of 1,204 rows cannot be used (set aside in runs/a/rejected_rows.jsonl)",
        "  row 17           rejected  empty completion: drop the row",
        "  row 90           chosen    equal to rejected",
        "  rows 311, 1,204  prompt    1,902 tokens, over data.max_length 1,024",
        "  row 90           strength  2 is not in (0, 1]",
    ]


def test_fault_report_of_many_rows_and_files() -> None:
    faults = [Fault(name, row, "line", "broken JSON", "{") for name in ("a.jsonl", "b.jsonl") for row in range(1, 6)]
    assert fault_report(faults, 20).splitlines() == [
        "2 files: 10 of 20 rows cannot be used",
        "  a.jsonl rows 1, 2, 3 and 2 more  line  broken JSON",
        "  b.jsonl rows 1, 2, 3 and 2 more  line  broken JSON",
    ]
    kinds = [Fault("a.jsonl", row, f"completions {chr(96 + row)}", "empty", {}) for row in range(1, 26)]
    assert fault_report(kinds, 30).splitlines()[-1] == "  and 5 more kinds of fault"


def test_rejected_rows_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rejected_rows.jsonl"
    for faults in (FAULTS, FAULTS[:3]):
        write_rejected(path, faults)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["source"], line["row"], line["field"], line["reason"]) for line in lines] == [
            (fault.source, fault.row, fault.field, fault.reason) for fault in faults
        ]
        assert lines[0]["content"] == {"prompt": "p"}
    assert list(path.parent.iterdir()) == [path]


def test_check_fraction_counts_rows_not_faults() -> None:
    """Five faults in four rows: 4 of 80 is 5 %, not more."""
    check_fraction(FAULTS, 80, 0.05)
    check_fraction([], 10, 0.0)
    with pytest.raises(AlignError) as caught:
        check_fraction(FAULTS, 79, 0.05)
    assert str(caught.value).startswith("data/pairs.jsonl: 4 of 79 rows cannot be used\n  row 17")
    assert "5.1 % of the rows is over data.max_bad_fraction 0.05" in str(caught.value)
    with pytest.raises(AlignError):
        check_fraction(FAULTS, 4, 1.0)


@pytest.fixture
def mixed() -> PairTable:
    one = {"prompt": "Q1:", "chosen": " 12345", "rejected": " no"}
    return table(
        one,
        one,
        {**one, "chosen": " no", "rejected": " 12345", "strength": 0.5},
        {"prompt": "Say t", "chosen": "he", "rejected": "is", "id": 3},
        {"chosen": "a b", "rejected": "a c"},
        {"prompt": "Q1:", "completions": ["a", "b", "c"], "rank": [1, 1, 2]},
        {"prompt": "Q1:", "chosen": "", "rejected": "b"},
        {"prompt": "12345678", "chosen": "a", "rejected": "b"},
    )


def test_describe_says_it_all(mixed: PairTable, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Eight pairs; chosen is longer in rows 1 and 2, shorter in row 3.

    At limit 8 the " 12345" of rows 1 to 3 (7 tokens with its end, after 3 of the prompt) is cut twice in chosen and
    once in rejected, and "12345678" leaves no room.
    """
    lines = [" ".join(line.split()) for line in describe(mixed, tiny_tokenizer, 8).splitlines()]
    assert lines[:10] == [
        "data.jsonl: 8 rows, 8 pairs",
        "kinds of rows 5 with prompt · 1 with the prompt inside the answers · 1 ranked · 1 set aside",
        "duplicates 1 (rows 1 and 2)",
        "contradictions 1 (rows 1 and 3)",
        "ties 1 (of rank, of rating or in a judgement: no pair)",
        "not read columns id (1)",
        "strength 0.5 to 1, median 1",
        "longer answer chosen in 25 % of the pairs, rejected in 12 % (characters)",
        "max_length 8 cuts 2 chosen and 1 rejected answers; sets aside 1",
        "boundary moved 1 (answer begins before the prompt's end)",
    ]
    assert "chosen 1 1 2 6 6" in lines  # characters: 1, 1, 1, 2, 2, 3, 6, 6
    assert lines[-3:] == [
        "data.jsonl: 2 of 8 rows cannot be used",
        "row 7 chosen empty completion: there is nothing to learn from; drop the row or fix the export",
        "row 8 prompt 8 tokens, over data.max_length 8 before any answer: raise it or shorten the prompt",
    ]


def test_soft_labels_are_described(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """.2, .6 and .9 of four pairs: the middle is .6, and one is under 1/2."""
    rows = [{"prompt": "Q1:", "chosen": "a", "rejected": "b", "preference": p} for p in (0.9, 0.2, 0.6, None)]
    text = " ".join(describe(table(*rows)).split())
    assert "preference 3 of 4 pairs: 0.2 to 0.9, median 0.6 · under 1/2 in 1: chosen is the less preferred" in text
    assert "preference 0.9 to 0.9, median 0.9 longer answer" in " ".join(describe(table(rows[0])).split())
    assert "preference" not in describe(table(rows[3]))
    tokenized = tokenize_pairs(table(*rows).rows, tiny_tokenizer, None)
    masks = printed(show_masks(tokenized, tiny_tokenizer))
    assert "strength 1 · preference 0.2 ·" in masks
    assert masks.count("· preference") == 3


def test_describe_without_tokenizer_or_pairs(mixed: PairTable) -> None:
    assert "tokens" not in describe(mixed)
    assert describe(table({"prompt": 1})).startswith("data.jsonl: 1 row, 0 pairs\n")


def test_describe_completions(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q1:", "completion": "12345"}\n{"text": "up"}\n')
    text = describe(read_completions(str(path)), tiny_tokenizer, 6)
    assert text.splitlines()[0] == f"{path}: 2 rows, 2 completions"
    assert "1 with prompt and completion · 1 plain text" in text
    assert "cuts 1 completion answers" in text


def test_masks_are_legible_without_colour(mixed: PairTable, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lines = printed(show_masks(tokenize_pairs(mixed.rows, tiny_tokenizer, 8), tiny_tokenizer, n=1)).splitlines()
    assert lines[0].startswith("prompt: not scored · answers: scored")
    assert lines[2] == f"1  prompt 3 · chosen 5 · rejected 4 tokens · strength 1 · {mixed.rows[0].row_id}"
    assert lines[3:] == ["  prompt     Q1:", "  chosen      1234[cut, no end]", "  rejected    no[<|im_end|>]"]


def test_masks_show_markup_line_ends_and_long_texts_as_they_are(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = table({"prompt": "[red]a\nb", "chosen": "x" * 900, "rejected": "y"}).rows
    text = printed(show_masks(tokenize_pairs(rows, tiny_tokenizer, None), tiny_tokenizer))
    assert "[red]a\\nb" in text
    assert " ... " in text
    assert text.count("x") == 600


def test_masks_of_completions(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Q1:", "completion": "up"}\n{"text": "all"}\n')
    tokenized = tokenize_completions(read_completions(str(path)).rows, tiny_tokenizer, None)
    lines = printed(show_masks(tokenized, tiny_tokenizer)).splitlines()
    assert lines[3:5] == ["  prompt     Q1:", "  completion up[<|im_end|>]"]
    assert lines[-1] == "  completion all[<|im_end|>]"


def test_masks_colour_what_is_scored(mixed: PairTable, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def styles(renderable: Any) -> Iterator[str]:
        for text in renderable.renderables:
            yield from (str(span.style) for span in text.spans)

    shown = set(styles(show_masks(tokenize_pairs(mixed.rows, tiny_tokenizer, 8), tiny_tokenizer, n=1)))
    assert {"dim", "green", "yellow", "bold red"} <= shown
