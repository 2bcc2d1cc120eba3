"""Formulas over what a model accepts: their syntax tree, their parser, and errors that point at the column.

Atoms: ``M(w)`` "the model accepts the chosen answer", ``M(l)`` the rejected one, ``Ref(w)`` and ``Ref(l)`` the same of
the reference; ``M(1)`` to ``M(k)`` for K answers to a prompt. Connectives: ``not``, ``and``, ``or``, ``implies``,
``xor``, ``iff`` as functions, or the operators ``~``, ``&``, ``|``, ``->``, which bind in this order, the first one
most; ``->`` groups to the right. Constants: ``true``, ``false``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import NoReturn

# How many formulas each connective takes; 0: two or more.
CONNECTIVES = {"not": 1, "and": 0, "or": 0, "implies": 2, "xor": 2, "iff": 2}
CONSTANTS = {"true": True, "false": False}
MODELS = ("M", "Ref")
# What to write in place of a connective as a word between formulas, or before one.
WRITTEN = {
    "not": "not(M(l)) or ~M(l)",
    "and": "and(M(w), M(l)) or M(w) & M(l)",
    "or": "or(M(w), M(l)) or M(w) | M(l)",
    "implies": "implies(M(l), M(w)) or M(l) -> M(w)",
    "xor": "xor(M(w), M(l))",
    "iff": "iff(M(w), M(l))",
}
# Each level of nesting is a few frames of recursion.
MAX_DEPTH = 100


class FormulaError(ValueError):
    """A formula that is no formula, or that gives no loss.

    Args:
        argument: which one: ``logic``, ``where`` or ``also``.
        rule: what is wrong, in words.
        text, column: what was read, and where in it (from 1), for a caret line; None: the formula as a whole.
    """

    def __init__(self, argument: str, rule: str, text: str = "", column: int | None = None) -> None:
        self.argument, self.column = argument, column
        self.problem = rule
        if column is not None:
            line = re.sub(r"\s", " ", text)  # a caret needs one line
            self.problem = f"column {column}: {rule}\n    {line}\n    {' ' * (column - 1)}^"
        super().__init__(f"{argument}: {self.problem}")


@dataclass(frozen=True)
class Atom:
    """``M`` (the policy) or ``Ref`` (the reference) accepts an answer: ``w``, ``l``, or a number from 1."""

    model: str
    answer: str

    @property
    def position(self) -> int:
        """Column of the answer in a row of K, from 0; chosen comes first."""
        return {"w": 0, "l": 1}[self.answer] if self.answer in ("w", "l") else int(self.answer) - 1

    def __str__(self) -> str:
        return f"{self.model}({self.answer})"


@dataclass(frozen=True)
class Constant:
    """``true`` or ``false``."""

    value: bool

    def __str__(self) -> str:
        return "true" if self.value else "false"


@dataclass(frozen=True)
class Operation:
    """A connective and what it joins."""

    name: str
    parts: tuple[Formula, ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})"


Formula = Atom | Constant | Operation


def atoms_of(formula: Formula) -> set[Atom]:
    """The atoms that a formula names."""
    if isinstance(formula, Operation):
        return {atom for part in formula.parts for atom in atoms_of(part)}
    return {formula} if isinstance(formula, Atom) else set()


def parse(text: str, argument: str = "logic") -> Formula:
    """The formula that ``text`` says.

    Args:
        text: such as ``implies(M(l), M(w))`` or ``M(l) -> M(w)``.
        argument: what an error calls it.

    Raises:
        FormulaError: with the column.
    """
    if not isinstance(text, str):
        raise FormulaError(argument, f"is {text!r}; a formula is text, such as implies(M(l), M(w))")
    return _Parser(text, argument).whole()


class _Parser:
    """Recursive descent, one method a level of binding; ``at`` is the token to be read next."""

    def __init__(self, text: str, argument: str) -> None:
        self.text, self.argument = text, argument
        # A minus sign without its head, or any other character, is a token too, and refused where it stands.
        self.tokens = [(match[0], match.start() + 1) for match in re.finditer(r"->|\w+|\S", text)]
        self.tokens.append(("", len(text) + 1))
        self.at = 0
        self.depth = 0

    def whole(self) -> Formula:
        if len(self.tokens) == 1:
            self._fail("the formula is empty", 1)
        formula = self._implication()
        token, column = self.tokens[self.at]
        if token:
            self._fail(f"{token!r} comes after the end of the formula{_written(token)}", column)
        return formula

    def _implication(self) -> Formula:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} deep", self.tokens[self.at][1])
        left = self._chain("|")
        if self._take("->"):
            left = Operation("implies", (left, self._implication()))
        self.depth -= 1
        return left

    def _chain(self, operator: str) -> Formula:
        parts = [self._chain("&") if operator == "|" else self._unary()]
        while self._take(operator):
            parts.append(self._chain("&") if operator == "|" else self._unary())
        return parts[0] if len(parts) == 1 else Operation("or" if operator == "|" else "and", tuple(parts))

    def _unary(self) -> Formula:
        negations = 0
        while self._take("~"):
            negations += 1
        formula = self._primary()
        return Operation("not", (formula,)) if negations % 2 else formula

    def _primary(self) -> Formula:
        token, column = self.tokens[self.at]
        self.at += 1
        if token == "(":
            inner = self._implication()
            self._expect(")")
            return inner
        if token in CONSTANTS:
            return Constant(CONSTANTS[token])
        if token in MODELS:
            return self._atom(token)
        if token in CONNECTIVES:
            return self._function(token, column)
        if not token:
            self._fail("the formula ends where a part of it is missing", column)
        if not re.fullmatch(r"\w+", token):
            self._fail(f"{token!r} stands where a formula begins", column)
        names = {name.lower(): name for name in (*CONNECTIVES, *CONSTANTS, *MODELS)}
        near = difflib.get_close_matches(token.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else f"connectives: {', '.join(CONNECTIVES)}; atoms: M, Ref"
        self._fail(f"no {token!r} is known; {hint}", column)

    def _atom(self, model: str) -> Atom:
        self._expect("(")
        answer, column = self.tokens[self.at]
        if answer not in ("w", "l") and not re.fullmatch(r"[1-9][0-9]*", answer):
            given = f", not {answer!r}" if answer else ""
            self._fail(f"{model} takes w, l or the number of an answer, from 1{given}", column)
        self.at += 1
        self._expect(")")
        return Atom(model, answer)

    def _function(self, name: str, column: int) -> Formula:
        self._expect("(")
        parts = [self._implication()]
        while self._take(","):
            parts.append(self._implication())
        self._expect(")")
        wanted = CONNECTIVES[name]
        if len(parts) != wanted and (wanted or len(parts) < 2):
            count = {0: "two formulas or more", 1: "one formula", 2: "two formulas"}[wanted]
            self._fail(f"{name} takes {count}, and got {len(parts)}", column)
        return Operation(name, tuple(parts))

    def _take(self, token: str) -> bool:
        found = self.tokens[self.at][0] == token
        self.at += found
        return found

    def _expect(self, token: str) -> None:
        found, column = self.tokens[self.at]
        if not self._take(token):
            # The word stands here, as in (M(w) or M(l)), or just before, as in not M(l).
            hint = _written(found) or (_written(self.tokens[self.at - 1][0]) if token == "(" else "")
            self._fail(f"{token!r} is missing" + (f" before {found!r}" if found else "") + hint, column)

    def _fail(self, rule: str, column: int) -> NoReturn:
        raise FormulaError(self.argument, rule, self.text, column)


def _written(word: str) -> str:
    return f"; write {WRITTEN[word.lower()]}" if word.lower() in WRITTEN else ""
