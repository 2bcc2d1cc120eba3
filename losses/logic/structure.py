"""Worlds: the meaning of formulas, as the sets of worlds that a loss raises and lowers.

A world says of each of n atoms whether it is true. Sets of worlds are Python integers: bit ``i`` stands for world
``i``, in which atom ``j`` is true when bit ``j`` of ``i`` is set. So ``and``, ``or`` and ``not`` of formulas are those
of integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from .parse import MODELS, Atom, Constant, Formula, FormulaError, Operation, atoms_of, parse

MAX_ATOMS = 12  # 4,096 worlds
PAIR = (Atom("M", "w"), Atom("M", "l"))
STATES = {(True, False): "top", (False, True): "bottom", (True, True): "both", (False, False): "neither"}
Cube = dict[int, bool]  # a product of literals: atom's number to its truth


@dataclass(frozen=True)
class Structure:
    """A preference structure (arXiv:2412.17696): the loss lowers ``-log WMC(top) / WMC(bottom)``.

    Args:
        atoms: the policy's first, each model's by position.
        top, bottom: sets of worlds; a world may be in both, or in neither.
    """

    atoms: tuple[Atom, ...]
    top: int
    bottom: int

    def worlds(self) -> Iterator[tuple[tuple[bool, ...], str]]:
        """Each world's truths, in the order of the atoms and all true first, with its state."""
        n = len(self.atoms)
        for values in range(1 << n):
            truths = tuple(not values >> (n - 1 - j) & 1 for j in range(n))
            world = sum(1 << j for j, true in enumerate(truths) if true)
            yield truths, STATES[bool(self.top >> world & 1), bool(self.bottom >> world & 1)]


def full(n: int) -> int:
    """The set of all worlds of n atoms."""
    return (1 << (1 << n)) - 1


@cache
def column(j: int, n: int) -> int:
    """The set of worlds of n atoms in which atom j is true."""
    half = 1 << j
    return sum(((1 << half) - 1) << start for start in range(half, 1 << n, 2 * half))


def models_of(formula: Formula, atoms: tuple[Atom, ...]) -> int:
    """The set of worlds in which a formula is true."""
    n = len(atoms)
    if isinstance(formula, Constant):
        return full(n) if formula.value else 0
    if isinstance(formula, Atom):
        return column(atoms.index(formula), n)
    first, *rest = (models_of(part, atoms) for part in formula.parts)
    for other in rest:
        match formula.name:
            case "and":
                first &= other
            case "or":
                first |= other
            case "implies":
                first = full(n) ^ first | other
            case "xor":
                first ^= other
            case "iff":
                first = full(n) ^ first ^ other
    return full(n) ^ first if formula.name == "not" else first


def structure(logic: str, where: str = "true", also: str = "false") -> Structure:
    """The worlds of the preference structure ``(P, P_C, P_A)`` = (logic, where, also).

    ``top = (P or P_A) and P_C``, ``bottom = (not P or P_A) and P_C`` (arXiv:2412.17696).

    Raises:
        FormulaError: a formula cannot be read, there are more than 12 atoms, letters and numbers are mixed, no world
            satisfies ``where``, or the loss is constant: top or bottom is empty, or nothing depends on the policy.
    """
    core, condition, extra = parse(logic, "logic"), parse(where, "where"), parse(also, "also")
    atoms = _atoms(core, condition, extra)
    n = len(atoms)
    p, c, a = (models_of(formula, atoms) for formula in (core, condition, extra))
    top, bottom = (p | a) & c, ((full(n) ^ p) | a) & c
    given = "" if where == "true" else " where `where` holds"
    if not c:
        raise FormulaError("where", "is true in no world, so that nothing is left to compare")
    if not top:
        raise FormulaError("logic", f"is a contradiction{given}: no world makes it true")
    if not bottom:
        raise FormulaError("logic", f"is a tautology{given}: no world makes it false")
    found = Structure(atoms, top, bottom)
    factors = factorise(found)
    trained = [j for j, atom in enumerate(atoms) if atom.model == "M"]
    if not any((j, true) in factors.literals for j in trained for true in (True, False)) and not any(
        depends(rest, j, n) for rest in (factors.top, factors.bottom) for j in trained
    ):
        raise FormulaError("logic", "does not depend on the policy: the loss is constant, with nothing to train")
    return found


@dataclass(frozen=True)
class Factors:
    """``WMC(top) / WMC(bottom)`` with what both share cancelled.

    Args:
        literals: (atom's number, its truth) to the exponent of its probability: 1 above the line, -1 below.
        top, bottom: worlds of what is left of each; all worlds count 1.
    """

    literals: dict[tuple[int, bool], int]
    top: int
    bottom: int


def factorise(structure: Structure) -> Factors:
    """Take out the literals that all worlds of a side share, then what both sides share."""
    n = len(structure.atoms)
    above, top = _literals(structure.top, n)
    below, bottom = _literals(structure.bottom, n)
    if top == bottom:
        top = bottom = full(n)
    return Factors({**dict.fromkeys(above - below, 1), **dict.fromkeys(below - above, -1)}, top, bottom)


def depends(worlds: int, j: int, n: int) -> bool:
    """Whether membership in a set of worlds depends on atom j."""
    return (worlds & column(j, n)) >> (1 << j) != worlds & ~column(j, n)


def _literals(worlds: int, n: int) -> tuple[set[tuple[int, bool]], int]:
    """The literals that all of these worlds share, and the worlds with those atoms set free."""
    shared = set()
    for j in range(n):
        true = worlds & column(j, n)
        if true == worlds:
            shared.add((j, True))
            worlds |= worlds >> (1 << j)
        elif not true:
            shared.add((j, False))
            worlds |= worlds << (1 << j)
    return shared, worlds


def decompile(top: str, bottom: str) -> tuple[Formula, Formula, Formula]:
    """From a loss to its logic: ``(logic, where, also)`` whose structure has these top and bottom worlds.

    The two polynomials of a loss ``log(top / bottom)`` are given as formulas: ``W`` is ``M(w)``, ``1 - L`` is
    ``not(M(l))``, products are ``and``, sums of terms that exclude each other are ``or``. With them
    ``P = bottom -> top``, ``P_C = top or bottom`` and ``P_A = top and bottom``, each simplified
    (arXiv:2412.17696).

    Raises:
        FormulaError: a formula cannot be read, or there are more than 12 atoms.
    """
    above, below = parse(top, "top"), parse(bottom, "bottom")
    atoms = _atoms(above, below)
    t, b = models_of(above, atoms), models_of(below, atoms)
    everything = full(len(atoms))
    core, condition, extra = (simplify(s, atoms) for s in ((everything ^ b) | t, t | b, t & b))
    return core, condition, extra


def simplify(worlds: int, atoms: tuple[Atom, ...]) -> Formula:
    """A short formula that is true in these worlds alone: a sum of products, a product of sums, xor or iff."""
    n = len(atoms)
    if worlds in (0, full(n)):
        return Constant(worlds != 0)
    for i in range(n):
        for j in range(i + 1, n):
            unequal = column(i, n) ^ column(j, n)
            if worlds in (unequal, full(n) ^ unequal):
                return Operation("xor" if worlds == unequal else "iff", (atoms[i], atoms[j]))
    products, sums = cubes(worlds, n), cubes(full(n) ^ worlds, n)
    if sum(map(len, sums)) <= sum(map(len, products)):
        return _join("and", [_either([{j: not true} for j, true in cube.items()], atoms) for cube in sums])
    return _either(products, atoms)


def cubes(worlds: int, n: int) -> list[Cube]:
    """An irredundant sum of products that covers a set of worlds exactly (Minato and Morreale's recursion)."""
    return sorted(_cover(worlds, worlds, n)[0], key=sorted)


def _cover(lower: int, upper: int, n: int) -> tuple[list[Cube], int]:
    """Cubes whose union holds ``lower`` and stays inside ``upper``, and that union."""
    if not lower:
        return [], 0
    if upper == full(n):
        return [{}], upper
    half, mask = 1 << (n - 1), full(n - 1)
    lower_true, lower_false, upper_true, upper_false = lower >> half, lower & mask, upper >> half, upper & mask
    true, covered_true = _cover(lower_true & ~upper_false, upper_true, n - 1)
    false, covered_false = _cover(lower_false & ~upper_true, upper_false, n - 1)
    rest = (lower_true & ~covered_true) | (lower_false & ~covered_false)
    either, covered = _cover(rest, upper_true & upper_false, n - 1)
    found = [cube | {n - 1: True} for cube in true] + [cube | {n - 1: False} for cube in false] + either
    return found, (covered_true | covered) << half | (covered_false | covered)


def _atoms(*formulas: Formula) -> tuple[Atom, ...]:
    """All atoms in order; a formula on w and l always counts M(w) and M(l) in."""
    found = {atom for formula in formulas for atom in atoms_of(formula)}
    if len(found) > MAX_ATOMS:
        raise FormulaError("logic", f"has {len(found)} atoms; at most {MAX_ATOMS} can be counted")
    letters = sorted(str(atom) for atom in found if atom.answer in ("w", "l"))
    numbers = sorted(str(atom) for atom in found if atom.answer not in ("w", "l"))
    if letters and numbers:
        raise FormulaError("logic", f"names answers by letter ({letters[0]}) and by number ({numbers[0]}); choose one")
    found |= set() if numbers else set(PAIR)
    return tuple(sorted(found, key=lambda atom: (MODELS.index(atom.model), atom.position)))


def _join(name: str, parts: Sequence[Formula]) -> Formula:
    return parts[0] if len(parts) == 1 else Operation(name, tuple(parts))


def _either(products: list[Cube], atoms: tuple[Atom, ...]) -> Formula:
    """One of these products is true: as an implication where some are negated atoms and some are not."""
    alone = [j for cube in products if len(cube) == 1 for j, true in cube.items() if not true]
    premise = [atoms[j] for j in sorted(alone)]
    negated = [Operation("not", (atom,)) for atom in premise]
    conclusion = [_product(cube, atoms) for cube in products if not (len(cube) == 1 and {*cube} <= {*alone})]
    if premise and conclusion:
        return Operation("implies", (_join("and", premise), _join("or", conclusion)))
    return _join("or", conclusion or negated)


def _product(cube: Cube, atoms: tuple[Atom, ...]) -> Formula:
    literals = [atoms[j] if true else Operation("not", (atoms[j],)) for j, true in sorted(cube.items())]
    return _join("and", literals)
