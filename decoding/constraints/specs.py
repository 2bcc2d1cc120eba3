"""Constraints as the command line and recipes write them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from .compiled import grammar, json_schema, regex
from .predicate import PythonPredicate
from .protocol import Constraint, ConstraintError, Vocabulary
from .sql import Sql, read_schemas
from .words import Words

FORMS = (
    "json:schema.json, regex:PATTERN, grammar:file.lark, python:module:function, "
    "sql:schema.json[#name], words:file.txt"
)


def parse(spec: str, vocabulary: Vocabulary, *, timeout: float | None = None) -> Constraint:
    """A constraint from its text, one of ``FORMS``.

    ``words:`` reads one answer a line. ``sql:`` with a file of several schemas takes the name of one after ``#``.

    Args:
        timeout: seconds for one call of a Python predicate; the others have limits of their own and take none.

    Raises:
        ConstraintError: no such kind or file, or what the file says is no such constraint.
    """
    kind, colon, rest = spec.partition(":")
    if timeout is not None and kind != "python":
        raise ConstraintError(f"{spec}: a timeout is for python:module:function alone; the others need none")
    if any("\ud800" <= letter <= "\udfff" for letter in spec):
        raise ConstraintError(f"{spec!a}: not UTF-8")
    if not colon or not rest:
        raise ConstraintError(f"{spec!r} is no constraint; write one of {FORMS}")
    match kind:
        case "regex":
            return regex(rest, vocabulary)
        case "python":
            return PythonPredicate(rest, vocabulary, timeout=timeout)
        case "json":
            with _named(spec):
                return json_schema(read(spec, rest), vocabulary)
        case "grammar":
            return grammar(read(spec, rest), vocabulary, name=spec)
        case "words":
            with _named(spec):
                return Words([line for line in read(spec, rest).splitlines() if line], vocabulary)
        case "sql":
            path, _, name = rest.partition("#")
            schemas = read_schemas(path)
            if not name and len(schemas) == 1:
                name = next(iter(schemas))
            if name not in schemas:
                known = ", ".join(sorted(schemas)[:8])
                raise ConstraintError(
                    f"{spec}: no schema {name!r} in {path}; write sql:{path}#NAME, with one of {known}"
                )
            with _named(spec):
                return Sql(schemas[name], vocabulary)
    raise ConstraintError(f"{spec!r}: {kind!r} is no kind of constraint; write one of {FORMS}")


def file_of(spec: str) -> Path | None:
    """The file that a constraint is read from, there or not: a module's for ``python:``; None where it has none."""
    kind, _, rest = spec.partition(":")
    if kind == "python":
        try:
            found = find_spec(rest.partition(":")[0])
        except (Exception, SystemExit):  # a package on the way to it, which is anyone's code
            return None
        return Path(found.origin) if found is not None and found.has_location and found.origin else None
    if kind == "sql":
        rest = rest.partition("#")[0]
    return Path(rest) if kind in ("json", "grammar", "words", "sql") else None


def read(spec: str, path: str) -> str:
    """The text of a constraint's file; errors name the constraint."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConstraintError(f"{spec}: cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConstraintError(f"{spec}: {path} is not UTF-8, at byte {error.start:,}") from None


@contextmanager
def _named(spec: str) -> Iterator[None]:
    """Errors say which file they are about."""
    try:
        yield
    except ConstraintError as error:
        raise ConstraintError(str(error) if str(error).startswith(spec) else f"{spec}: {error}") from None
