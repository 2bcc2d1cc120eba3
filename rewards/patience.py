"""A time limit for anyone's code."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NoAnswerError(Exception):
    """Why there is none: it took too long, or it wanted to end the process."""


def answer_within(seconds: float, setting: str, call: Callable[[], T]) -> T:
    """What ``call`` gives, or raises; it has a thread of its own to hang in, which ends with the process.

    Args:
        setting: the recipe's name for ``seconds``, for the message.

    Raises:
        NoAnswerError: there is nothing after ``seconds``, or it calls ``sys.exit``.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="annotator", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswerError(f"it has not answered in {seconds:g} s ({setting})")
    if not raised:
        return found[0]
    if isinstance(raised[0], Exception):
        raise raised[0]
    raise NoAnswerError(f"it would have ended the process ({type(raised[0]).__name__}: {raised[0]})") from raised[0]
