"""``align generate`` under constraints and rewards, on a tiny random model in float32."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from align.controlled import Control, Controller
from align.decoding import smc
from align.decoding.constraints import parse
from align.decoding.request import Answer
from align.decoding.smc import Sample
from align.generate import Answerer, Settings

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


def test_one_prompt_says_how_often_masks_were_asked_for(align: Align, tiny_model_dir: Path) -> None:
    """Two tokens for each of three particles: "a" by a mask, then the end, which the limit asks about alone."""
    one = options(
        tiny_model_dir, "-p", "the hat", "--constraint", "regex:a", "--method", "mask", "--max-new-tokens", 2
    )
    result = align(*one)
    assert result.exit_code == 0, result.stderr
    assert "calls_per_token 0.5 · masks 3 · dead_ends 0" in result.stderr
    result = align(*one, "--method", "rejection")
    assert result.exit_code == 0, result.stderr
    assert "masks" not in result.stderr


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
    assert "out.jsonl: 2 of 4 answers are valid\n  row 2  answer  regex 'x{2': " in result.stdout
    assert "row 3  answer  column must" in result.stdout


def test_a_column_that_no_row_has(align: Align, tmp_path: Path) -> None:
    """Before the model is loaded, which is not there."""
    source = write(tmp_path / "prompts.jsonl", [{"prompt": "a", "must": "regex:x"}])
    result = align(*options(tmp_path, "-i", source, "-o", tmp_path / "o.jsonl", "--constraint-field", "mst"))
    assert result.exit_code == 2, result.output
    assert "mst  no row has this column; there are must, prompt" in result.stderr


def test_a_timeout_is_for_the_rows_that_can_use_it(
    align: Align, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_predicate.py").write_text("def xs(text, complete):\n    return 'xx'.startswith(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": "a", "must": "python:own_predicate:xs"}, {"prompt": "b", "must": "regex:y"}]
    source, output = write(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    command = options(tiny_model_dir, "-i", source, "-o", output, "--constraint-field", "must")
    result = align(*command, "--constraint-timeout", 20)
    assert result.exit_code == 0, result.stderr
    assert [row["valid"] for row in rows_of(output)] == [True, True], result.stdout


def test_the_best_answer_is_judged_itself(tiny_model_dir: Path) -> None:
    """The drawn one is valid and the best one, which is written, is not."""
    controller = Controller(
        Answerer(Settings(str(tiny_model_dir), 4, 1.0, 0, False)), Control(constraint="regex:a", take="best")
    )
    (end,) = controller.vocabulary.ends
    drawn, best = (
        Sample((controller.vocabulary.tokens.index(said), end), weight)
        for said, weight in ((b"a", -2.0), (b"b", -1.0))
    )
    result = smc.Result((drawn, best), 0.0, 1.5, drawn, best, 0, 0, "")
    row = controller._columns(Answer(result, (1,), True, ""), controller._constraint({}))
    assert (row["completion"], row["valid"]) == ("b", False)
    assert "refuses it" in row["reason"]


def test_constraints_of_rows_are_not_kept(
    align: Align, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 rows with one each, those of two rows and of the one before are there at a time."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counted(*args: Any, **named: Any) -> Any:
        made.append(weakref.ref(found := parse(*args, **named)))
        alive.append(sum(one() is not None for one in made))
        return found

    for name, value in {"ROWS": 2, "KEPT": 1, "parse": counted}.items():
        monkeypatch.setattr(f"align.controlled.{name}", value)
    rows = [{"prompt": "a", "must": f"regex:x{{{count}}}"} for count in range(1, 13)]
    source, output = write(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    result = align(*options(tiny_model_dir, "-i", source, "-o", output, "--constraint-field", "must"))
    assert result.exit_code == 0, result.stderr
    assert len(alive) == 12
    assert max(alive) <= 4


def test_an_interruption_is_said_on_a_line_of_its_own(
    align: Align, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(settings: Any, source: Any, output: Any, progress: Callable[[int, int], None], *_: Any) -> None:
        progress(4, 200)
        raise KeyboardInterrupt

    monkeypatch.setattr("align.generate.answer_file", interrupted)
    result = align(*options(tmp_path, "-i", "in.jsonl", "-o", tmp_path / "o.jsonl", "--constraint", "regex:a"))
    assert result.exit_code == 130
    assert result.stderr.startswith("\r4/200 answers\ninterrupted: ")


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
    assert result.exit_code == 1, "a tiny random model writes no query"
    assert "out.jsonl: 0 of 2 answers are valid\n  row 1  answer" in result.stderr
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


def test_an_answer_without_a_reward_has_no_weight(
    align: Align, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule may give None; to take it for 0 would be a reward like any other."""
    (tmp_path / "rule_of_none.py").write_text(
        "def judge(prompts, completions):\n    return [None for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = align(*options(tiny_model_dir, "-p", "say", "--constraint", "regex:a", "--reward", "rule_of_none:judge"))
    assert result.exit_code == 1
    assert "reward rule_of_none:judge: no number for 'a', so that it has no weight" in result.stderr


def test_what_cannot_be_used_is_said_before_the_model_is_loaded(align: Align, tmp_path: Path) -> None:
    """There is none."""
    (tmp_path / "schema.json").write_text('{"type": "objekt"}')

    def error(*more: object, source: bool = False) -> str:
        asked = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "o.jsonl") if source else ("-p", "the hat")
        result = align(*options(tmp_path / "no-model", *asked, *more))
        assert result.exit_code == 2, result.output
        return result.stderr

    regex, field = ("--constraint", "regex:a"), ("--constraint-field", "must")
    assert "--particles  goes with --constraint" in error()
    assert "regex '[a': unclosed character class" in error("--constraint", "regex:[a")
    assert "'regx' is no kind of constraint" in error("--constraint", "regx:a")
    assert "a timeout is for python" in error(*regex, "--constraint-timeout", 5)
    assert "--top-k 1 takes the likeliest" in error(*regex, "--temperature", 0)
    assert "inf is no finite number" in error(*regex, "--temperature", "inf")
    assert "'best' is none of" in error(*regex, "--method", "best")
    assert "mask asks about all tokens" in error(*regex, "--method", "mask", "--max-draws", 3)
    assert "--top-p  top_p is 2.0" in error(*regex, "--top-p", 2)
    assert "schema.json" in error("--constraint", f"json:{tmp_path / 'schema.json'}")
    assert "is a column of the rows of --input" in error(*field)
    assert "write sql:FILE alone, or nothing" in error(*regex, *field, source=True)
    assert "write sql:FILE alone" in error("--constraint", "sql:f.json#one", *field, source=True)
    assert "absent.json: No such file" in error("--constraint", "sql:absent.json", *field, source=True)


def test_what_the_model_shows_to_be_unusable(align: Align, tiny_model_dir: Path) -> None:
    def error(*more: object) -> str:
        result = align(*options(tiny_model_dir, "-p", "the hat", *more))
        assert result.exit_code == 1, result.output
        return result.stderr

    assert "no valid answer" in error("--constraint", "regex:a{300}")
    assert "there is no module 'nothing'" in error("--reward", "nothing:here")
    assert "among the 1 of max_draws: raise it" in error("--constraint", "regex:aaaa", "--max-draws", 1)


def test_help_names_the_schema_of_a_file(align: Align) -> None:
    assert "sql:schema.json[#name]" in align("generate", "--help").stdout.replace("\n", "")
