"""A pass over a data set: every row once, in order, with its columns, whatever interrupts it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.data.fields import FieldError
from align.data.rows import row_id
from align.errors import AlignError, ConfigError
from align.score.rows import ScoreRow, score_row
from align.score.run import Outcome, score_data, score_rows
from align.score.scorers import RuleScorer, Scored, by_answer


class Letters:
    """Letters of an answer; "bad" in one cannot be counted. Says what it was given."""

    def __init__(self, name: str = "letters", version: int = 1) -> None:
        self.name = name
        self.identity = {"version": version}
        self.seen: list[str] = []

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        self.seen += [row.row_id for row in rows]
        for row in rows:
            if any("bad" in str(answer) for answer in row.each):
                raise ValueError("row 0: no number for bad")
        return Scored(by_answer(rows, {self.name: [float(len(str(answer))) for row in rows for answer in row.each]}))


def scored(source: Path, output: Path, *scorers: Any, **settings: int) -> Outcome:
    outcome = score_data(str(source), scorers or [Letters()], output, **{"shard_rows": 4, "batch_size": 3, **settings})
    assert outcome is not None
    return outcome


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = random.Random(0)
    return write(
        tmp_path / "data.jsonl",
        [{"prompt": f"p{n}", "completion": "x" * rng.randint(1, 9), "task": n % 3} for n in range(11)],
    )


def test_rows_keep_their_order_and_fields(data: Path, tmp_path: Path) -> None:
    """11 rows in shards of 4, in batches of 3 by length: out they come as they went in, with the letters counted."""
    outcome = scored(data, tmp_path / "out.jsonl")
    before, after = read(data), read(outcome.output)
    for was, now in zip(before, after, strict=True):
        own = {"row_id": row_id(was["prompt"], was["completion"])}
        assert now == {**was, **own, "letters_completion": float(len(was["completion"]))}
    assert outcome.counts == {
        "rows": 11,
        "scored": 11,
        "set_aside": 0,
        "cut": 0,
        "moved": 0,
        "left_out": 0,
        "other_flags": 0,
    }
    numbers = [len(row["completion"]) for row in before]
    assert outcome.columns["letters_completion"]["mean"] == pytest.approx(sum(numbers) / 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl", "out.jsonl.score.json"]


def test_every_kind_of_row(tmp_path: Path) -> None:
    """A pair has two columns and the id that training gives it, several answers a list, a bare prompt none."""
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    rows = [
        {"prompt": "a", "chosen": "bcd", "rejected": "e"},
        {"chosen": [user, said], "rejected": [user, {"role": "assistant", "content": "no"}]},
        {"prompt": "a", "completions": ["b", "cd"], "rank": [1, 2]},
        {"messages": [user, said]},
        {"prompt": [user]},
        {"prompt": "a", "response_1": "bcd", "response_2": "e", "preference_strength": 2},
        {"prompt": "a", "response": "bc", "helpfulness": 3},
    ]
    pair, _, several, talk, bare, responses, response = read(
        scored(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl").output
    )
    assert (pair["letters_chosen"], pair["letters_rejected"]) == (3.0, 1.0)
    assert pair["row_id"] == row_id("a", "bcd", "e")
    assert several["letters_completions"] == [1.0, 2.0]
    assert "letters_completion" in talk
    assert bare == {"prompt": [user], "row_id": row_id([user])}
    assert (responses["letters_chosen"], responses["letters_rejected"]) == (1.0, 3.0)  # the second is better
    assert responses["row_id"] == row_id("a", "e", "bcd")
    assert response["letters_completion"] == 2.0


def test_responses_of_which_none_is_better_are_no_pair() -> None:
    problems: list[FieldError] = []
    tie = {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0}
    assert score_row(tie, problems) is None
    assert [problem.reason for problem in problems] == ["0: neither response is the chosen one"]


def test_bad_rows_are_set_aside_with_their_reasons(tmp_path: Path) -> None:
    """Row 2 is refused by the scorer, though its batch holds good rows; 3 has no prompt; 4 is broken."""
    good = {"prompt": "p", "completion": "x"}
    source = write(tmp_path / "in.jsonl", [good, {"prompt": "q", "completion": "bad"}, {"completion": "y"}])
    with source.open("a", encoding="utf-8") as file:
        file.write("{broken\n" + json.dumps(good) + "\n")
    outcome = scored(source, tmp_path / "out.jsonl")
    assert [row["letters_completion"] for row in read(outcome.output)] == [1.0, 1.0]
    assert outcome.counts == {
        "rows": 5,
        "scored": 2,
        "set_aside": 3,
        "cut": 0,
        "moved": 0,
        "left_out": 0,
        "other_flags": 0,
    }
    assert [(fault.row, fault.field) for fault in outcome.faults] == [(2, "letters"), (3, "prompt"), (4, "line")]
    assert outcome.faults[0].reason == "no number for bad"
    assert outcome.rejected == tmp_path / "out.jsonl.rejected_rows.jsonl"
    own = {"row_id": row_id("q", "bad")}
    assert [fault.content for fault in outcome.faults] == [
        {"prompt": "q", "completion": "bad"} | own,
        {"completion": "y"},
        "{broken",
    ]


def test_rows_that_are_refused_have_an_id(tmp_path: Path) -> None:
    """Of prompt and answers as they stand: empty answers and equal ones have one, a row without its answer none."""
    rows = [
        {"prompt": "p", "chosen": "", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a"},
        {"prompt": "p", "completion": ""},
        {"prompt": "p", "completion": "x"},
    ]
    outcome = scored(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [fault.content.get("row_id") for fault in outcome.faults] == [
        row_id("p", "", "b"),
        row_id("p", "a", "a"),
        None,
        row_id("p", ""),
    ]


def test_progress_is_told_by_batch() -> None:
    """Of 7 rows one cannot be read; 6 go in batches of 4 and 2 through two scorers, the first of which refuses one."""
    texts = ["x" * n for n in range(1, 5)] + ["bad", "xx"]
    rows: list[Any] = [("f", n, {"prompt": "p", "completion": text}) for n, text in enumerate(texts, start=1)]
    rows.append(("f", 7, {"completion": "y"}))
    told: list[int] = []
    lines = score_rows([Letters(), Letters("again")], list(enumerate(rows, start=1)), 4, told.append)
    assert told == [1, 4, 2]
    assert [line["columns"].keys() for line in lines if "columns" in line] == [
        {"letters_completion", "again_completion"}
    ] * 5


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "q", "completion": "bad"}])
    with pytest.raises(AlignError, match=r"no row can be scored.*row 1: letters: no number for bad"):
        scored(source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


class Stopping(Letters):
    """Stops in the second shard, as a kill would."""

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        if len(self.seen) >= 6:
            raise KeyboardInterrupt
        return super().score(rows)


def test_an_interrupted_run_goes_on(data: Path, tmp_path: Path) -> None:
    """The first shard of 4 rows is kept: the second run is given the other 7, and the file is that of a whole run."""
    with pytest.raises(KeyboardInterrupt):
        scored(data, tmp_path / "out.jsonl", Stopping())
    assert not (tmp_path / "out.jsonl").exists()
    second = Letters()
    outcome = scored(data, tmp_path / "out.jsonl", second)
    assert len(second.seen) == 7
    whole = scored(data, tmp_path / "whole.jsonl")
    assert outcome.output.read_bytes() == whole.output.read_bytes()
    again = Letters()
    assert scored(data, tmp_path / "out.jsonl", again).counts == whole.counts
    assert again.seen == []


def test_what_was_begun_otherwise_is_not_mixed(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scored(data, output, Stopping())
    with pytest.raises(AlignError, match="begun with other scorers"):
        scored(data, output, Letters(version=2))
    rows = read(data)
    write(data, [rows[0] | {"completion": "other"}, *rows[1:]])
    with pytest.raises(AlignError, match=r"parts: the data has changed since it was begun; delete it"):
        scored(data, output)


class StoppingAtOnce(Letters):
    """Stops before any shard is done."""

    def score(self, rows: Sequence[ScoreRow]) -> Scored:
        raise KeyboardInterrupt


def test_what_was_begun_without_a_shard_is_in_no_ones_way(data: Path, tmp_path: Path) -> None:
    """Nor is what a kill left of a file that was being written."""
    output, left = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        scored(data, output, StoppingAtOnce())
    left.write_text("half")
    assert scored(data, output, Letters(version=2)).counts["scored"] == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl", "out.jsonl.score.json"]


def test_rows_set_aside_of_an_output_that_is_gone_do_not_stay(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "p", "completion": word} for word in ("good", "bad")])
    first = scored(source, tmp_path / "out.jsonl")
    assert first.rejected is not None
    first.output.unlink()
    write(source, [{"prompt": "p", "completion": "good"}])
    assert scored(source, tmp_path / "out.jsonl").rejected is None
    assert not first.rejected.exists()


def test_a_folder_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    with pytest.raises(AlignError, match=r"cannot be written in \(Not a directory\); name another output"):
        scored(data, data / "below" / "out.jsonl")


def test_an_output_that_is_there_is_not_written_over(data: Path, tmp_path: Path) -> None:
    output = write(tmp_path / "out.jsonl", [{"precious": 1}])
    with pytest.raises(AlignError, match="was not made by align score"):
        scored(data, output)
    scored(data, tmp_path / "mine.jsonl")
    with pytest.raises(AlignError, match="begun with other scorers"):
        scored(data, tmp_path / "mine.jsonl", Letters(version=2))
    rows = read(data)
    # A row more, the same rows in another order, and another value in a column that is carried along.
    for changed in ([*rows, {"prompt": "more", "completion": "x"}], rows[::-1], [{**rows[0], "task": 9}, *rows[1:]]):
        write(data, changed)
        with pytest.raises(AlignError, match=r"mine\.jsonl: the data has changed"):
            scored(data, tmp_path / "mine.jsonl")
    with pytest.raises(ConfigError, match=r"end it in \.jsonl or \.parquet"):
        scored(data, tmp_path / "out.csv")


def test_columns_of_the_data_are_not_written_over(data: Path, tmp_path: Path) -> None:
    """A second pass over a scored file takes another name, and its row ids are the same."""
    first = scored(data, tmp_path / "one.jsonl").output
    with pytest.raises(AlignError, match=r"column letters_completion already.*NAME=SPEC"):
        scored(first, tmp_path / "two.jsonl")
    second = scored(first, tmp_path / "three.jsonl", Letters("again")).output
    assert [row["row_id"] for row in read(second)] == [row["row_id"] for row in read(first)]
    own = write(tmp_path / "own.jsonl", [{"prompt": "p", "completion": "x", "row_id": 7}])
    with pytest.raises(AlignError, match="row_id of its own"):
        scored(own, tmp_path / "four.jsonl")


def test_parquet_out_and_in_again(data: Path, tmp_path: Path) -> None:
    """Columns that some rows lack are null there; whole numbers and lists keep their types."""
    import pyarrow.parquet as pq

    rows = [*read(data), {"prompt": "a", "completions": ["b", "cd"]}]
    source = write(tmp_path / "in.jsonl", rows)
    assert scored(data, tmp_path / "out.jsonl").counts["rows"] == 11  # another output, though but for its ending
    table = pq.read_table(scored(source, tmp_path / "out.parquet").output)
    assert str(table.schema.field("task").type) == "int64"
    last = table.to_pylist()[-1]
    assert (last["letters_completions"], last["letters_completion"], last["task"]) == ([1.0, 2.0], None, None)
    assert scored(tmp_path / "out.parquet", tmp_path / "again.jsonl", Letters("again")).counts["rows"] == 12


RULE = """
import os, time
def slow(prompts, completions):
    with open(os.environ["SEEN"], "a") as file:
        file.writelines(prompt + "\\n" for prompt in prompts)
    time.sleep(0.05)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def score_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """A rule of the user's own, which takes its time and keeps what it was given in the file ``seen``."""
    (tmp_path / "slowly.py").write_text(RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))

    def score(source: Path, output: Path) -> None:
        score_data(str(source), [RuleScorer("slow", "slowly:slow")], output, batch_size=2, shard_rows=4)

    return score


def test_kill_9_loses_and_doubles_nothing(
    tmp_path: Path, score_slowly: Callable[..., None], fork: Callable[..., Any]
) -> None:
    """Killed without warning in the middle: the second run scores what is not on disk, at most a shard twice."""
    source = write(tmp_path / "in.jsonl", [{"prompt": f"p{n}", "completion": "x" * n} for n in range(1, 41)])
    seen, output = tmp_path / "seen", tmp_path / "out.jsonl"
    process = fork(lambda: score_slowly(source, output))
    while not seen.exists() or len(seen.read_text().splitlines()) < 14:
        assert process.is_alive(), process.said.read_text()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not output.exists()
    score_slowly(source, output)
    assert [row["slow_completion"] for row in read(output)] == [float(n) for n in range(1, 41)]
    prompts = seen.read_text().splitlines()
    assert set(prompts) == {f"p{n}" for n in range(1, 41)}
    twice = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    assert len({(int(prompt[1:]) - 1) // 4 for prompt in twice}) <= 1
    assert len(prompts) - 40 <= 4


def test_two_processes_write_the_file_of_one(
    tmp_path: Path, score_slowly: Callable[..., None], two_processes: Callable[..., None]
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"p{n}", "completion": "x" * n} for n in range(1, 23)])
    alone, both = tmp_path / "alone.jsonl", tmp_path / "both.jsonl"
    two_processes(lambda: score_slowly(source, both))
    assert sorted((tmp_path / "seen").read_text().splitlines()) == sorted(f"p{n}" for n in range(1, 23))
    score_slowly(source, alone)
    assert both.read_bytes() == alone.read_bytes()
