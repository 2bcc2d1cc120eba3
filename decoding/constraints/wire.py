"""Constraints as JSON says them: what a request carries to another process, or over HTTP.

{"regex": "[0-9]+"}   {"json": {a JSON Schema}}   {"grammar": "start: ..."}   {"words": ["yes", "no"]}
{"sql": {"table": ["column", ...]}}   {"python": "module:function", "timeout": 1.0}
{"all_of": [...]}   {"any_of": [...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from itertools import count
from typing import Any

import numpy as np

from .combine import AllOf, AnyOf
from .compiled import grammar, json_schema, regex
from .predicate import PythonPredicate
from .protocol import Constraint, ConstraintError, Masking, Prefiltering, Vocabulary
from .specs import parse, read
from .sql import Sql, read_schemas
from .words import Words

Spec = Mapping[str, Any]
KINDS = ("regex", "json", "grammar", "words", "sql", "python", "all_of", "any_of")
DEPTH = 16
"""How deep ``all_of`` and ``any_of`` may be nested."""
PARTS = 4
"""How many Python functions a constraint may call where the functions that may be called are named."""
SECONDS = 1.0
"""How long one call may take there: the default, and the most that ``timeout`` may ask for."""


class Built:
    """A constraint that can say what it was built from.

    Attributes:
        spec: JSON that ``build`` makes the same constraint of.
    """

    def __init__(self, constraint: Constraint, spec: Spec) -> None:
        self.constraint, self.spec = constraint, spec

    def start(self) -> Any:
        return self.constraint.start()

    def advance(self, state: Any, token: int) -> Any | None:
        return self.constraint.advance(state, token)

    def may_end(self, state: Any) -> bool:
        return self.constraint.may_end(state)

    def allowed(self, state: Any) -> np.ndarray | None:
        return self.constraint.allowed(state) if isinstance(self.constraint, Masking) else None

    def prefilter(self, state: Any) -> np.ndarray | None:
        return self.constraint.prefilter(state) if isinstance(self.constraint, Prefiltering) else None


BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), None], frozenset({256}))
"""A vocabulary to try constraints on before there is a model."""

Python = Callable[[str, float | None], Constraint]


def check(spec: Any, *, predicates: Collection[str] | None = None) -> None:
    """Whether ``build`` would make a constraint of it, with the same limits; Python functions are not loaded.

    Raises:
        ConstraintError: it would not.
    """

    def python(name: str, timeout: float | None) -> Constraint:
        return regex("(?s).*", BYTES)

    _built(spec, BYTES, predicates, python if predicates is None else _limited(python), 0)


def build(spec: Any, vocabulary: Vocabulary, *, predicates: Collection[str] | None = None) -> Built:
    """The constraint that a JSON object says.

    Args:
        spec: one of the forms above, a single kind in an object.
        vocabulary: of the model.
        predicates: names of Python functions that may be called; None for any, which is for requests of one's own.
            Where they are named, requests are others': a constraint calls at most ``PARTS`` functions, each call may
            take ``timeout`` but at most ``SECONDS``, and constraints share a process for each function.

    Raises:
        ConstraintError: no such kind, a predicate that is not among those allowed, or what it says is no constraint.
    """

    def python(name: str, timeout: float | None) -> Constraint:
        return PythonPredicate(name, vocabulary, timeout=timeout, shared=predicates is not None)

    return Built(_built(spec, vocabulary, predicates, python if predicates is None else _limited(python), 0), spec)


def _limited(python: Python) -> Python:
    """``python`` for one constraint of others: not for many functions, and none without a limit to its calls."""
    parts = count(1)

    def limited(name: str, timeout: float | None) -> Constraint:
        if next(parts) > PARTS:
            raise ConstraintError(f"constraint: it calls Python functions in more than {PARTS} places; call fewer")
        if timeout is not None and not timeout > 0:
            raise ConstraintError(f"constraint: timeout is {timeout}: it must be seconds above zero")
        return python(name, SECONDS if timeout is None else min(timeout, SECONDS))

    return limited


def written(text: str, *, timeout: float | None = None) -> dict[str, Any]:
    """A constraint of the command line (``parse``) as JSON, with what its file holds.

    Raises:
        ConstraintError: no such kind or file.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "regex" if rest:
            return {"regex": rest}
        case "python" if rest:
            return {"python": rest, **({} if timeout is None else {"timeout": timeout})}
        case "json" if rest:
            try:
                return {"json": json.loads(read(text, rest))}
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConstraintError(f"{text}: not JSON: {error}") from None
        case "grammar" if rest:
            return {"grammar": read(text, rest)}
        case "words" if rest:
            return {"words": [line for line in read(text, rest).splitlines() if line]}
        case "sql" if rest:
            path, _, name = rest.partition("#")
            schemas = read_schemas(path)
            if not name and len(schemas) == 1:
                name = next(iter(schemas))
            if name in schemas:
                return {"sql": schemas[name]}
    parse(text, Vocabulary([b"a", None], frozenset({1})))  # says what is wrong with it
    raise AssertionError(text)


def _built(
    spec: Any, vocabulary: Vocabulary, predicates: Collection[str] | None, python: Python, depth: int
) -> Constraint:
    if not depth and not _is_unicode(spec):
        raise ConstraintError("constraint: half of a surrogate pair is in it, which no text has")
    kinds = [kind for kind in KINDS if kind in spec] if isinstance(spec, Mapping) else []
    if len(kinds) != 1:
        raise ConstraintError(
            f"constraint: {json.dumps(spec, default=str)[:80]} is none; write an object with one of {', '.join(KINDS)}"
        )
    kind, value = kinds[0], spec[kinds[0]]
    others = spec.keys() - {kind} - ({"timeout"} if kind == "python" else set())
    if others:
        raise ConstraintError(f"constraint: {kind} takes no {', '.join(sorted(map(str, others)))}")
    if kind in ("all_of", "any_of"):
        if not isinstance(value, list) or not value:
            raise ConstraintError(f"constraint: {kind} is a list of constraints")
        if depth == DEPTH:
            raise ConstraintError(f"constraint: all_of and any_of are nested more than {DEPTH} deep")
        parts = [_built(part, vocabulary, predicates, python, depth + 1) for part in value]
        return AllOf(*parts) if kind == "all_of" else AnyOf(*parts)
    if kind == "words":
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ConstraintError("constraint: words is a list of texts")
        return Words(value, vocabulary)
    if kind == "sql":
        if not isinstance(value, Mapping) or not all(isinstance(columns, list) for columns in value.values()):
            raise ConstraintError('constraint: sql is {"table": ["column", ...]}')
        return Sql(dict(value), vocabulary)
    if kind == "json":
        if not isinstance(value, Mapping | bool):
            raise ConstraintError("constraint: json is a JSON Schema, not its text")
        return json_schema(value, vocabulary)
    if not isinstance(value, str) or not value:
        raise ConstraintError(f"constraint: {kind} is a text, not {json.dumps(value, default=str)[:40]}")
    if kind == "regex":
        return regex(value, vocabulary)
    if kind == "grammar":
        return grammar(value, vocabulary)
    if predicates is not None and value not in predicates:
        known = ", ".join(sorted(predicates)) or "none"
        raise ConstraintError(f"constraint: python {value!r} is not among the functions that may be called: {known}")
    timeout = spec.get("timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
        raise ConstraintError(f"constraint: timeout is {timeout!r}: it must be seconds")
    return python(value, timeout)


def _is_unicode(spec: Any) -> bool:
    """JSON may write what no text is."""
    try:
        json.dumps(spec, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
