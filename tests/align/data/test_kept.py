"""Tokens kept in a file say what fresh ones say, for exactly what they were made of, and never what is torn."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import models
from tokenizers.processors import TemplateProcessing

from align.data import encode, kept
from align.data.splits import Split, read_split
from align.data.tokenize import tokenize_pairs

CHAT = [{"role": "user", "content": "Sky?"}]
ROWS = [
    {"prompt": "the cat", "chosen": " is there", "rejected": " no"},
    {"prompt": "the cat a", "chosen": "n", "rejected": "t"},  # the end of the prompt moves
    {"prompt": "x" * 40, "chosen": "a", "rejected": "b"},  # no room
    {"prompt": "Q:", "chosen": "y" * 60, "rejected": "no"},  # cut
    {"prompt": CHAT, "chosen": "Up<|im_end|>a", "rejected": "No", "strength": 2.0},
    {"prompt": "Q:", "chosen": "y" * 60, "rejected": "y" * 61},  # equal once cut
    {"chosen": "a"},  # no pair
]


@pytest.fixture(autouse=True)
def keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few rows are kept too, in the test's own folder."""
    monkeypatch.setattr(kept, "WORTH_KEEPING", 1)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were tokenised, call by call."""
    calls: list[int] = []
    real = encode.Encoder.encode
    monkeypatch.setattr(encode.Encoder, "encode", lambda self, rows: calls.append(len(rows)) or real(self, rows))
    return calls


def seen(split: Split) -> tuple[Any, ...]:
    return split.tokenized, split.faults, split.facts, split.dataset().to_dict()


def test_a_second_read_is_the_first(source, tiny_tokenizer, keeps, encoded_rows, caplog):
    """Rows, faults with the content of their rows, counts, the warning and the columns; nothing is tokenised again."""
    caplog.set_level(logging.WARNING)
    first, second = (read_split(source, tiny_tokenizer, 32, kind="pairs") for _ in range(2))
    assert seen(first) == seen(second)
    assert first.tokenized.counts == {
        "pairs": 4,
        "set_aside": 2,
        "truncated_chosen": 1,
        "truncated_rejected": 0,
        "boundary_moved": 1,
        "eos_inside": 1,
    }
    assert [fault.row for fault in second.tokenized.faults] == [3, 6]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert warned[0] == warned[1]
    assert encoded_rows == [6]
    assert [path.suffix for path in keeps.iterdir()] == [".safetensors"]


def test_every_kind_of_data(tmp_path, tiny_tokenizer, encoded_rows):
    from align.data.groups import GroupRules
    from align.data.prompts import PromptRules
    from align.data.rewards import RewardRules

    rows: list[tuple[Any, Any, list[dict[str, Any]]]] = [
        ("completions", None, [{"prompt": "a", "completion": "b" * 40}, {"text": "the cat"}]),
        ("thumbs", None, [{"prompt": "a", "completion": c, "label": c == "b"} for c in ("b", "c")]),
        ("ratings", RewardRules(("good",)), [{"prompt": "a", "completion": "b" * 40, "good": 2}]),
        ("pairs", RewardRules(), [{"prompt": "a", "chosen": "b" * 40, "rejected": "c", "margin": 2}]),
        ("judgements", None, [{"prompt": "a", "chosen": "b", "rejected": "c", "annotator": "ann"}]),
        ("prompts", PromptRules((), 8), [{"prompt": "a"}, {"prompt": "b" * 60}]),
        ("groups", GroupRules("scores"), [{"prompt": "a", "completions": ["b", "c" * 50], "scores": [1, 0]}]),
    ]
    for number, (kind, rules, lines) in enumerate(rows):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        encoded_rows.clear()
        splits = [read_split(str(path), tiny_tokenizer, 32, kind=kind, rules=rules) for _ in range(2)]
        assert seen(splits[0]) == seen(splits[1]), kind
        assert len(encoded_rows) == 1, kind


def other_template(tokenizer: Any) -> None:
    tokenizer.chat_template += " "


def other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"


def other_beginning(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )


def another_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["cat"])


@pytest.mark.parametrize("change", [other_template, other_end, other_beginning, another_token])
def test_another_tokenizer_has_its_own(source, tiny_tokenizer, encoded_rows, change: Callable[[Any], None]):
    changed = copy.deepcopy(tiny_tokenizer)
    change(changed)
    for tokenizer in (tiny_tokenizer, changed, tiny_tokenizer, changed):
        read_split(source, tokenizer, 32, kind="pairs")
    assert encoded_rows == [6, 6]


def test_padding_and_truncation_of_a_call_are_not_the_tokenizer(source, tiny_tokenizer, encoded_rows):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    read_split(source, tokenizer, 32, kind="pairs")
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=4)
    read_split(source, tokenizer, 32, kind="pairs")
    assert encoded_rows == [6]


def test_what_else_decides(source, tiny_tokenizer, encoded_rows, monkeypatch, tmp_path):
    """Another limit, other rows, another order, another version of a library, and another day where it counts."""
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    read_split(source, tiny_tokenizer, 32, kind="pairs")
    read_split(source, tiny_tokenizer, 33, kind="pairs")
    for name in ("turned", "fewer"):
        read_split(str(tmp_path / f"{name}.jsonl"), tiny_tokenizer, 32, kind="pairs")
    with monkeypatch.context() as patch:
        patch.setattr(kept, "version", lambda name: "0")
        read_split(source, tiny_tokenizer, 32, kind="pairs")
    assert encoded_rows == [6, 6, 6, 5, 6]

    dated = copy.deepcopy(tiny_tokenizer)
    dated.chat_template = "{{ strftime_now('%d') }}" + tiny_tokenizer.chat_template
    encoded_rows.clear()
    for day in ("2024-01-01", "2024-01-02"):
        monkeypatch.setattr(kept, "date", type("", (), {"today": lambda day=day: kept_date(day)}))
        read_split(source, dated, 32, kind="pairs")
    assert encoded_rows == [6, 6]


def kept_date(day: str) -> Any:
    from datetime import date

    return date.fromisoformat(day)


def test_what_may_draw_or_is_someones_own_is_not_kept(source, tiny_tokenizer, keeps, encoded_rows):
    class Own(type(tiny_tokenizer)):
        pass

    own = Own(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    own.chat_template = tiny_tokenizer.chat_template
    drawing = copy.deepcopy(tiny_tokenizer)
    assert isinstance(drawing.backend_tokenizer.model, models.BPE)
    drawing.backend_tokenizer.model.dropout = 0.5
    for tokenizer in (own, drawing):
        read_split(source, tokenizer, 32, kind="pairs")
    assert encoded_rows == [6, 6]
    assert not keeps.exists()


@pytest.mark.parametrize("damage", ["torn", "another number", "another count", "another's", "empty"])
def test_a_damaged_file_is_told_of_and_made_anew(source, tiny_tokenizer, keeps, encoded_rows, caplog, damage):
    fresh = read_split(source, tiny_tokenizer, 32, kind="pairs")
    (path,) = keeps.iterdir()
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[:-7])
    elif damage == "another number":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    elif damage == "another count":
        path.write_bytes(whole.replace(b'\\"eos_inside\\": 1', b'\\"eos_inside\\": 2'))
        assert path.read_bytes() != whole
    elif damage == "another's":
        read_split(source, tiny_tokenizer, 33, kind="pairs")
        (other,) = (found for found in keeps.iterdir() if found != path)
        other.replace(path)
    else:
        path.write_bytes(b"")
    encoded_rows.clear()
    caplog.clear()
    caplog.set_level(logging.WARNING)
    again = read_split(source, tiny_tokenizer, 32, kind="pairs")
    assert seen(again) == seen(fresh)
    assert encoded_rows == [6]
    assert any(f"{path} is damaged (" in record.getMessage() for record in caplog.records)
    assert seen(read_split(source, tiny_tokenizer, 32, kind="pairs")) == seen(fresh)
    assert encoded_rows == [6]


def test_a_folder_that_cannot_be_written_is_told_of_and_not_needed(source, tiny_tokenizer, keeps, caplog):
    keeps.parent.mkdir()
    keeps.write_text("a file in its place")
    caplog.set_level(logging.WARNING)
    assert read_split(source, tiny_tokenizer, 32, kind="pairs").tokenized.counts["pairs"] == 4
    assert any("cannot be written" in record.getMessage() for record in caplog.records)


def test_few_rows_are_not_kept(source, tiny_tokenizer, keeps, monkeypatch):
    monkeypatch.setattr(kept, "WORTH_KEEPING", 2**20)
    read_split(source, tiny_tokenizer, 32, kind="pairs")
    assert not keeps.exists()


def test_nothing_is_kept_unasked(source, tiny_tokenizer, keeps):
    """Whoever tokenises by themselves names the folder."""
    rows = read_split(source, tiny_tokenizer, 32, kind="pairs").table.rows
    before = list(keeps.iterdir())
    tokenize_pairs(rows, tiny_tokenizer, 30)
    assert list(keeps.iterdir()) == before
