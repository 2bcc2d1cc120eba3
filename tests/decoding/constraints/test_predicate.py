"""Python predicates: whole characters alone, errors with the text, and calls that are stopped in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from align.decoding.constraints import ConstraintError, PythonPredicate, Vocabulary
from align.decoding.constraints.conformance import check


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_sees_whole_characters_alone(letters: Vocabulary) -> None:
    """é日 in pieces: nothing is asked while a character waits for its rest, and nothing may end there."""
    asked: list[tuple[str, bool]] = []

    def accepts(text: str, complete: bool) -> bool:
        asked.append((text, complete))
        return True

    constraint = PythonPredicate(accepts, letters)
    state = constraint.start()
    asked.clear()
    pieces = [letters.tokens.index(said) for said in (b"\xc3", b"\xa9\n", b"\xe6\x97", b"\xa5")]
    ends = []
    for token in pieces:
        state = constraint.advance(state, token)
        assert state is not None
        ends.append(constraint.may_end(state))
    assert ends == [False, True, False, True]
    assert asked == [("é\n", False), ("é\n", True), ("é\n日", False), ("é\n日", True)]


@pytest.mark.parametrize(
    "said",
    [b"\xff", b"\xa9", b"\xc3(", b"\xed\xa0", b"\xc0", b"\xf5", b"\xe0\x80"],
    ids=["ff", "alone", "cut short", "surrogate", "overlong", "too high", "overlong of three"],
)
def test_bytes_that_are_no_character_are_refused(said: bytes, letters: Vocabulary) -> None:
    """As early as UTF-8 can tell: at the byte after which no continuation is a character."""
    constraint = PythonPredicate(lambda text, complete: True, letters)
    state = constraint.start()
    for byte in said[:-1]:
        state = constraint.advance(state, byte)
        assert state is not None
    assert constraint.advance(state, said[-1]) is None


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_errors_name_function_text_and_question(timeout: float | None, letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="python:predicates:never: nothing satisfies it"):
        PythonPredicate("predicates:never", letters, timeout=timeout)
    with pytest.raises(ConstraintError, match=r"python:predicates:absent: predicates has no function absent"):
        PythonPredicate("predicates:absent", letters, timeout=timeout)
    raising = PythonPredicate("predicates:raises", letters, timeout=timeout)
    said = r"python:predicates:raises: raised ZeroDivisionError: .*; on 'a', complete=False"
    with pytest.raises(ConstraintError, match=said):
        raising.advance(raising.start(), ord("a"))
    number = PythonPredicate("predicates:number", letters, timeout=timeout)
    with pytest.raises(ConstraintError, match=r"python:predicates:number: returned .?1.?, which is no bool; on 'a'"):
        number.advance(number.start(), ord("a"))


def test_worker_conforms(letters: Vocabulary) -> None:
    constraint = PythonPredicate("predicates:digits", letters, timeout=20.0)
    check(constraint, letters, texts=["120"], complete=str.isdigit, walks=1, length=3, tokens=40)


def test_a_call_over_time_is_stopped_and_the_next_is_answered(letters: Vocabulary) -> None:
    constraint = PythonPredicate("predicates:slow", letters, timeout=0.5)
    before = time.monotonic()
    with pytest.raises(ConstraintError, match=r"python:predicates:slow: took over 0.5 s on 'x', complete=False"):
        constraint.advance(constraint.start(), ord("x"))
    assert time.monotonic() - before < 10
    assert constraint.advance(constraint.start(), ord("y")) == ("y", b"")


def test_a_worker_that_dies_is_started_again(letters: Vocabulary) -> None:
    constraint = PythonPredicate("predicates:quits", letters, timeout=20.0)
    for _ in range(2):
        with pytest.raises(ConstraintError, match=r"ended its process \(exit code 3\) on 'a', complete=False"):
            constraint.advance(constraint.start(), ord("a"))


def test_a_timeout_needs_a_name_and_a_time(letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="a timeout needs the function by name"):
        PythonPredicate(lambda text, complete: True, letters, timeout=1.0)
    with pytest.raises(ConstraintError, match="timeout is 0; give seconds above zero"):
        PythonPredicate("predicates:slow", letters, timeout=0)
