"""Constraints: which texts an answer may be, asked one token at a time.

``Constraint`` is three methods: ``start``, ``advance`` and ``may_end`` (``protocol``, with the ``Vocabulary`` of the
tokenizer). Ready ones, each also a text for the command line (``parse``):

- ``regex``, ``json_schema``, ``grammar``  compiled by llguidance: ``regex:[0-9]+``, ``json:schema.json``,
  ``grammar:file.lark``. Exact over bytes, about a microsecond a check.
- ``PythonPredicate``  a function ``(text, complete) -> bool``: ``python:module:function``; with a timeout it runs in
  a process that can be stopped (``worker``).
- ``Words``            a finite list: ``words:file.txt``.
- ``Sql``              a SELECT statement on a schema: ``sql:schema.json``, ``sql:schemas.jsonl#name``.
- ``build``           any of them from JSON (``wire``): what a request carries to an engine's process, or over HTTP.
- ``AllOf``, ``AnyOf`` several at once. ``Memo`` keeps verdicts by prefix and counts them.

``conformance.check(mine, vocabulary)`` puts any constraint to the proof, one of your own too. What goes wrong is a
``ConstraintError`` with the place, and only the request whose constraint failed dies of it.
"""

from .combine import AllOf, AnyOf
from .compiled import Compiled, grammar, json_schema, regex
from .memo import Memo
from .predicate import PythonPredicate
from .protocol import Constraint, ConstraintError, Fault, FunctionError, Masking, StoppedError, Vocabulary
from .specs import FORMS, file_of, parse
from .sql import Sql, read_schemas
from .wire import Built, build, written
from .words import Words

__all__ = [
    "FORMS",
    "AllOf",
    "AnyOf",
    "Built",
    "Compiled",
    "Constraint",
    "ConstraintError",
    "Fault",
    "FunctionError",
    "Masking",
    "Memo",
    "PythonPredicate",
    "Sql",
    "StoppedError",
    "Vocabulary",
    "Words",
    "build",
    "file_of",
    "grammar",
    "json_schema",
    "parse",
    "read_schemas",
    "regex",
    "written",
]
