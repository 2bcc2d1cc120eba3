"""The parser: operators and functions say the same, and every error points at its column."""

from __future__ import annotations

import pytest

from align.losses.logic import FormulaError, parse
from align.losses.logic.parse import CONNECTIVES, WRITTEN
from align.losses.logic.structure import models_of, structure


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("implies(M(l), M(w))", "implies(M(l), M(w))"),
        ("M(l)->M(w)", "implies(M(l), M(w))"),
        ("M(w) -> M(l) -> true", "implies(M(w), implies(M(l), true))"),
        ("M(w) | M(l) & ~Ref(w)", "or(M(w), and(M(l), not(Ref(w))))"),
        ("(M(w) | M(l)) & Ref(l)", "and(or(M(w), M(l)), Ref(l))"),
        ("M(w) & M(l) -> Ref(w)", "implies(and(M(w), M(l)), Ref(w))"),
        ("~~M(w)", "M(w)"),
        ("and(M(1), M(2), M(12))", "and(M(1), M(2), M(12))"),
        ("xor( M(w),\n iff(M(l), false))", "xor(M(w), iff(M(l), false))"),
    ],
)
def test_reading(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@pytest.mark.parametrize(
    ("text", "column", "rule"),
    [
        ("", 1, "the formula is empty"),
        ("   ", 1, "the formula is empty"),
        ("implies(M(x), M(w))", 11, "M takes w, l or the number of an answer, from 1, not 'x'"),
        ("M(0)", 3, "not '0'"),
        ("M(-1)", 3, "not '-'"),
        ("M(", 3, "M takes w, l or the number of an answer, from 1"),
        ("M", 2, "'(' is missing"),
        ("impliess(M(w), M(l))", 1, "no 'impliess' is known; did you mean implies?"),
        ("N(w)", 1, "connectives: not, and, or, implies, xor, iff; atoms: M, Ref"),
        ("ref(w)", 1, "did you mean Ref?"),
        ("m(w)", 1, "no 'm' is known; did you mean M?"),
        ("M(w) or M(l)", 6, "'or' comes after the end of the formula; write or(M(w), M(l)) or M(w) | M(l)"),
        ("and(M(w), M(w) XOR M(l))", 16, "')' is missing before 'XOR'; write xor(M(w), M(l))"),
        ("not M(l)", 5, "'(' is missing before 'M'; write not(M(l)) or ~M(l)"),
        ("implies(M(l), M(w)", 19, "')' is missing"),
        ("implies(M(l) M(w))", 14, "')' is missing before 'M'"),
        ("implies(M(l))", 1, "implies takes two formulas, and got 1"),
        ("M(w) & not(M(l), M(w))", 8, "not takes one formula, and got 2"),
        ("and(M(w))", 1, "and takes two formulas or more, and got 1"),
        ("M(w) M(l)", 6, "'M' comes after the end of the formula"),
        ("M(w))", 5, "')' comes after the end"),
        ("M(w) ->", 8, "ends where a part of it is missing"),
        ("M(w) - M(l)", 6, "'-' comes after the end"),
        ("& M(w)", 1, "'&' stands where a formula begins"),
        ("(" * 200 + "M(w)" + ")" * 200, 101, "nested more than 100 deep"),
    ],
)
def test_errors_point_at_their_column(text: str, column: int, rule: str) -> None:
    with pytest.raises(FormulaError) as caught:
        parse(text)
    assert caught.value.column == column
    message, shown, caret = str(caught.value).split("\n")
    assert message.startswith(f"logic: column {column}: ")
    assert rule in message
    assert caret.index("^") - shown.index(text[:1]) == column - 1 if text.strip() else caret.strip() == "^"


def test_the_caret_line_stays_one_line() -> None:
    with pytest.raises(FormulaError) as caught:
        parse("and(M(w),\n\tM(z))", "where")
    assert str(caught.value).split("\n")[1:] == ["    and(M(w),  M(z))", "    " + " " * 13 + "^"]
    assert caught.value.argument == "where"


def test_a_formula_is_text() -> None:
    with pytest.raises(FormulaError, match="where: is True; a formula is text"):
        parse(True, "where")  # type: ignore[arg-type]


def test_the_truth_tables_of_the_connectives() -> None:
    """Worlds by number: 0 neither, 1 w alone, 2 l alone, 3 both; xor holds in 1 and 2, the implication not in 1."""
    atoms = structure("M(w)").atoms
    expected = {
        "and(M(w), M(l))": 0b1000,
        "or(M(w), M(l))": 0b1110,
        "xor(M(w), M(l))": 0b0110,
        "iff(M(w), M(l))": 0b1001,
        "implies(M(w), M(l))": 0b1101,
        "not(M(w))": 0b0101,
        "true": 0b1111,
        "false": 0b0000,
    }
    assert {text: models_of(parse(text), atoms) for text in expected} == expected


def test_what_an_error_says_to_write_can_be_read() -> None:
    """Both ways of writing a connective are one formula, of that connective."""
    for word, written in WRITTEN.items():
        formulas = {parse(one) for one in written.split(" or ")}
        assert {formula.name for formula in formulas} == {word}
        assert len(formulas) == 1
    assert set(WRITTEN) == set(CONNECTIVES)
