"""``align generate --transfer-q``: a tiny random model, another as its baseline, and a rule that counts characters."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import Result

from align.data.tokenize import encode_prompt

Align = Callable[..., Result]
RULE = """
def plain(prompts, completions):
    return [min(1.0, sum(" " <= letter <= "~" for letter in answer) / 20) for answer in completions]

def wished(prompts, completions, wish):
    return [float(answer.count(letter)) for answer, letter in zip(completions, wish)]

def silent(prompts, completions):
    return [None for _ in completions]
"""


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a model in bfloat16, another batch is another rounding. And the rules."""
    monkeypatch.setattr("align.models.hardware.has_bf16_cpu", lambda: False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "letter_rules.py").write_text(RULE)


@pytest.fixture(scope="module")
def baseline(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make_tiny_model: Any
) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    make_tiny_model(seed=5).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(tiny_model_dir: Path, baseline: Path) -> tuple[object, ...]:
    return (
        *("generate", "-m", tiny_model_dir, "--transfer-q", baseline, "--reward", "letter_rules:plain"),
        *("--max-new-tokens", 10, "--q-candidates", 5, "--q-length", 4, "--q-alpha", 0.02),
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> int:
    """How many characters can be printed and are ASCII, which few of a random model's are."""
    return sum(" " <= letter <= "~" for letter in text)


def reward_of(stderr: str) -> float:
    return float(stderr.split("reward ")[1].split(" ")[0])


def test_one_prompt_gets_more_of_the_reward_than_the_model_alone(
    align: Align, command: tuple[object, ...], tiny_model_dir: Path
) -> None:
    result = align(*command, "-p", "the hat")
    assert result.exit_code == 0, result.stderr
    assert "rollout_tokens" in result.stderr
    alone = align("generate", "-m", tiny_model_dir, "--max-new-tokens", 10, "--temperature", 0, "-p", "the hat")
    assert plain(result.stdout) > plain(alone.stdout)
    assert reward_of(result.stderr) == pytest.approx(plain(result.stdout) / 20, rel=1e-3)


def test_a_range_says_the_same_for_fewer_rollouts(align: Align, command: tuple[object, ...]) -> None:
    one = (*command, "-p", "an ant", "--q-alpha", 1)
    every, gated = align(*one), align(*one, "--q-range", "0,1")
    assert gated.exit_code == 0, gated.stderr
    assert gated.stdout == every.stdout
    counts = [int(re.findall(r"rollouts (\d+)", result.stderr)[0]) for result in (gated, every)]
    assert counts[0] < counts[1]


@pytest.mark.parametrize(
    "more",
    [
        ("--q-value", "soft", "--q-rollouts", 3),
        ("--q-length", "end"),
        ("--q-length", 0),
        ("--q-block", 3),
        ("--temperature", 1.0),
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_a_file_of_prompts_is_answered_and_gone_on_with(
    align: Align, command: tuple[object, ...], tmp_path: Path, more: tuple[object, ...]
) -> None:
    """What is cut off is made again, the same; another setting needs another output."""
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(3)))
    every = (*command, *more, "-i", source, "-o", output)
    result = align(*every)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(output)
    assert [row["row"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert (row["valid"], row["reason"]) == (True, "")
        assert row["reward"] == plain(row["completion"]) / 20
        assert row["costs"]["steps"] > 0
        assert row["settings"]["q_candidates"] == 5
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[2][:40])
    assert align(*every).exit_code == 0
    again = rows_of(output)
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    other = align(*every, "--q-alpha", 0.1)
    assert other.exit_code == 1
    assert "name another output" in other.stderr


def test_a_rule_may_read_columns_and_a_row_that_fails_is_made_again(
    align: Align, command: tuple[object, ...], tmp_path: Path
) -> None:
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "wish": "n"}\n{"prompt": "b"}\n{"prompt": "c", "wish": "t"}\n')
    every = (*command, "--reward", "letter_rules:wished", "-i", source, "-o", output)
    result = align(*every)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(output)
    assert [row["reward"] is None for row in rows] == [False, True, False]
    assert rows[0]["reward"] == rows[0]["completion"].count("n") > 0
    assert "column wish" in rows[1]["reason"]
    assert rows[1]["completion"] is None
    assert "2 of 3 answers are valid" in result.stdout
    assert "made again: 1 row that had failed" in align(*every).stdout
    (tmp_path / "none.jsonl").write_text('{"prompt": "a"}\n')
    nothing = align(*command, "--reward", "letter_rules:silent", "-i", tmp_path / "none.jsonl", "-o", tmp_path / "o")
    assert nothing.exit_code == 1
    assert "it gave None for" in nothing.stderr


def test_a_baseline_with_other_tokens_or_a_reward_that_is_not_there(
    align: Align, command: tuple[object, ...], tmp_path: Path, tiny_tokenizer: Any, make_tiny_model: Any
) -> None:
    wide = make_tiny_model(vocab_size=len(tiny_tokenizer) + 8)
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    result = align(*command, "-p", "a", "--transfer-q", tmp_path / "wide")
    assert result.exit_code == 1
    assert "its tokens are not those of" in result.stderr
    assert align(*command, "-p", "a", "--reward", "letter_rules:none").exit_code == 1
    assert align(*command, "-p", "a", "--transfer-q", tmp_path / "nowhere").exit_code == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--q-candidates 0", "--q-candidates is 0: it must be a whole number, 1 or more"),
        ("--q-alpha 0", "--q-alpha is 0.0: it must be positive"),
        ("--q-length far", "--q-length is far: it must be a whole number of tokens, or end"),
        ("--q-value best", "--q-value is 'best': it must be one of mean, soft"),
        ("--q-range 1,0", "--q-range is 1.0, 0.0"),
        ("--q-range 1", "--q-range is '1': write the least and the largest reward, 0,1"),
        ("--q-range 0,1 --temperature 1", "--q-range it keeps the greedy choice alone"),
        ("--q-rollouts 2 --q-length 0", "--q-rollouts is 2: with length 0 there are none"),
        ("--constraint regex:a", "--constraint does not go with --transfer-q"),
        ("--particles 3", "--particles does not go with --transfer-q"),
    ],
)
def test_settings_that_cannot_be_are_said_before_a_model_is_loaded(
    align: Align, command: tuple[object, ...], more: str, said: str
) -> None:
    result = align(*command, "-p", "a", *shlex.split(more))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_options_that_go_together(align: Align, tiny_model_dir: Path) -> None:
    one = ("generate", "-m", tiny_model_dir)
    for more, said in (
        (("-p", "a", "--q-alpha", 1), "--q-alpha goes with --transfer-q"),
        (("-p", "a", "--transfer-q", "x"), "--transfer-q goes with --reward"),
        (("--chat", "--transfer-q", "x", "--reward", "y"), "--chat has no rewards"),
    ):
        result = align(*one, *more)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())


def test_the_prompt_is_a_message_where_there_is_a_template(
    align: Align, command: tuple[object, ...], tmp_path: Path, monkeypatch: Any, tiny_tokenizer: Any
) -> None:
    """Both models read the ids of the prompt in its template."""
    from align.decoding.engines import TransformersEngine

    seen: list[list[int]] = []
    right = TransformersEngine.rollouts

    def rollouts(self: Any, prompts: Any, **given: Any) -> Any:
        seen.extend(map(list, prompts))
        return right(self, prompts, **given)

    monkeypatch.setattr(TransformersEngine, "rollouts", rollouts)
    assert align(*command, "-p", "an ant").exit_code == 0
    ids = encode_prompt([{"role": "user", "content": "an ant"}], tiny_tokenizer)
    assert seen
    assert all(prompt[: len(ids)] == ids for prompt in seen)
