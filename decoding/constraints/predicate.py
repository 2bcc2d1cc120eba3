"""A constraint from a Python function on text."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .protocol import ConstraintError, Vocabulary
from .worker import Worker

Predicate = Callable[[str, bool], bool]
State = tuple[str, bytes]  # the characters so far, and the first bytes of one that is not whole yet


class PythonPredicate:
    """The texts that a function ``accepts(text, complete) -> bool`` takes.

    It is asked two questions: with ``complete=False``, may some continuation of ``text`` (or the text itself) be
    taken? With ``complete=True``, is ``text`` taken as it stands? Answering True to the first without knowing costs
    particles, answering False wrongly loses texts; without any idea of prefixes, return ``not complete or ...``.
    The function sees whole characters alone: the first bytes of one wait until the rest has come, and bytes that are
    no UTF-8 are never allowed. It must depend on its arguments alone.

    Args:
        function: the function, or its name as ``module:function``.
        timeout: seconds that one call may take. The function then runs in a process of its own, which is killed and
            started again; it must be given by name. Without it, the function runs here and cannot be interrupted.

    Raises:
        ConstraintError: no such function, it refuses the empty text's continuations (nothing satisfies it), and later
            whatever it raises, a verdict that is no bool, or a call over time: always with the text.
    """

    def __init__(self, function: Predicate | str, vocabulary: Vocabulary, *, timeout: float | None = None) -> None:
        self.vocabulary = vocabulary
        self.name = f"python:{function if isinstance(function, str) else getattr(function, '__qualname__', function)}"
        if timeout is None:
            self._ask = load(function) if isinstance(function, str) else function
        elif isinstance(function, str):
            self._ask = Worker(function, timeout)
        else:
            raise ConstraintError(f"{self.name}: a timeout needs the function by name, as module:function")
        if not self._verdict("", False):
            raise ConstraintError(f"{self.name}: nothing satisfies it: it says that no text can follow the empty one")

    def start(self) -> State:
        return "", b""

    def advance(self, state: State, token: int) -> State | None:
        said = self.vocabulary.tokens[token]
        if said is None:
            return None
        text, rest = state
        said = rest + said
        try:
            new, rest = said.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return None
            new, rest = said[: error.start].decode("utf-8"), said[error.start :]
        text += new
        # A character that has only begun changes nothing that the function could see.
        return (text, rest) if not new or self._verdict(text, False) else None

    def may_end(self, state: State) -> bool:
        text, rest = state
        return not rest and self._verdict(text, True)

    def _verdict(self, text: str, complete: bool) -> bool:
        try:
            verdict = self._ask(text, complete)
        except ConstraintError as error:
            raise ConstraintError(f"{self.name}: {error}") from None
        except Exception as error:
            raise ConstraintError(
                f"{self.name}: raised {type(error).__name__}: {error}; on {text!r}, complete={complete}"
            ) from error
        if not isinstance(verdict, bool):
            raise ConstraintError(
                f"{self.name}: returned {verdict!r}, which is no bool; on {text!r}, complete={complete}"
            )
        return verdict


def load(name: str) -> Predicate:
    """``module:function`` to the function. ConstraintError where there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConstraintError(f"python:{name}: not of the form python:module:function")
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:
        raise ConstraintError(
            f"python:{name}: importing {module} failed: {type(error).__name__}: {error}; "
            "its folder must be on the path (PYTHONPATH=.)"
        ) from error
    if not callable(found):
        raise ConstraintError(f"python:{name}: {module} has no function {function}")
    return found  # type: ignore[no-any-return]
