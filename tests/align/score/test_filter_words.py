"""align filter: what is said of shares of groups."""

from __future__ import annotations

import logging

import pytest

from align.config.schema import FilterRule
from align.score.filter import Candidate, judge


@pytest.mark.parametrize(
    ("sizes", "keep", "said"),
    [
        ({"a": 3, "b": 3}, 0.5, "the lowest 50 % of each task keeps 2 of 6 rows where 3 were asked for"),
        ({"a": 1, "b": 1, "c": 1}, 0.1, "keeps 3 of 3 rows where 0 were asked for"),
        ({"a": 2, "b": 4}, 0.5, ""),
        ({"a": 100}, 0.29, ""),
    ],
)
def test_a_share_that_groups_cannot_have_is_told(
    sizes: dict[str, int], keep: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        Candidate("x", n, f"{task}{n}", {"q": float(n)}, {"task": task}, {}, "")
        for task, size in sizes.items()
        for n in range(size)
    ]
    with caplog.at_level(logging.WARNING):
        judge(rows, {"q": FilterRule(keep=keep, group="task")})
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
