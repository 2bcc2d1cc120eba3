"""Names, entailment, closed forms: what is printed of a formula."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.logic import closed_form, known_name, relation, report, structure
from align.losses.logic.compile import log_odds
from align.losses.logic.known import CELLS, MAX_TERMS, has_negations, known_losses
from align.losses.logic.parse import Atom
from align.losses.logic.structure import PAIR, Structure, full

IMPLIES = "implies(M(l), M(w))"
KNOWN = dict(known_losses())
FOUR = (*PAIR, Atom("Ref", "w"), Atom("Ref", "l"))


@pytest.mark.parametrize(
    ("arguments", "name", "form"),
    [
        ((IMPLIES,), "unCPO", "log (1-L(1-W))/(L(1-W))"),
        ((IMPLIES, "or(M(w), M(l))"), "cCPO", "log W/(L(1-W))"),
        ((IMPLIES, "or(M(w), M(l))", "and(M(w), M(l))"), "CPO", "log W/L"),
        ((IMPLIES, "xor(M(w), M(l))"), "ORPO", "log W(1-L)/(L(1-W))"),
        ((IMPLIES, "true", "not(or(M(w), M(l)))"), "sCPO (?)", "log (1-L(1-W))/(1-W)"),
        (("M(w)",), "CE", "log W/(1-W)"),
        (("and(M(w), not(M(l)))",), "CEUnl", "log W(1-L)/(1-W(1-L))"),
        (("not(M(l))",), "fUNL (?)", "log (1-L)/L"),
        (("not(M(l))", "not(and(M(w), M(l)))"), "cfUNL (?)", "log (1-L)/(L(1-W))"),
        (("and(M(w), not(M(l)))", "not(and(M(w), M(l)))"), "cUNL (?)", "log W(1-L)/(1-W)"),
        ((IMPLIES, "not(and(M(w), M(l)))", "not(M(w))&not(M(l))"), "qfUNL (?)", "log (1-L)/(1-W)"),
        ((IMPLIES, "true", "iff(M(w), M(l))"), None, "log (1-L(1-W))/(1-W(1-L))"),
        (("Ref(w) & M(l) -> Ref(l) & M(w)", "or(M(w)&Ref(l), M(l)&Ref(w))", "M(w)&M(l)&Ref(w)&Ref(l)"), "DPO",
         "log W L_r/(L W_r)"),
        (("M(2) -> M(1)", "xor(M(2), M(1))"), "ORPO", "log M1 (1-M2)/(M2 (1-M1))"),
        (("M(1) & M(2) & M(3)",), None, "log M1 M2 M3/(1-M1 M2 M3)"),
    ],
)  # fmt: skip
def test_formulas_have_their_papers_names(arguments: tuple[str, ...], name: str | None, form: str) -> None:
    """The cells of the lattice by formula; a question mark says that the name is not certain to be the paper's."""
    found = structure(*arguments)
    assert (known_name(found), closed_form(found)) == (name, form)


def test_eleven_of_sixteen_cells_have_a_name() -> None:
    assert len(CELLS) == 16
    assert sorted(KNOWN) == sorted([name for name in CELLS.values() if name] + ["DPO"])
    assert len(KNOWN) == 12
    assert {name: known_name(found) for name, found in KNOWN.items()} == {name: name for name in KNOWN}


def test_a_reference_form_is_named_after_its_loss() -> None:
    """Top and Ref(l), bottom and Ref(w): rho - log Ref(w)/Ref(l). ORPO's is not DPO; CPO's is."""
    top, bottom = "and(M(w), not(M(l)), Ref(l))", "and(M(l), not(M(w)), Ref(w))"
    found = structure(f"implies({bottom}, {top})", f"or({top}, {bottom})", f"and({top}, {bottom})")
    assert known_name(found) == "ORPO with reference"
    rho = log_odds(found, [torch.tensor([math.log(p)], dtype=torch.float64) for p in (0.3, 0.2, 0.25, 0.4)])[0]
    assert rho.item() == pytest.approx(0.5389965007 - math.log(0.25 / 0.4), abs=1e-9)


def test_entailments_of_orpo() -> None:
    """Its top is w alone, its bottom l alone. cCPO adds "both" above; CPO adds it above and below."""
    found = report(IMPLIES, "xor(M(w), M(l))")
    assert found.name == "ORPO"
    assert found.relations == {
        "unCPO": "stronger",
        "CE": "incomparable",
        "sCPO (?)": "incomparable",
        "cCPO": "stronger",
        "fUNL (?)": "incomparable",
        "CEUnl": "weaker",
        "CPO": "incomparable",
        "cfUNL (?)": "stronger",
        "cUNL (?)": "weaker",
        "qfUNL (?)": "incomparable",
        "DPO": "incomparable",
    }
    assert found.same == {("logistic", "mean"): "orpo with sft_weight 0 and odds_weight 1, at beta 1"}
    assert found.not_monotone is None


@pytest.mark.parametrize("one", list(CELLS))
def test_relations_are_an_order(one: tuple[str, str]) -> None:
    """Equal to itself; stronger one way is weaker the other."""
    converse = {"stronger": "weaker", "weaker": "stronger", "equal": "equal", "incomparable": "incomparable"}
    for other in CELLS:
        a, b = (_cell(*states) for states in (one, other))
        assert relation(b, a) == converse[relation(a, b)]
        assert (relation(a, b) == "equal") == (one == other)


def test_all_sixteen_are_monotone() -> None:
    """With w alone on top and l alone below, no state of the other two worlds turns rho round."""
    for both, neither in CELLS:
        found = _cell(both, neither)
        core, condition, extra = _formulas(found)
        assert report(core, condition, extra).not_monotone is None


def test_more_than_two_answers_have_no_relations() -> None:
    found = report("M(1) | M(2)", "~M(3)")
    assert found.relations == {}
    assert found.name is None
    assert list(found.directions.values()) == [1, 1, 0]


def test_a_long_sum_has_no_closed_form() -> None:
    parity = "xor(M(1), xor(M(2), xor(M(3), M(4))))"
    assert closed_form(structure(parity)) is None
    assert closed_form(structure("xor(M(1), M(2))")) is not None


@pytest.mark.parametrize(("top", "bottom"), [("W", "L"), ("W L_r", "L W_r")])
def test_cpo_and_dpo_have_no_negations(top: str, bottom: str) -> None:
    assert not has_negations(KNOWN["CPO" if top == "W" else "DPO"])
    assert all(has_negations(found) for name, found in KNOWN.items() if name not in ("CPO", "DPO"))


@given(
    st.integers(1, full(4)),
    st.integers(1, full(4)),
    st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4),
)
def test_the_closed_form_is_rho(top: int, bottom: int, probabilities: list[float]) -> None:
    """Any structure on both models: the printed text, read as arithmetic, is the value of rho."""
    found = Structure(FOUR, top, bottom)
    text = closed_form(found)
    if text is None:
        return
    names = dict(zip(["W", "L", "W_r", "L_r"], probabilities, strict=True))
    arithmetic = re.sub(r"(?<=[\w)])\s?(?=[(WL])", "*", text.removeprefix("log "))
    expected = math.log(eval(arithmetic, {}, names))  # the text is ours
    rho = log_odds(found, [torch.tensor([math.log(p)], dtype=torch.float64) for p in probabilities])[0].item()
    assert rho == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert max(side.count("+") for side in text.split("/")) < MAX_TERMS


def _cell(both: str, neither: str) -> Structure:
    top = 0b0010 | (both in ("top", "both")) << 3 | (neither in ("top", "both"))
    bottom = 0b0100 | (both in ("bottom", "both")) << 3 | (neither in ("bottom", "both"))
    return Structure(PAIR, top, bottom)


def _formulas(found: Structure) -> tuple[str, str, str]:
    from align.losses.logic import decompile
    from align.losses.logic.structure import simplify

    core, condition, extra = decompile(*(str(simplify(side, found.atoms)) for side in (found.top, found.bottom)))
    return str(core), str(condition), str(extra)


def test_entailment_agrees_with_values_everywhere() -> None:
    """Where a formula is stronger its rho is smaller, at every point of a grid; where incomparable, neither always."""
    grid = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.98], dtype=torch.float64).log()
    points = list(torch.cartesian_prod(grid, grid, grid, grid).T)
    rho = {name: log_odds(found, points[: len(found.atoms)])[0] for name, found in KNOWN.items()}
    for one, other in itertools.permutations(KNOWN, 2):
        below = bool((rho[one] <= rho[other] + 1e-12).all())
        assert below == (relation(KNOWN[one], KNOWN[other]) == "stronger"), (one, other)
