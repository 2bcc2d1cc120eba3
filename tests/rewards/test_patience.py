"""A time limit for anyone's code."""

from __future__ import annotations

import sys
import threading

import pytest

from align.rewards.patience import NoAnswerError, answer_within


def test_what_it_gives_and_raises():
    assert answer_within(10, "limit", lambda: None) is None
    assert answer_within(10, "limit", lambda: [1]) == [1]
    with pytest.raises(ZeroDivisionError):
        answer_within(10, "limit", lambda: 1 / 0)


def test_what_hangs_is_left():
    released = threading.Event()
    with pytest.raises(NoAnswerError, match=r"it has not answered in 0\.05 s \(a\.limit\)"):
        answer_within(0.05, "a.limit", released.wait)
    released.set()


def test_what_ends_the_process_gives_no_answer():
    with pytest.raises(NoAnswerError, match="SystemExit: 3"):
        answer_within(10, "limit", lambda: sys.exit(3))
