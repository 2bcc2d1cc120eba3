"""What a rule keeps of a column: shares, thresholds, groups, ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.schema import FilterRule
from align.data.fields import FieldError
from align.score.select import finite_number, places, ranks, standing


def kept(scores: Sequence[float], groups: Sequence[str] | None = None, **rule: Any) -> list[int]:
    found = standing("q", [float(score) for score in scores], FilterRule(**rule), groups)
    return [place for place, (stays, _) in enumerate(found) if stays]


def test_lowest_first_with_stable_ties() -> None:
    """Of 5 rows, half is 2: the 0 and, of three ones, the first in the data."""
    scores = [1.0, 3.0, 1.0, 0.0, 1.0]
    assert kept(scores, keep=0.5) == [0, 3]
    assert ranks(scores) == [1, 4, 2, 0, 3]


@pytest.mark.parametrize(
    ("rows", "share", "count"), [(374, 0.05, 18), (100, 0.29, 29), (3, 0.1, 1), (7, 1.0, 7), (10, 0.3, 3)]
)
def test_floor_of_the_share_as_written(rows: int, share: float, count: int) -> None:
    """.29 * 100 is 28.999999999999996 in binary, and 29 as it is written; less than one row is one."""
    assert places(rows, FilterRule(keep=share)) == (0, count)
    assert len(kept(range(rows), keep=share)) == count


@pytest.mark.parametrize(
    ("rows", "window", "expected"),
    [(10, [0.5, 1.0], (5, 10)), (100, [0.29, 0.3], (29, 30)), (3, [0.9, 0.95], (2, 3)), (3, [0.0, 0.1], (0, 1))],
)
def test_windows(rows: int, window: list[float], expected: tuple[int, int]) -> None:
    """Floors of both ends, and one row at least, the highest where the window lies over it."""
    assert places(rows, FilterRule(window=window)) == expected


def test_thresholds_leave_themselves_out() -> None:
    scores = [0.0, 1.0, 2.0, 3.0]
    assert kept(scores, below=2.0) == [0, 1]
    assert kept(scores, above=2.0) == [3]
    assert kept(scores, below=3.0, above=0.0) == [1, 2]
    assert kept(scores, below=0.0) == []


def test_each_group_keeps_its_share() -> None:
    """Half of a's four and of b's three, though every b is higher: 2 and 1."""
    scores, groups = [4.0, 9.0, 1.0, 8.0, 2.0, 7.0, 3.0], list("ababaab")
    assert kept(scores, groups, keep=0.5, group="g") == [2, 4, 6]
    assert ranks(scores, groups) == [2, 2, 0, 1, 1, 3, 0]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0.01, 1))
def test_nothing_dropped_is_lower_than_what_is_kept(scores: list[int], share: float) -> None:
    stay = kept(scores, keep=share)
    dropped = set(range(len(scores))) - set(stay)
    assert all((scores[k], k) < (scores[d], d) for k in stay for d in dropped)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "q: missing or null"),
        ("high", "q: 'high' is not a number"),
        (True, "q: True is not a number"),
        ([1.0], r"q: \[1.0\] is not a number"),
        (math.nan, "q: nan is not finite"),
        ("-inf", "q: -inf is not finite"),
    ],
)
def test_numbers(cell: object, message: str) -> None:
    """Text of a number is one: a CSV file has nothing else."""
    assert (finite_number("q", 2), finite_number("q", "1e0")) == (2.0, 1.0)
    with pytest.raises(FieldError, match=message):
        finite_number("q", cell)
