"""What a formula is called: known losses, how they entail each other, and closed forms.

Over ``M(w)`` and ``M(l)``, with "w and not l" a top world and "l and not w" a bottom one, a loss is one of 16, by the
state of the two other worlds (arXiv:2412.17696). A name with a question mark is not certain to be the paper's; five of
the 16 have no name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .compile import directions
from .parse import Atom
from .structure import PAIR, Cube, Structure, column, cubes, factorise, full, structure

# State of the world where both answers are accepted, and of the one where neither is.
CELLS: dict[tuple[str, str], str | None] = {
    ("top", "top"): "unCPO",
    ("top", "bottom"): "CE",
    ("top", "both"): "sCPO (?)",
    ("top", "neither"): "cCPO",
    ("bottom", "top"): "fUNL (?)",
    ("bottom", "bottom"): "CEUnl",
    ("bottom", "both"): None,
    ("bottom", "neither"): None,
    ("both", "top"): None,
    ("both", "bottom"): None,
    ("both", "both"): None,
    ("both", "neither"): "CPO",
    ("neither", "top"): "cfUNL (?)",
    ("neither", "bottom"): "cUNL (?)",
    ("neither", "both"): "qfUNL (?)",
    ("neither", "neither"): "ORPO",
}
# What a structure is in this library: (name, f, norm) to the loss.
SAME: dict[tuple[str, str, str], str] = {
    ("CE", "logistic", "mean"): "sft, at beta 1",
    ("CPO", "logistic", "sum"): "cpo with sft_weight 0",
    ("CPO", "logistic", "mean"): "simpo with gamma 0",
    ("CPO", "hinge", "sum"): "slic_hf with sft_weight 0, beta as its delta",
    ("CPO", "rrhf", "mean"): "RRHF's ranking term (arXiv:2304.05302)",
    ("ORPO", "logistic", "mean"): "orpo with sft_weight 0 and odds_weight 1, at beta 1",
    ("DPO", "logistic", "sum"): "dpo",
    ("DPO", "logistic", "mean"): "ln_dpo",
    ("DPO", "squared", "sum"): "ipo",
    ("DPO", "squared", "mean"): "ipo_per_token",
    ("DPO", "hinge", "sum"): "slic, at beta 1",
}
# Longer sums say no more than the truth table.
MAX_TERMS = 4


@dataclass(frozen=True)
class Report:
    """What can be said of a formula.

    Args:
        structure: its worlds; ``structure.worlds()`` is the truth table.
        closed_form: rho as ``log ...`` in W, L (policy) and W_r, L_r (reference), or M1, R1 by number; None where it
            takes sums of more than four terms.
        name: the known loss that it is, or None.
        same: what it is in this library: (f, norm) to the loss with its settings.
        relations: each other known loss to ``equal``, ``stronger``, ``weaker`` or ``incomparable``: what this formula
            is. The stronger of two has the smaller rho everywhere. Empty for more than two answers.
        directions: of each atom, as ``compile.directions`` gives them.
    """

    structure: Structure
    closed_form: str | None
    name: str | None
    same: dict[tuple[str, str], str]
    relations: dict[str, str]
    directions: dict[Atom, int | None]

    @property
    def not_monotone(self) -> str | None:
        """Why the loss does not always raise the winner and lower the loser, or None where it does."""
        return not_monotone(self.directions)


def report(logic: str, where: str = "true", also: str = "false") -> Report:
    """All that can be said of a formula.

    Raises:
        FormulaError: as ``structure``.
    """
    found = structure(logic, where, also)
    name = known_name(found)
    same = {(f, norm): loss for (which, f, norm), loss in SAME.items() if which == name}
    moves = dict(zip(found.atoms, directions(found), strict=True))
    relations = {}
    if _is_pair(found):
        relations = {other: relation(found, worlds) for other, worlds in known_losses() if other != name}
    return Report(found, closed_form(found), name, same, relations, moves)


def known_losses() -> Iterator[tuple[str, Structure]]:
    """The known losses by name: the named ones of the 16, and DPO."""
    for (both, neither), name in CELLS.items():
        if name is not None:
            # Bits of the worlds: 0 neither, 1 w alone, 2 l alone, 3 both.
            top = 0b0010 | (both in ("top", "both")) << 3 | (neither in ("top", "both"))
            bottom = 0b0100 | (both in ("bottom", "both")) << 3 | (neither in ("bottom", "both"))
            yield name, Structure(PAIR, top, bottom)
    yield "DPO", structure("and(Ref(w), M(l)) -> and(Ref(l), M(w))", DPO_WHERE, DPO_ALSO)


DPO_WHERE = "or(and(M(w), Ref(l)), and(M(l), Ref(w)))"
DPO_ALSO = "and(M(w), Ref(l), M(l), Ref(w))"


def known_name(found: Structure) -> str | None:
    """The name of a structure on pairs, ``X with reference`` for X's reference form, or None.

    The reference form of a loss subtracts ``log Ref(w) / Ref(l)`` from its rho; CPO's is DPO.
    """
    if not _is_pair(found):
        return None
    wide = _over_both_models(found)
    ref_w, ref_l = column(2, 4), column(3, 4)
    for name, other in known_losses():
        known = _over_both_models(other)
        if (wide.top, wide.bottom) == (known.top, known.bottom):
            return name
        if (wide.top, wide.bottom) == (known.top & ref_l, known.bottom & ref_w) and name != "DPO":
            return "DPO" if name == "CPO" else f"{name} with reference"
    return None


def relation(one: Structure, other: Structure) -> str:
    """What ``one`` is to ``other``: ``stronger`` where its top entails the other's and the other's bottom its own.

    Then its rho is at most the other's, at all probabilities (arXiv:2412.17696).
    """
    a, b = _over_both_models(one), _over_both_models(other)
    stronger = not (a.top & ~b.top or b.bottom & ~a.bottom)
    weaker = not (b.top & ~a.top or a.bottom & ~b.bottom)
    if stronger and weaker:
        return "equal"
    return "stronger" if stronger else "weaker" if weaker else "incomparable"


def not_monotone(moves: dict[Atom, int | None]) -> str | None:
    """Why a loss with these directions is not monotone, or None.

    On pairs rho must not fall as the policy takes to the winner, nor rise as it takes to the loser. With numbered
    answers beyond two, which of them wins is the formula's own affair: rho must move one way in each.
    """
    pair = all(atom.position < 2 for atom in moves)
    faults = []
    for atom, direction in moves.items():
        if atom.model == "M" and direction is None:
            faults.append(f"rho rises or falls with {atom}, by where the probabilities are")
        elif atom.model == "M" and pair and direction == (-1, 1)[atom.position]:
            faults.append(f"rho {'falls' if direction == -1 else 'rises'} with {atom}")
    return "; ".join(faults) or None


def has_negations(found: Structure) -> bool:
    """Whether a probability ``1 - P`` is left in rho once common factors are cancelled."""
    n, factors = len(found.atoms), factorise(found)
    if any(not true for _, true in factors.literals):
        return True
    return any(
        not true for rest in (factors.top, factors.bottom) for term in _paths(rest, n) for true in term.values()
    )


def closed_form(found: Structure) -> str | None:
    """Rho in the notation of ``Report``, or None where a sum has more than four terms."""
    n, factors = len(found.atoms), factorise(found)
    sides = []
    for exponent, worlds in ((1, factors.top), (-1, factors.bottom)):
        shared = {j: true for (j, true), value in sorted(factors.literals.items()) if value == exponent}
        parts = _product(shared, found.atoms)
        if worlds != full(n):
            text = _sum(worlds, found.atoms)
            if text is None:
                return None
            parts.append(f"({text})")
        sides.append(parts)
    above, below = sides
    numerator = _joined(above) or "1"
    if not below:
        return f"log {numerator}"
    return f"log {numerator}/{_joined(below) if len(below) == 1 else '(' + _joined(below) + ')'}"


def _is_pair(found: Structure) -> bool:
    return all(atom.position < 2 for atom in found.atoms)


def _over_both_models(found: Structure) -> Structure:
    """A structure on pairs as one over M(w), M(l), Ref(w), Ref(l)."""
    atoms = (*PAIR, Atom("Ref", "w"), Atom("Ref", "l"))
    place = [2 * (atom.model == "Ref") + atom.position for atom in found.atoms]
    top = bottom = 0
    for world in range(16):
        inner = sum(1 << j for j, at in enumerate(place) if world >> at & 1)
        top |= (found.top >> inner & 1) << world
        bottom |= (found.bottom >> inner & 1) << world
    return Structure(atoms, top, bottom)


def _paths(worlds: int, n: int) -> Iterator[Cube]:
    """Products that exclude each other and sum to a set of worlds: the paths of its decision diagram."""
    if worlds == full(n):
        yield {}
    elif worlds:
        j = n - 1
        true, false = worlds >> (1 << j), worlds & full(j)
        if true == false:
            yield from _paths(true, j)
        else:
            yield from ({j: True, **path} for path in _paths(true, j))
            yield from ({j: False, **path} for path in _paths(false, j))


def _sum(worlds: int, atoms: tuple[Atom, ...]) -> str | None:
    n = len(atoms)
    missing = cubes(full(n) ^ worlds, n)
    if len(missing) == 1:
        return f"1-{_joined(_product(missing[0], atoms))}"
    terms = []
    for path in _paths(worlds, n):
        terms.append(_joined(_product(path, atoms)))
        if len(terms) > MAX_TERMS:
            return None
    return " + ".join(terms)


def _product(cube: Cube, atoms: tuple[Atom, ...]) -> list[str]:
    accepted = [_symbol(atoms[j]) for j, true in sorted(cube.items()) if true]
    return accepted + [f"(1-{_symbol(atoms[j])})" for j, true in sorted(cube.items()) if not true]


def _joined(factors: list[str]) -> str:
    bare = all(len(factor) == 1 or factor.startswith("(") for factor in factors)
    return ("" if bare else " ").join(factors)


def _symbol(atom: Atom) -> str:
    if atom.answer in ("w", "l"):
        return atom.answer.upper() + ("_r" if atom.model == "Ref" else "")
    return f"{'R' if atom.model == 'Ref' else 'M'}{atom.answer}"
