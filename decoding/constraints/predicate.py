"""A constraint from a Python function on text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from typing import Any
from unicodedata import category

import numpy as np

from .protocol import ConstraintError, FunctionError, Vocabulary
from .worker import Worker, ask

LEAST = {2: 0x80, 3: 0x800, 4: 0x10000}
"""The first character of so many bytes; a smaller one is not written with as many."""

Predicate = Callable[[str, bool], bool]
Ask = Callable[[str, Sequence[str], bool], Iterator[Any]]  # the function's verdicts on a text with each of the ends
State = tuple[str, bytes]  # the characters so far, and the first bytes of one that is not whole yet


class PythonPredicate:
    """The texts that a function ``accepts(text, complete) -> bool`` takes.

    It is asked two questions: with ``complete=False``, may some continuation of ``text`` (or the text itself) be
    taken? With ``complete=True``, is ``text`` taken as it stands? Answering True to the first without knowing costs
    particles, answering False wrongly loses texts; without any idea of prefixes, return ``not complete or ...``.
    The function sees whole characters alone, and bytes that are no UTF-8 are never allowed. A token may end inside a
    character: it is allowed if one of the characters that it begins is, for which the function is asked about each of
    them until it takes one: 64 or 4,096, and some 80,000 after the first of four bytes, where only those count that
    Unicode has assigned. It must depend on its arguments alone.

    Args:
        function: the function, or its name as ``module:function``.
        timeout: seconds that one call may take. The function then runs in a process of its own, which is killed and
            started again; it must be given by name. Without it, the function runs here and cannot be interrupted.
        shared: that process is the one of all constraints here that share and name the function.

    Raises:
        ConstraintError: no such function, it refuses the empty text's continuations (nothing satisfies it), and later
            whatever it raises, a verdict that is no bool, or a call over time: always with the text.
    """

    def __init__(
        self,
        function: Predicate | str,
        vocabulary: Vocabulary,
        *,
        timeout: float | None = None,
        shared: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.name = f"python:{function if isinstance(function, str) else getattr(function, '__qualname__', function)}"
        if timeout is None:
            called = load(function) if isinstance(function, str) else function
            self._ask: Ask = lambda text, ends, complete: (called(text + end, complete) for end in ends)
        elif isinstance(function, str):
            self._ask = partial(ask, function, timeout) if shared else Worker(function, timeout)
        else:
            raise ConstraintError(f"{self.name}: a timeout needs the function by name, as module:function")
        self._rests = lru_cache(maxsize=4096)(self._takes_rest)
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
        if (new and not self._verdict(text, False)) or (rest and not self._rests(text, rest)):
            return None
        return text, rest

    def may_end(self, state: State) -> bool:
        text, rest = state
        return not rest and self._verdict(text, True)

    def _takes_rest(self, text: str, rest: bytes) -> bool:
        """Whether the function takes one of the characters that begin with ``rest``, after ``text``."""
        return self._takes_any(text, _characters(rest), False)

    def _verdict(self, text: str, complete: bool) -> bool:
        return self._takes_any(text, ("",), complete)

    def _takes_any(self, before: str, ends: Sequence[str], complete: bool) -> bool:
        """Whether the function takes ``before`` with one of the ends: asked in order, until it takes one."""
        verdicts = self._ask(before, ends, complete)
        for end in ends:
            text = before + end
            try:
                verdict = next(verdicts)
            except ConstraintError as error:
                raise type(error)(f"{self.name}: {error}") from None
            except (Exception, SystemExit) as error:
                raise FunctionError(
                    f"{self.name}: raised {type(error).__name__}: {error}; on {text!r}, complete={complete}"
                ) from error
            if not isinstance(verdict, bool | np.bool_):
                raise FunctionError(
                    f"{self.name}: returned {verdict!r}, which is no bool; on {text!r}, complete={complete}"
                )
            if verdict:
                return True
        return False


@lru_cache(maxsize=256)
def _characters(rest: bytes) -> str:
    """The characters whose UTF-8 begins with ``rest``, in their order; after one byte of four those with a meaning."""
    length = 2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4
    value = rest[0] & (0x7F >> length)
    for byte in rest[1:]:
        value = value << 6 | byte & 0x3F
    missing = length - len(rest)
    first, last = value << 6 * missing, (value + 1) << 6 * missing
    last = min(
        last, 0xD800 if rest[0] == 0xED else 0x110000
    )  # after 0xD800 come surrogates, up to the next first byte
    found = map(chr, range(max(first, LEAST[length]), last))
    return "".join(found if missing < 3 else filter(lambda letter: category(letter) not in ("Cn", "Co"), found))


def load(name: str) -> Predicate:
    """``module:function`` to the function. ConstraintError where there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConstraintError(f"python:{name}: not of the form python:module:function")
    try:
        found = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConstraintError(
                f"python:{name}: there is no module {missing!r}; install it, or put its folder on PYTHONPATH"
            ) from error
        raise ConstraintError(f"python:{name}: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConstraintError(f"python:{name}: {module} has no function {function}")
    return found  # type: ignore[no-any-return]
