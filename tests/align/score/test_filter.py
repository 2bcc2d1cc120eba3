"""align filter: which rows stay, why the others go, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import Result

from align.data.rows import row_id

Align = Callable[..., Result]
SCORES = [0.5, -1.0, 0.5, -2.0, 0.0, 3.0, 0.5, -0.5, 2.0, 1.0]


def pair(number: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": f"a long answer {number}", "rejected": f"no {number}", **fields}


def rows() -> list[dict[str, Any]]:
    tasks = ["sum", "sum", "sum", "sum", "ode", "ode", "sum", "sum", "ode", "ode"]
    return [pair(n, ches_ln=score, task=task) for n, (score, task) in enumerate(zip(SCORES, tasks, strict=True))]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "scored.jsonl", rows())


def kept_by(align: Align, data: Path, *options: object) -> list[int]:
    """Numbers of the questions that stay."""
    out = data.parent / "kept"
    result = align("filter", data, "--by", "ches_ln", *options, "-o", out)
    assert result.exit_code == 0, result.stderr
    return [int(row["prompt"].split()[1]) for row in read(out / "kept.jsonl")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Ascending: 3 (-2), 1 (-1), 7 (-.5), 4 (0), then 0, 2 and 6, equal at .5 and in the order of the data.
        (("--keep", 0.5), [0, 1, 3, 4, 7]),
        (("--keep", 0.69), [0, 1, 2, 3, 4, 7]),  # floor(6.9) = 6
        (("--keep", 0.01), [3]),  # at least one
        (("--window", 0.8, 1), [5, 8]),
        (("--window", 0.0, 0.2), [1, 3]),
        (("--below", 0.0), [1, 3, 7]),  # the threshold itself goes
        (("--above", 1), [5, 8]),
        (("--above", -1, "--below", 0.5), [4, 7]),
        # Of six sums the lowest three, 3, 1, 7; of four odes, 4 (0), 9 (1), 8, 5, the lowest two.
        (("--keep", 0.5, "--group", "task"), [1, 3, 4, 7, 9]),
        (("--keep", 0.5, "--group", "task", "--quota", "ode=0.25"), [1, 3, 4, 7]),
        (("--window", 0.5, 1, "--group", "task"), [0, 2, 5, 6, 8]),
    ],
)
def test_what_stays(align: Align, data: Path, options: tuple[object, ...], expected: list[int]) -> None:
    assert kept_by(align, data, *options) == expected


def test_every_row_is_kept_or_dropped_with_a_reason(align: Align, data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    assert kept_by(align, data, "--keep", 0.5) == [0, 1, 3, 4, 7]
    out = tmp_path / "kept"
    assert data.read_bytes() == before
    kept, dropped, reasons = (read(out / f"{name}.jsonl") for name in ("kept", "dropped", "reasons"))
    assert sorted([*kept, *dropped], key=lambda row: row["prompt"]) == rows()
    assert [line["row"] for line in reasons] == list(range(1, 11))
    assert reasons[5]["reason"] == "ches_ln 3 is number 10 of 10; 1 to 5 stay"
    assert not reasons[5]["kept"]
    assert reasons[3] | {"reason": ""} == {
        "source": str(data),
        "row": 4,
        "row_id": reasons[3]["row_id"],
        "ches_ln": -2.0,
        "kept": True,
        "reason": "",
        "flags": [],
    }
    about = json.loads((out / "filter.json").read_text())
    assert about["rules"] == {"ches_ln": {"keep": 0.5}}
    assert about["counts"] == {"rows": 10, "kept": 5, "dropped": 5, "set_aside": 0}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_reasons_speak_of_groups_and_thresholds(align: Align, data: Path, tmp_path: Path) -> None:
    kept_by(align, data, "--keep", 0.25, "--group", "task")
    reasons = read(tmp_path / "kept" / "reasons.jsonl")
    assert reasons[5]["reason"] == "ches_ln 3 is number 4 of 4 of task 'ode'; 1 stays"
    align("filter", data, "--by", "ches_ln", "--above", -1, "--below", 0.5, "-o", tmp_path / "between")
    reasons = read(tmp_path / "between" / "reasons.jsonl")
    assert reasons[0]["reason"] == "ches_ln 0.5 is not below 0.5 and above -1"


def test_the_page_needs_nothing_but_itself(align: Align, data: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    write(data, [*rows(), pair(10, ches_ln=9.0, task="ode") | {"prompt": hostile}])
    assert align("filter", data, "--by", "ches_ln", "--keep", 0.5, "-o", tmp_path / "kept").exit_code == 0
    page = (tmp_path / "kept" / "report.html").read_text(encoding="utf-8")
    assert hostile not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/1999/xlink", "")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count("<svg") == 3  # the score, and the lengths of both answers
    assert "Cut at 0.5" in page
    assert "Rows by task" in page
    assert "Both ends of ches_ln" in page


def test_flags(align: Align, tmp_path: Path) -> None:
    """A row again, pairs of equal answers, and answers of one token: as align score says, or by words."""
    lines = [pair(n, ches_ln=float(n)) for n in range(4)]
    lines += [{**lines[1], "ches_ln": 7.0}, {**pair(9, ches_ln=0.0), "rejected": "a long answer 9"}]
    lines += [{"prompt": "yes or no", "chosen": "yes", "rejected": "no", "ches_ln": 0.0}]
    lines += [{"prompt": "left or right", "chosen": "left", "rejected": "right", "ches_ln": 0.1, "one_token": False}]
    lines += [{"prompt": "now or never", "chosen": "now", "rejected": "never", "ches_ln": 0.2, "one_token": True}]
    data = write(tmp_path / "scored.jsonl", lines)
    result = align("filter", data, "--by", "ches_ln", "--keep", 0.5, "-o", tmp_path / "kept")
    flags = {line["row"]: line["flags"] for line in read(tmp_path / "kept" / "reasons.jsonl")}
    assert flags == {
        **{row: [] for row in (1, 2, 3, 4, 6, 8)},
        5: ["repeats row 2"],
        7: ["one-word answers"],
        9: ["one-token answers"],
    }
    told = {line["row"]: line["row_id"] for line in read(tmp_path / "kept" / "reasons.jsonl")}
    assert told[6] == row_id("question 9", "a long answer 9", "a long answer 9")
    (fault,) = read(tmp_path / "kept" / "rejected_rows.jsonl")
    assert (fault["row"], fault["reason"]) == (6, "equal to rejected")
    assert "kept 4 · dropped 4 · set aside 1 of 9 rows" in result.stdout
    assert "pairs of equal answers (set aside) 1 · rows that repeat another 1 · one-token answers" in result.stdout


def test_rows_without_a_score_are_set_aside(align: Align, tmp_path: Path) -> None:
    bad = (None, "high", True, float("nan"))
    lines = [*rows(), *(pair(20 + n, ches_ln=value) for n, value in enumerate(bad)), pair(30)]
    data = write(tmp_path / "scored.jsonl", lines)
    result = align("filter", data, "--by", "ches_ln", "--keep", 1, "-o", tmp_path / "kept")
    assert len(read(tmp_path / "kept" / "kept.jsonl")) == 10
    reasons = [fault["reason"] for fault in read(tmp_path / "kept" / "rejected_rows.jsonl")]
    missing = "missing or null: score the row, or drop it"
    assert reasons == [missing, "'high' is not a number", "True is not a number", "nan is not finite", missing]
    told = read(tmp_path / "kept" / "reasons.jsonl")
    assert [line["row"] for line in told] == list(range(1, 16))
    last = {"row_id": row_id(*(pair(30)[name] for name in ("prompt", "chosen", "rejected"))), "kept": False}
    assert told[-1] == {**told[-1], **last, "reason": f"set aside: ches_ln: {missing}"}
    assert "5 of 15 rows cannot be used" in result.stdout
    assert not (tmp_path / "kept" / "dropped.jsonl").exists()


def test_csv_in_parquet_out(align: Align, tmp_path: Path) -> None:
    """Cells of CSV files are text; what is written is what was read, and can be filtered again."""
    data = tmp_path / "scored.csv"
    data.write_text("prompt,chosen,rejected,quality\np,a,b,3.5\nq,c,d,1e0\nr,e,f,\n", encoding="utf-8")
    result = align("filter", data, "--by", "quality", "--above", 3, "--parquet", "-o", tmp_path / "kept")
    assert result.exit_code == 0
    assert pq.read_table(tmp_path / "kept" / "kept.parquet").to_pylist() == [
        {"prompt": "p", "chosen": "a", "rejected": "b", "quality": "3.5"}
    ]
    again = align("filter", tmp_path / "kept" / "kept.parquet", "--by", "quality", "--above", 3, "--dry-run")
    assert again.exit_code == 0
    assert "kept 1" in again.stdout


def test_single_answers(align: Align, tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "completion": "x" * (n + 1), "reward": n} for n in range(4)]
    data = write(tmp_path / "scored.jsonl", lines)
    result = align("filter", data, "--by", "reward", "--window", 0.5, 1, "-o", tmp_path / "kept")
    assert [row["reward"] for row in read(tmp_path / "kept" / "kept.jsonl")] == [2, 3]
    assert "mean length of completion 2 -> 4 characters" in result.stdout


def test_a_dry_run_writes_nothing(align: Align, data: Path, tmp_path: Path) -> None:
    result = align("filter", data, "--by", "ches_ln", "--keep", 0.5, "--dry-run", "-o", tmp_path / "kept")
    assert "kept 5 · dropped 5 · set aside 0 of 10 rows" in result.stdout
    assert list(tmp_path.iterdir()) == [data]


def test_nothing_is_overwritten(align: Align, data: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    result = align("filter", data, "--by", "ches_ln", "--keep", 0.5, "-o", tmp_path / "kept")
    assert result.exit_code == 1
    assert "is there already: name another output" in result.stderr
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_made(align: Align, data: Path) -> None:
    result = align("filter", data, "--by", "ches_ln", "--keep", 0.5, "-o", data / "kept")
    assert result.exit_code == 1
    assert f"{data}: cannot be written in" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--by", "ches_lm", "--keep", 0.5), 1, "no column ches_lm; did you mean ches_ln?"),
        (("--by", "quality", "--keep", 0.5), 1, "no column quality; it has prompt, chosen, rejected, ches_ln, task"),
        (("--by", "last_inner", "--keep", 0.5), 1, "--with last_inner --model MODEL --output scored.jsonl"),
        (("--by", "ches_ln", "--keep", 0.5, "--group", "lang"), 1, "no column lang"),
        (("--by", "ches_ln", "--keep", 1.5), 2, "--keep  is 1.5; it must be at most 1"),
        (("--by", "ches_ln"), 2, "has no rule; give one of keep, window, below, above"),
        (("--by", "ches_ln", "--keep", 0.5, "--below", 0), 2, "has keep and below; give one of"),
        (("--by", "ches_ln", "--below", 0, "--above", 1), 2, "nothing lies between"),
        (("--by", "ches_ln", "--window", 0.5, 0.2), 2, "it must be [from, to], with 0 <= from < to <= 1"),
        (("--by", "ches_ln", "--below", 0, "--group", "task"), 2, "group goes with keep and window"),
        (("--by", "ches_ln", "--keep", 0.5, "--quota", "ode=0.1"), 2, "quotas go with keep"),
        (("--by", "ches_ln", "--keep", 0.5, "--group", "task", "--quota", "ode"), 2, "is not GROUP=FRACTION"),
        (
            ("--by", "ches_ln", "--keep", 0.5, "--group", "task", "--quota", "ode=0.1", "--quota", "ode=0.9"),
            2,
            "'ode=0.9': ode has 0.1 already",
        ),
        (("--by", "ches_ln", "--keep", 0.5, "--group", "task", "--quota", "od=0.1"), 1, "no row has task 'od'"),
        (
            ("--by", "ches_ln", "--above", 5),
            1,
            "no row of 10 is kept by ches_ln: above 5: ches_ln lies between -2 and 3",
        ),
    ],
)
def test_what_is_refused(
    align: Align, data: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    result = align("filter", data, *options, "-o", tmp_path / "kept")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert list(tmp_path.iterdir()) == [data]
