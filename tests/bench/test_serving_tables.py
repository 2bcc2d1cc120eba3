"""Ratios and percentiles of the serving bench's tables."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

made = runpy.run_path(str(Path(__file__).with_name("serving_tables.py")))
FREE, GREEDY, tables = made["FREE"], made["GREEDY"], made["tables"]
mean_of_logs, percentile = made["mean_of_logs"], made["percentile"]


def test_ratios_are_of_the_same_round_and_medians_over_them() -> None:
    """AWRS does 90, 160 and 60 tokens a CPU second where free text does 100, 200 and 50: 0.9, 0.8 and 1.2."""
    rows = [
        {"of": "offline", "way": way, "at": 8, "round": turn, "tokens": tokens, "wall": 2.0, "cpu": 1.0}
        | {"waits": [0.1 * (turn + 1), 0.5], "evaluations": 2 * tokens}
        for way, drawn in ((FREE, (100, 200, 50)), ("AWRS, cheap regex", (90, 160, 60)))
        for turn, tokens in enumerate(drawn)
    ]
    (line,) = [line for line in tables(rows) if "AWRS" in line]
    assert line.split(" | ") == [
        *("| 8", "AWRS, cheap regex", "45", "90", "0.90 (0.80 to 1.20)", "", "0.30, 0.50 of 6", "2.0 |"),
    ]


def test_a_way_that_was_not_run_beside_leaves_its_column_empty() -> None:
    rows = [
        {"of": "threads", "way": GREEDY, "at": 1, "round": 0, "tokens": 10, "wall": 1.0, "cpu": 0.0, "waits": [1.0]}
        | {"evaluations": 0}
    ]
    (line,) = [line for line in tables(rows) if GREEDY in line]
    assert line == f"| 1 | {GREEDY} | 10 | nan |  |  | 1.00, 1.00 of 1 |  |"


def test_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.99) == 4.0
    assert percentile([7.0], 0.5) == 7.0


def test_mean_of_logs() -> None:
    """log((e^0 + e^log 3 + 0) / 3) = log(4 / 3)."""
    assert mean_of_logs([0.0, 1.0986122886681098, float("-inf")]) == pytest.approx(0.28768207)
