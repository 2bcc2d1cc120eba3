"""Worlds of formulas, what is refused, and the way back from a loss to its logic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.losses.logic import FormulaError, decompile, parse, structure
from align.losses.logic.parse import Atom, Formula
from align.losses.logic.structure import PAIR, cubes, full, models_of, simplify

FOUR = tuple(Atom("M", str(k)) for k in range(1, 5))
WORLDS = st.integers(0, full(4))


def test_the_worlds_of_cpo() -> None:
    """P = l -> w, where w or l, also both: w alone is top, l alone bottom, both is both, none is out."""
    found = structure("implies(M(l), M(w))", "or(M(w), M(l))", "and(M(w), M(l))")
    assert found.atoms == PAIR
    assert list(found.worlds()) == [
        ((True, True), "both"),
        ((True, False), "top"),
        ((False, True), "bottom"),
        ((False, False), "neither"),
    ]


@pytest.mark.parametrize(
    ("formula", "where", "also", "argument", "rule"),
    [
        ("or(M(w), not(M(w)))", "true", "false", "logic", "is a tautology: no world makes it false"),
        ("and(M(w), not(M(w)))", "true", "false", "logic", "is a contradiction: no world makes it true"),
        ("M(w)", "M(w)", "false", "logic", "is a tautology where `where` holds"),
        ("M(w)", "not(M(w))", "false", "logic", "is a contradiction where `where` holds"),
        ("M(w)", "xor(M(l), M(l))", "false", "where", "is true in no world"),
        ("M(w)", "true", "true", "logic", "does not depend on the policy"),
        ("Ref(w)", "true", "false", "logic", "does not depend on the policy"),
        ("Ref(w)", "M(w)", "false", "logic", "does not depend on the policy"),
        ("M(w) -> M(1)", "true", "false", "logic", r"by letter \(M\(w\)\) and by number \(M\(1\)\)"),
        ("M(w)", "M(2)", "false", "logic", "choose one"),
        (
            "and(" + ", ".join(f"M({k})" for k in range(1, 14)) + ")",
            "true",
            "false",
            "logic",
            "has 13 atoms; at most 12",
        ),
        ("M(w)", "M(w", "false", "where", "column 4"),
        ("M(w)", "true", "M(q)", "also", "column 3"),
    ],
)
def test_what_gives_no_loss_is_refused(formula: str, where: str, also: str, argument: str, rule: str) -> None:
    with pytest.raises(FormulaError, match=rule) as caught:
        structure(formula, where, also)
    assert caught.value.argument == argument


def test_twelve_atoms_are_counted() -> None:
    found = structure("and(" + ", ".join(f"M({k})" for k in range(1, 13)) + ")")
    assert found.top == 1 << 4095
    assert found.bottom == full(12) ^ found.top


def _text(worlds: int) -> str:
    return str(simplify(worlds, PAIR))


@pytest.mark.parametrize("top", range(16))
def test_every_pair_of_polynomials_comes_back(top: int) -> None:
    """All 256 pairs over two atoms: top and bottom of the decompiled structure are the ones given."""
    for bottom in range(16):
        core, condition, extra = (models_of(part, PAIR) for part in decompile(_text(top), _text(bottom)))
        assert (core | extra) & condition == top
        assert ((full(2) ^ core) | extra) & condition == bottom


@pytest.mark.parametrize(
    ("top", "bottom", "expected"),
    [
        ("M(w)", "M(l)", ["implies(M(l), M(w))", "or(M(w), M(l))", "and(M(w), M(l))"]),
        (
            "and(M(w), not(M(l)))",
            "and(M(l), not(M(w)))",
            ["implies(M(l), M(w))", "xor(M(w), M(l))", "false"],
        ),
        ("M(w)", "not(M(w))", ["M(w)", "true", "false"]),
        (
            "and(M(w), Ref(l))",
            "and(M(l), Ref(w))",
            [
                "implies(and(M(l), Ref(w)), and(M(w), Ref(l)))",
                "or(and(M(w), Ref(l)), and(M(l), Ref(w)))",
                "and(M(w), M(l), Ref(w), Ref(l))",
            ],
        ),
    ],
    ids=["CPO", "ORPO", "CE", "DPO"],
)
def test_known_losses_decompile_to_the_papers_formulas(top: str, bottom: str, expected: list[str]) -> None:
    """The statements of the paper: CPO one-sided, ORPO one-hot, DPO with the reference's atoms crossed."""
    found = decompile(top, bottom)
    assert [str(part) for part in found] == expected
    compiled = structure(*map(str, found))
    assert (compiled.top, compiled.bottom) == tuple(models_of(parse(side), compiled.atoms) for side in (top, bottom))


@given(WORLDS)
def test_a_simplified_formula_means_the_same(worlds: int) -> None:
    assert models_of(simplify(worlds, FOUR), FOUR) == worlds


@given(WORLDS)
def test_a_sum_of_products_covers_its_worlds_exactly(worlds: int) -> None:
    def product(cube: dict[int, bool]) -> int:
        literals: list[Formula] = [FOUR[j] for j in cube]
        held = full(4)
        for j, atom in zip(cube, literals, strict=True):
            held &= models_of(atom, FOUR) if cube[j] else full(4) ^ models_of(atom, FOUR)
        return held

    union = 0
    for cube in cubes(worlds, 4):
        union |= product(cube)
    assert union == worlds
