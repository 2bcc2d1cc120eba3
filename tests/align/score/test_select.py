"""Which rows are kept: shares, thresholds, groups, ties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.score.select import keep_count, select, window


def test_lowest_first_with_stable_ties() -> None:
    """Of 5 rows, half is 2: the 0 and, of three ones, the first in the data."""
    found = select([1.0, 3.0, 1.0, 0.0, 1.0], keep=0.5)
    assert found.kept == [0, 3]
    assert found.ranks == [1, 4, 2, 0, 3]
    assert found.cuts == {"": 1.0}


@pytest.mark.parametrize(
    ("rows", "share", "count"), [(374, 0.05, 18), (100, 0.29, 29), (3, 0.1, 1), (7, 1.0, 7), (10, 0.3, 3)]
)
def test_floor_of_the_share_as_written(rows: int, share: float, count: int) -> None:
    """.29 * 100 is 28.999999999999996 in binary, and 29 as it is written; less than one row is one."""
    assert keep_count(rows, share) == count
    assert len(select(range(rows), keep=share).kept) == count


def test_thresholds_leave_themselves_out() -> None:
    scores = [0.0, 1.0, 2.0, 3.0]
    assert select(scores, below=2).kept == [0, 1]
    assert select(scores, above=2).kept == [3]
    assert select(scores, below=3, above=0).kept == [1, 2]
    assert select(scores, below=0).cuts == {"": None}


def test_each_group_keeps_its_share() -> None:
    """Half of a's four and of b's three, though every b is higher: 2 and 1."""
    found = select([4, 9, 1, 8, 2, 7, 3], keep=0.5, groups=list("ababaab"))
    assert found.kept == [2, 4, 6]
    assert found.cuts == {"a": 2.0, "b": 3.0}
    assert found.ranks == [2, 2, 0, 1, 1, 3, 0]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0.01, 1))
def test_nothing_dropped_is_lower_than_what_is_kept(scores: list[int], share: float) -> None:
    found = select(scores, keep=share)
    dropped = set(range(len(scores))) - set(found.kept)
    assert found.kept == sorted(found.kept)
    assert all((scores[k], k) < (scores[d], d) for k in found.kept for d in dropped)


@pytest.mark.parametrize(
    ("rows", "size", "quantile", "expected"),
    [
        (10, 4, 0.0, (0, 4)),
        (10, 4, 0.25, (0, 4)),
        (10, 4, 0.5, (2, 6)),
        (10, 4, 0.75, (5, 9)),
        (10, 4, 1.0, (6, 10)),
        (374, 19, 0.0, (0, 19)),
        (3, 5, 0.5, (0, 3)),
    ],
)
def test_windows_of_the_paper(rows: int, size: int, quantile: float, expected: tuple[int, int]) -> None:
    """``i = round(q (N - 1))``, ``[i - n // 2, i - n // 2 + n)``, moved into [0, N]."""
    assert window(rows, size, quantile) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [], "keep": 0.5}, "nothing to keep"),
        ({"scores": [0.0, math.nan], "keep": 0.5}, r"scores\[1\] is nan"),
        ({"scores": [0.0], "keep": 0.0}, r"keep is 0.0: it must be in \(0, 1\]"),
        ({"scores": [0.0], "keep": 1.5}, "keep is 1.5"),
        ({"scores": [0.0], "keep": math.nan}, "keep is nan"),
        ({"scores": [0.0]}, "a share or thresholds"),
        ({"scores": [0.0], "keep": 0.5, "below": 1.0}, "a share or thresholds"),
        ({"scores": [0.0], "below": math.nan}, "not a number"),
        ({"scores": [0.0], "below": 1.0, "above": 1.0}, "nothing lies between"),
        ({"scores": [0.0], "keep": 0.5, "groups": ["a", "b"]}, "2 groups for 1 scores"),
        ({"scores": [0.0], "below": 0.5, "groups": ["a"]}, "groups go with keep"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(**arguments)
    with pytest.raises(ValueError, match="around quantile"):
        window(10, 4, 1.5)
