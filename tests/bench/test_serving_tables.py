"""Ratios and percentiles of the serving bench's tables, and which of them a run replaces."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
made = runpy.run_path(str(HERE / "serving_tables.py"))
FREE, GREEDY, MARK, tables, page = made["FREE"], made["GREEDY"], made["MARK"], made["tables"], made["page"]
mean_of_logs, percentile = made["mean_of_logs"], made["percentile"]
PAGE = Path("docs/results/serving.md")


def test_ratios_are_of_the_same_round_and_medians_over_them() -> None:
    """AWRS does 90, 160 and 60 tokens a CPU second where free text does 100, 200 and 50: 0.9, 0.8 and 1.2."""
    rows = [
        {"of": "offline", "way": way, "at": 8, "round": turn, "tokens": tokens, "wall": 2.0, "cpu": 1.0}
        | {"waits": [0.1 * (turn + 1), 0.5], "evaluations": 2 * tokens}
        for way, drawn in ((FREE, (100, 200, 50)), ("AWRS, cheap regex", (90, 160, 60)))
        for turn, tokens in enumerate(drawn)
    ]
    (line,) = [line for line in tables(rows)["offline"] if "AWRS" in line]
    assert line.split(" | ") == [
        *("| 8", "AWRS, cheap regex", "45", "90", "0.90 (0.80 to 1.20)", "", "0.30, 0.50 of 6", "2.0 |"),
    ]


def test_a_way_that_was_not_run_beside_leaves_its_column_empty() -> None:
    rows = [
        {"of": "threads", "way": GREEDY, "at": 1, "round": 0, "tokens": 10, "wall": 1.0, "cpu": 0.0, "waits": [1.0]}
        | {"evaluations": 0}
    ]
    (line,) = [line for line in tables(rows)["threads"] if GREEDY in line]
    assert line == f"| 1 | {GREEDY} | 10 | nan |  |  | 1.00, 1.00 of 1 |  |"


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.99) == 4.0
    assert percentile([7.0], 0.5) == 7.0


def test_mean_of_logs() -> None:
    """log((e^0 + e^log 3 + 0) / 3) = log(4 / 3)."""
    assert mean_of_logs([0.0, 1.0986122886681098, float("-inf")]) == pytest.approx(0.28768207)


def alone(ms: float) -> dict[str, Any]:
    return {"of": "rows", "vocabulary": 5, "constraint": "none", "batch": 1, "ms": ms, "low": ms, "high": ms}


def peak(mib: float) -> dict[str, Any]:
    return {"of": "memory", "way": FREE, "at": 1, "before": 2.0, "peak": mib}


def test_a_page_has_the_parts_that_were_run_anew_and_keeps_the_others() -> None:
    """The rows of some are on another machine; those of others were made before, and their tables stay."""
    there = f"# Serving\n\nProse.\n\n{MARK}\n\n## One process\n\n| theirs |\n\n## The sampler alone\n\n| old |\n"
    rows = [alone(1.0), peak(7.0), {"of": "memory", "about": "a machine"}]
    written = page(there, tables(rows), {"memory"})
    assert written.startswith(there.strip())
    told = written[len(there) :].splitlines()
    assert told[:4] == ["", "## Memory, MiB resident", "", "a machine"]
    assert told[-1] == f"| {FREE} | 2 | 7 |"
    again = page(written, tables([alone(3.0), peak(9.0)]), {"rows"})
    assert "| theirs |" in again
    assert "3.000" in again
    assert f"| {FREE} | 2 | 7 |" in again
    assert "old" not in again
    order = ["## One process", "## The sampler alone", "## Memory, MiB resident"]
    assert [line for line in again.splitlines() if line.startswith("## ")] == order
    assert page(again, {}, set()) == again


def test_the_published_page_stays_as_it_is_where_nothing_was_run() -> None:
    published = (HERE.parents[1] / PAGE).read_text(encoding="utf-8")
    assert page(published, {}, set()).strip() == published.strip()


def test_what_is_written_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the published page, part by part, also where a later one fails; a quick run leaves it alone."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    import serving

    def run(part: str, options: argparse.Namespace, file: Path) -> None:
        if part == "load":
            raise SystemExit("load ended with 1")
        with file.open("a") as kept:
            kept.write(json.dumps({"rows": alone(1.0), "memory": peak(7.0)}[part]) + "\n")

    monkeypatch.setattr(serving, "run", run)
    PAGE.parent.mkdir(parents=True)
    PAGE.write_text("Prose.\n", encoding="utf-8")
    for more in (["--quick"], ["--rounds", "1"]):
        assert PAGE.read_text(encoding="utf-8") == "Prose.\n"
        monkeypatch.setattr(sys, "argv", ["serving.py", "--only", "rows", "load", *more])
        if "--quick" in more:
            serving.main()  # which has no load
        else:
            with pytest.raises(SystemExit, match="load ended with 1"):
                serving.main()
    assert "1.000" in PAGE.read_text(encoding="utf-8")
