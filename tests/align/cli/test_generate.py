"""``align generate`` on a tiny random model: what it writes, in what order, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import Result

Align = Callable[..., Result]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Text, messages, the first text again, a row without a prompt, an empty prompt, a broken line."""
    messages = [{"role": "user", "content": "the other one"}]
    rows = [{"prompt": "the hat"}, {"prompt": messages}, {"prompt": "the hat"}, {"question": "?"}, {"prompt": ""}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(model: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "--model", model, "--max-new-tokens", 6, *more)


def test_a_file_of_prompts(align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    result = align(*options(tiny_model_dir, "-i", prompts, "-o", output))
    assert result.exit_code == 0, result.stderr
    rows = answers(output)
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert all(1 <= row["tokens"] <= 6 for row in rows)
    assert rows[0]["completion"] != rows[2]["completion"], "a prompt that is listed twice gets two answers"
    assert "3 of 6 rows cannot be used" in result.stdout
    assert "broken JSON" in result.stdout


def test_a_second_call_makes_only_what_is_missing(
    align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    """Cut after the second row, inside the third line, as a kill would: the result is the same file."""
    output = tmp_path / "answers.jsonl"
    command = options(tiny_model_dir, "-i", prompts, "-o", output)
    align(*command)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = json.dumps(json.loads(lines[0]) | {"completion": "not made again"}).encode() + b"\n"
    output.write_bytes(kept + lines[1] + lines[2][:20])
    result = align(*command)
    assert result.exit_code == 0, result.stderr
    assert output.read_bytes() == kept + whole.removeprefix(lines[0])


def test_line_separators_inside_a_text_do_not_break_the_file(
    align: Align, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """U+2028, U+2029 and U+0085 stand in JSON as they are, and only a line feed ends a row."""
    prompts = ["the\u2028hat", "one\u2029two\x85three"]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = options(tiny_model_dir, "-i", source, "-o", output)
    result = align(*command)
    assert result.exit_code == 0, result.stderr
    whole = output.read_text()
    lines = whole.split("\n")
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == prompts
    output.write_text(lines[0] + "\n")
    result = align(*command)
    assert result.exit_code == 0, result.stderr
    assert output.read_text() == whole


def test_the_folder_of_the_output_is_made_before_the_model_is_loaded(
    align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder" / "answers.jsonl"
    result = align(*options(tiny_model_dir, "-i", prompts, "-o", output))
    assert result.exit_code == 0, result.stderr
    assert len(answers(output)) == 3
    result = align(*options(tmp_path / "no-model", "-i", prompts, "-o", prompts / "answers.jsonl"))
    assert result.exit_code == 1
    assert "name another output" in result.stderr, "not that the model is missing"


def test_answers_with_other_settings_are_not_mixed_in(
    align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    align(*options(tiny_model_dir, "-i", prompts, "-o", output))
    before = output.read_bytes()
    result = align(*options(tiny_model_dir, "-i", prompts, "-o", output, "--seed", 1))
    assert result.exit_code == 1
    assert "name another output" in result.stderr
    assert output.read_bytes() == before


def test_a_prompt_that_leaves_no_room_is_reported(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The tiny model reads 512 tokens."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "xyz " * 400}) + "\n")
    result = align(*options(tiny_model_dir, "-i", tmp_path / "long.jsonl", "-o", tmp_path / "out.jsonl"))
    assert result.exit_code == 1
    assert "more than the 512 that the model reads" in result.stderr


def test_one_prompt_is_the_likeliest_answer_at_temperature_0(align: Align, tiny_model_dir: Path) -> None:
    command = options(tiny_model_dir, "-p", "the hat", "--temperature", 0)
    first = align(*command, "--seed", 1).stdout
    assert first.strip()
    assert first == align(*command, "--seed", 2).stdout
    assert first != align(*command, "--raw").stdout, "with and without the chat template"


def test_chat_keeps_its_history_until_reset(align: Align, tiny_model_dir: Path) -> None:
    """At temperature 0 the same words get the same answer after /reset, and another one as a second turn."""
    command = options(tiny_model_dir, "--chat", "--temperature", 0)
    lines = align(*command, input="the hat\n/reset\nthe hat\nthe hat\n/quit\nnot read\n").stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1] != lines[2]


def test_chat_says_when_the_conversation_is_too_long(align: Align, tiny_model_dir: Path) -> None:
    result = align(*options(tiny_model_dir, "--chat"), input="xyz " * 400 + "\n")
    assert result.exit_code == 0, result.stderr
    assert "/reset starts anew" in result.stdout


def test_a_folder_without_a_model(align: Align, tmp_path: Path) -> None:
    result = align(*options(tmp_path, "-p", "Hi"))
    assert result.exit_code == 1
    assert "no config.json in this folder" in result.stderr


def test_an_engine_that_is_not_there(align: Align, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.decoding.vllm.machine.DISTRIBUTIONS", ())
    result = align(*options(tiny_model_dir, "-p", "the hat", "--engine", "vllm"))
    assert result.exit_code != 0
    assert "--engine vllm: vLLM is not installed: pip install 'align-lm[vllm]' with a GPU" in result.stderr
    assert "Traceback" not in result.output
    for more, problem in [
        (("--engine", "vlm", "-p", "x"), "'vlm' is none of transformers, vllm"),
        (("--engine", "vllm", "--chat"), "vllm does not go with --chat; leave it out"),
    ]:
        result = align(*options(tiny_model_dir, *more))
        assert result.exit_code == 2
        assert problem in result.stderr


def test_several_answers_a_prompt(align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    """Three a row: the first three draws of a prompt; the same prompt again gets three others.

    What was read and drawn stands beside the text: the ids decode to it, and an answer has finished where its last id
    is an end token.
    """
    output, tokenizer = tmp_path / "answers.jsonl", AutoTokenizer.from_pretrained(tiny_model_dir)
    result = align(*options(tiny_model_dir, "-i", prompts, "-o", output, "--n", 3))
    assert result.exit_code == 0, result.stderr
    rows = answers(output)
    assert [row["row"] for row in rows] == [1, 2, 3]
    texts = [text for row in rows for text in row["completions"]]
    assert len(texts) == len(set(texts)) == 9
    for row in rows:
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["completion_ids"]] == row["completions"]
        assert [ids[-1] == tokenizer.eos_token_id for ids in row["completion_ids"]] == row["finished"]
        assert "<|im_start|>assistant" in tokenizer.decode(row["prompt_ids"])
    single = tmp_path / "single.jsonl"
    align(*options(tiny_model_dir, "-i", prompts, "-o", single, "--temperature", 1))
    assert [row["completion"] for row in answers(single)] == [row["completions"][0] for row in rows]


def test_a_row_of_several_answers_is_whole_or_not_there(
    align: Align, tiny_model_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    """9 answers in batches of 8: the last row has two in one batch and one in the next. A second call goes on."""
    output = tmp_path / "answers.jsonl"
    command = options(tiny_model_dir, "-i", prompts, "-o", output, "--n", 3)
    align(*command)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[2][:30])
    assert align(*command).exit_code == 0
    assert output.read_bytes() == whole
    refused = align(*options(tiny_model_dir, "-i", prompts, "-o", output, "--n", 4))
    assert "is no answer to these prompts with these settings" in refused.stderr
    for more in (("-p", "the hat"), ("-i", prompts, "-o", tmp_path / "x.jsonl", "--constraint", "regex:a+")):
        refused = align(*options(tiny_model_dir, "--n", 3, *more))
        assert refused.exit_code == 2
        assert "goes with --input, without a constraint" in refused.stderr
    refused = align(*options(tiny_model_dir, "-i", prompts, "-o", tmp_path / "x.jsonl", "--n", 3, "--temperature", 0))
    assert "is over 0 with --n: all answers would be one" in refused.stderr
