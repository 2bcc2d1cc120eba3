"""``align report diff`` and its exit codes; ``align report RUN`` beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Align = Callable[..., Result]


def write(path: Path, accuracy: float, **more: Any) -> Path:
    metrics = {
        "accuracy": {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 100},
        "ties": {"value": 1 - accuracy, "low": 0.0, "high": 1.0, "n": 100},
    }
    result = {"suite": "preference", "schema": 1, "n": 100, "metrics": metrics, "rows": [], "settings": {"seed": 0}}
    path.write_text(json.dumps({**result, **more}))
    return path


def test_exit_codes(align: Align, tmp_path: Path) -> None:
    """Two intervals of 0.05 make one of 0.0707, at 99 % of 0.093: 0.2 less is worse, 0.08 less is not at 99 %."""
    a, b = write(tmp_path / "a.json", 0.8), write(tmp_path / "b.json", 0.6, settings={"seed": 1})
    worse = align("report", "diff", a, b)
    assert worse.exit_code == 1
    assert "worse" in worse.stdout
    assert "1 of 2 metrics worse beyond 95% intervals" in worse.stdout
    assert "neither is better" in worse.stdout
    assert "settings differ: seed is 0 and 1" in worse.stdout
    assert align("report", "diff", b, a).exit_code == 0
    assert align("report", "diff", a, a).exit_code == 0
    c = write(tmp_path / "c.json", 0.72)
    assert align("report", "diff", a, c).exit_code == 1
    assert align("report", "diff", a, c, "--level", "0.99").exit_code == 0


def test_what_b_lacks(align: Align, tmp_path: Path) -> None:
    """What is no longer measured fails; what is measured anew does not; other rows are said."""
    a = write(tmp_path / "a.json", 0.8, rows=[{"row_id": "a"}, {"row_id": "b"}])
    metrics = json.loads(a.read_text())["metrics"]
    b = write(tmp_path / "b.json", 0.8, metrics={"accuracy": metrics["accuracy"]}, rows=[{"row_id": "c"}])
    lost = align("report", "diff", a, b)
    assert lost.exit_code == 1
    assert "ties: not in the second" in lost.stdout
    assert "0 of 1 metrics worse beyond 95% intervals; 1 that only A has" in lost.stdout
    assert "0 rows are in both, of 2 and 1: they are compared unpaired" in lost.stdout
    more = align("report", "diff", b, a)
    assert (more.exit_code, "ties: not in the first" in more.stdout) == (0, True)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"suite": "displacement"}, "different suites"),
        ({"schema": 2}, "schema 2"),
        ({"metrics": 3}, "no results"),
    ],
)
def test_files_that_do_not_go_together(align: Align, tmp_path: Path, second: dict[str, Any], said: str) -> None:
    a, b = write(tmp_path / "a.json", 0.8), write(tmp_path / "b.json", 0.8, **second)
    done = align("report", "diff", a, b)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (2, True)


def test_files_that_are_no_results(align: Align, tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", 0.8)
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.json").write_text("{")
    for name, said in (
        ("b.json", "is no result of a suite"),
        ("c.json", "cannot be read"),
        ("d.json", "cannot be read"),
    ):
        done = align("report", "diff", a, tmp_path / name)
        assert (done.exit_code, said in " ".join(done.stderr.split())) == (2, True)
    assert align("report", "diff", a, a, "--level", "95").exit_code == 2


def test_report_of_a_run_needs_no_word(align: Align, tmp_path: Path) -> None:
    """Whatever is not ``diff`` names a run."""
    done = align("report", tmp_path / "nothing")
    assert done.exit_code == 1
    assert "nothing" in done.stderr
    assert "diff" in align("report", "--help").stdout
