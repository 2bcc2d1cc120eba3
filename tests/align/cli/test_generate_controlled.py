"""``align generate`` under constraints and rewards, on a tiny random model in float32."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Align = Callable[..., Result]


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model in bfloat16, another batch is another rounding."""
    monkeypatch.setattr("align.models.hardware.has_bf16_cpu", lambda: False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(model: Path, *more: object) -> tuple[object, ...]:
    return ("generate", "--model", model, "--max-new-tokens", 12, "--particles", 3, *more)


def test_one_prompt(align: Align, tiny_model_dir: Path) -> None:
    result = align(*options(tiny_model_dir, "-p", "the hat", "--constraint", "regex:[a-c]{2,4}", "--seed", 1))
    assert result.exit_code == 0, result.stderr
    assert re.fullmatch("[a-c]{2,4}\n", result.stdout)
    assert "log_normaliser -" in result.stderr
    assert "3 particles" in result.stderr


@pytest.mark.parametrize("method", ["awrs-smc", "awrs", "mask", "rejection"])
def test_a_file_of_prompts(align: Align, tiny_model_dir: Path, tmp_path: Path, method: str) -> None:
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "the hat"}, {"question": "?"}, {"prompt": "the hat"}])
    output = tmp_path / "out.jsonl"
    (tmp_path / "words.txt").write_text("inner\nan ant\n")
    words = f"words:{tmp_path / 'words.txt'}"
    result = align(*options(tiny_model_dir, "-i", source, "-o", output, "--constraint", words, "--method", method))
    assert result.exit_code == 0, result.stderr
    assert "1 of 3 rows cannot be used" in result.stdout
    rows = rows_of(output)
    assert [row["row"] for row in rows] == [1, 3]
    for row in rows:
        assert row["valid"]
        assert row["completion"] in ("inner", "an ant")
        assert row["finished"]
        assert row["reason"] == ""
        assert len(row["samples"]) == 3
        assert 0 < row["ess"] <= 3
        assert row["settings"]["constraint"] == words
        assert (row["log_normaliser"] is None) == (method == "rejection")
        assert (row["calls_per_token"] == 0) == (method == "mask"), "a mask is no call on a token"


def test_a_second_call_makes_only_what_is_missing(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}" * n} for n in range(1, 6)])
    output = tmp_path / "out.jsonl"
    command = options(tiny_model_dir, "-i", source, "-o", output, "--constraint", "regex:[ab]{1,3}")
    assert align(*command).exit_code == 0
    whole = rows_of(output)
    lines = output.read_bytes().splitlines(keepends=True)
    kept = json.loads(lines[0]) | {"completion": "not made again"}
    output.write_bytes(json.dumps(kept).encode() + b"\n" + lines[3] + lines[4][:20])
    assert align(*command).exit_code == 0
    again = rows_of(output)
    assert again[0] == kept
    for one, other in zip(whole[1:], again[1:], strict=True):
        assert one["completion"] == other["completion"]
        assert one["log_normaliser"] == pytest.approx(other["log_normaliser"], abs=1e-4)
    result = align(*command, "--top-p", 0.9)
    assert result.exit_code == 1
    assert "name another output" in result.stderr


def test_answers_to_a_constraint_that_has_changed_are_not_mixed_in(
    align: Align, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time something else than the command: the file of the constraint, a row's own, the rule of the reward."""
    schema, rule = tmp_path / "schema.json", tmp_path / "changing_rule.py"
    monkeypatch.syspath_prepend(tmp_path)
    rule.write_text("def bonus(prompts, completions, points):\n    return list(points)\n")
    schema.write_text('{"enum": ["aa"]}')
    row = {"prompt": "a", "must": "regex:x", "points": 1.0, "other": 1}
    source = write(tmp_path / "prompts.jsonl", [row])

    def made(output: str, *more: object, code: int = 0) -> str:
        command = options(tiny_model_dir, "-i", source, "-o", tmp_path / output, "--max-new-tokens", 24)
        result = align(*command, *more)
        assert result.exit_code == code, result.output
        return result.stderr

    by_file, by_field = ("--constraint", f"json:{schema}"), ("--constraint-field", "must")
    rewarded = ("--constraint", "regex:a", "--reward", "changing_rule:bonus")
    made("file.jsonl", *by_file)
    made("field.jsonl", *by_field)
    made("reward.jsonl", *rewarded)
    assert rows_of(tmp_path / "reward.jsonl")[0]["inputs"]["columns"] == {"points": 1.0}
    schema.write_text('{"enum": ["bb"]}')
    changed = "line 1 answers what the constraint or the reward was then: its text, its file or a column has changed"
    assert changed in made("file.jsonl", *by_file, code=1)
    write(source, [row | {"other": 2}])
    made("field.jsonl", *by_field)
    made("reward.jsonl", *rewarded)
    write(source, [row | {"must": "regex:y", "points": 2.0}])
    assert changed in made("field.jsonl", *by_field, code=1)
    assert changed in made("reward.jsonl", *rewarded, code=1)
    write(source, [row])
    rule.write_text("def bonus(prompts, completions, points):\n    return [0.0 for _ in points]\n")
    assert changed in made("reward.jsonl", *rewarded, code=1)


def test_what_failed_is_made_again(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A file that was missing: its rows are made when it is there. A dead end is an answer: nothing was found."""
    later = f"json:{tmp_path / 'later.json'}"
    rows = [
        {"prompt": "a", "must": later},
        {"prompt": "b", "must": "regex:x{300}"},
        {"prompt": "c", "must": "regex:x{2}"},
    ]
    source, output = write(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    command = options(tiny_model_dir, "-i", source, "-o", output, "--constraint-field", "must")
    result = align(*command)
    assert result.exit_code == 0, result.stderr
    before = rows_of(output)
    assert [row["valid"] for row in before] == [False, False, True]
    (tmp_path / "later.json").write_text("12")
    assert align(*command).exit_code == 0
    assert "is no schema" in rows_of(output)[0]["reason"]
    (tmp_path / "later.json").write_text('{"enum": [7]}')
    result = align(*command)
    assert "made again: 1 row that had failed" in result.stdout
    after = rows_of(output)
    assert after[0]["completion"].strip() == "7"
    assert after[1:] == before[1:]
    assert "made again" not in align(*command).stdout


def test_a_constraint_a_row_and_a_bad_one_among_them(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "a", "must": "regex:x{2}"},
            {"prompt": "b", "must": "regex:x{2"},
            {"prompt": "c"},
            {"prompt": "d", "must": "regex:y+z"},
        ],
    )
    output = tmp_path / "out.jsonl"
    result = align(*options(tiny_model_dir, "-i", source, "-o", output, "--constraint-field", "must"))
    assert result.exit_code == 0, result.stderr
    rows = rows_of(output)
    assert [row["valid"] for row in rows] == [True, False, False, True]
    assert rows[0]["completion"] == "xx"
    assert rows[1]["completion"] is None
    assert "regex 'x{2'" in rows[1]["reason"]
    assert "column must: the row has None" in rows[2]["reason"]


def test_the_schema_of_each_rows_database(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    schemas = [
        {"db_id": name, "table_names_original": [table], "column_names_original": [[-1, "*"], [0, "n"]]}
        for name, table in (("one", "cats"), ("two", "dogs"))
    ]
    write(tmp_path / "schemas.jsonl", schemas)
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "q", "db": "one"}, {"prompt": "q", "db": "three"}])
    output = tmp_path / "out.jsonl"
    command = options(tiny_model_dir, "-i", source, "-o", output, "--constraint", f"sql:{tmp_path / 'schemas.jsonl'}")
    result = align(*command, "--constraint-field", "db", "--max-new-tokens", 40)
    assert result.exit_code == 0, result.stderr
    first, second = rows_of(output)
    assert first["samples"]
    assert all("dogs" not in sample["completion"].lower() for sample in first["samples"])
    assert "no schema 'three'" in second["reason"]


def test_a_reward_pulls(align: Align, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One letter of two; the reward counts b, at 50 nats each: every answer is b, and Z grows by as much."""
    (tmp_path / "rule_of_b.py").write_text(
        "def count(prompts, completions):\n    return [float(text.count('b')) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {n}"} for n in range(8)])
    command = options(tiny_model_dir, "-i", source, "--constraint", "regex:[ab]", "--particles", 20)
    pulled = (*command, "--reward", "rule_of_b:count", "--reward-strength", 50, "-o", tmp_path / "pulled.jsonl")
    result = align(*pulled)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "pulled.jsonl")
    assert [row["completion"] for row in rows] == ["b"] * 8
    assert all(row["log_normaliser"] > 30 for row in rows)


def test_what_cannot_be_used_is_said_at_once(align: Align, tiny_model_dir: Path, tmp_path: Path) -> None:
    def error(*more: object, code: int) -> str:
        result = align(*options(tiny_model_dir, "-p", "the hat", *more))
        assert result.exit_code == code, result.output
        return result.stderr

    assert "--particles  goes with --constraint" in error(code=2)
    assert "regex '[a': unclosed character class" in error("--constraint", "regex:[a", code=1)
    assert "--top-k 1 takes the likeliest" in error("--constraint", "regex:a", "--temperature", 0, code=2)
    assert "'best' is none of" in error("--constraint", "regex:a", "--method", "best", code=2)
    assert "is a column of the rows of --input" in error("--constraint-field", "must", code=2)
    assert "no valid answer" in error("--constraint", "regex:a{300}", code=1)
    assert "top_p is 2.0" in error("--constraint", "regex:a", "--top-p", 2, code=1)
    assert "there is no module 'nothing'" in error("--reward", "nothing:here", code=1)
    (tmp_path / "schema.json").write_text('{"type": "objekt"}')
    assert "schema.json" in error("--constraint", f"json:{tmp_path / 'schema.json'}", code=1)
