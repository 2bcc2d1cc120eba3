"""Python predicates: whole characters alone, errors with the text, and calls that are stopped in time."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from align.decoding.constraints import ConstraintError, PythonPredicate, Vocabulary
from align.decoding.constraints.conformance import check
from align.decoding.constraints.worker import Worker

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a call in C code puts the end off")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_sees_whole_characters_alone(letters: Vocabulary) -> None:
    """é日 in pieces: a character that has begun is every one that it may become, and nothing may end there."""
    asked: list[tuple[str, bool]] = []

    def accepts(text: str, complete: bool) -> bool:
        asked.append((text, complete))
        return "é\n日".startswith(text)

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
    before_e = [(chr(code), False) for code in range(0xC0, ord("é") + 1)]
    before_day = [("é\n" + chr(code), False) for code in range(0x65C0, ord("日") + 1)]
    whole = [[("é\n", False), ("é\n", True)], [("é\n日", False), ("é\n日", True)]]
    assert asked == [*before_e, *whole[0], *before_day, *whole[1]]


@pytest.mark.parametrize("wanted", ["a", "é", "日", "🎉", "\u0800", "\ud7ff", "\uffff", "\U000e0041"])
def test_begins_no_character_that_is_not_wanted(wanted: str, letters: Vocabulary) -> None:
    """All first and second bytes of UTF-8: those alone that lead to the one character."""
    constraint = PythonPredicate(lambda text, complete: wanted.startswith(text), letters)
    said = wanted.encode()
    begun = {byte for byte in range(256) if constraint.advance(constraint.start(), byte)}
    assert begun == {said[0]}
    if len(said) > 1:
        state = constraint.advance(constraint.start(), said[0])
        assert state is not None
        assert [byte for byte in range(256) if constraint.advance(state, byte)] == [said[1]]


def test_a_verdict_of_numpy_is_one(letters: Vocabulary) -> None:
    constraint = PythonPredicate(lambda text, complete: np.bool_(True), letters)  # type: ignore[arg-type, return-value]
    assert constraint.may_end(constraint.start()) is True


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
    with pytest.raises(ConstraintError, match=r"^python:predicates:absent: predicates has no function absent"):
        PythonPredicate("predicates:absent", letters, timeout=timeout)
    raising = PythonPredicate("predicates:raises", letters, timeout=timeout)
    said = r"python:predicates:raises: raised ZeroDivisionError: .*; on 'a', complete=False"
    with pytest.raises(ConstraintError, match=said):
        raising.advance(raising.start(), ord("a"))
    exits = PythonPredicate("predicates:exits", letters, timeout=timeout)
    with pytest.raises(ConstraintError, match=r"python:predicates:exits: raised SystemExit: 0; on 'a'"):
        exits.advance(exits.start(), ord("a"))
    number = PythonPredicate("predicates:number", letters, timeout=timeout)
    with pytest.raises(ConstraintError, match=r"python:predicates:number: returned .?1.?, which is no bool; on 'a'"):
        number.advance(number.start(), ord("a"))


def test_worker_conforms() -> None:
    few = Vocabulary([b"1", b"20", b"2", b"0", b"x", b"\xc2", b"\xb2", b"\xe6", None], frozenset({8}))
    constraint = PythonPredicate("predicates:digits", few, timeout=20.0)
    check(constraint, few, texts=["120", "1²"], complete=str.isdigit, walks=2, length=3)


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


@pytest.mark.parametrize(
    ("source", "reason", "in_process"),
    [
        ("import sys; sys.exit(0)", "importing own_module failed: SystemExit: 0", True),
        (
            "import absent_thing",
            "importing own_module failed: ModuleNotFoundError: No module named 'absent_thing'",
            True,
        ),
        ("import os; os._exit(4)", r"ended its process \(exit code 4\) while its module was imported", False),
    ],
)
def test_modules_that_cannot_be_imported(
    source: str, reason: str, in_process: bool, letters: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    for timeout in (20.0, None) if in_process else (20.0,):
        with pytest.raises(ConstraintError, match=f"^python:own_module:f: {reason}$"):
            PythonPredicate("own_module:f", letters, timeout=timeout)


def test_an_interrupted_question_leaves_no_answer_behind(letters: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the question: its answer, False, is not the next one's, whose text is taken."""
    constraint = PythonPredicate("predicates:digits", letters, timeout=20.0)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            constraint.advance(constraint.start(), ord("x"))
    assert constraint.advance(constraint.start(), ord("1")) == ("1", b"")


def test_a_worker_is_quiet_and_gives_the_function_no_input(
    letters: Vocabulary, capfd: pytest.CaptureFixture[str]
) -> None:
    assert PythonPredicate("predicates:reads", letters, timeout=20.0).start() == ("", b"")
    assert capfd.readouterr().err == ""


def test_a_worker_is_started_again_after_the_thread_that_started_it(letters: Vocabulary) -> None:
    with ThreadPoolExecutor(1) as pool:
        constraint = pool.submit(PythonPredicate, "predicates:digits", letters, timeout=20.0).result()
    assert isinstance(constraint._ask, Worker)
    if sys.platform == "linux":
        assert constraint._ask._process is not None
        assert constraint._ask._process.wait(20.0) == -signal.SIGKILL
    assert constraint.advance(constraint.start(), ord("1")) == ("1", b"")


@pytest.mark.parametrize("function", ["slow", pytest.param("counts", marks=LINUX)])
def test_a_worker_ends_with_the_process_that_asks(function: str) -> None:
    """Killed while a call goes on that would never end."""
    source = (
        "import threading, time; from align.decoding.constraints import PythonPredicate, Vocabulary\n"
        f"v = Vocabulary([b'x', None], frozenset({{1}}))\n"
        f"p = PythonPredicate('predicates:{function}', v, timeout=500)\n"
        "threading.Thread(target=lambda: p.advance(p.start(), 0), daemon=True).start()\n"
        "time.sleep(0.1); print('asked', flush=True); time.sleep(60)"
    )
    path = {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", source], env=os.environ | path, **pipes) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"asked\n"
        asking.kill()
        asking.communicate(timeout=10)  # the worker has the same stderr: it comes to an end with both


def test_a_timeout_needs_a_name_and_a_time(letters: Vocabulary) -> None:
    with pytest.raises(ConstraintError, match="a timeout needs the function by name"):
        PythonPredicate(lambda text, complete: True, letters, timeout=1.0)
    for timeout in (0, math.inf, math.nan):
        with pytest.raises(ConstraintError, match=f"timeout is {timeout}; give seconds above zero, and not for ever"):
            PythonPredicate("predicates:slow", letters, timeout=timeout)
