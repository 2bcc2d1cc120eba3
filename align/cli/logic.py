"""``align recipes logic``: what loss a formula is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from align.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from align.losses.logic import Report

SHOWN_WORLDS = 64
RELATIONS = {"equal": "equal to", "stronger": "entails", "weaker": "entailed by", "incomparable": "incomparable"}


def logic(
    formula: Annotated[str, typer.Argument(metavar="FORMULA", help='Such as "implies(M(l), M(w))".')],
    where: Annotated[str, typer.Option(help="Only worlds in which this is true count.")] = "true",
    also: Annotated[str, typer.Option(help="Worlds in which this is true count on both sides.")] = "false",
) -> None:
    """Show what loss a formula is: truth table, closed form, name, what it entails, and the norm it needs.

    Atoms: M(w), M(l) (the policy accepts the chosen, the rejected answer), Ref(w), Ref(l); M(1) to M(k) for K answers.
    Connectives: not, and, or, implies, xor, iff, or the operators ~ & | ->.
    """
    from rich.console import Console

    from align.losses.logic import FormulaError, report
    from align.losses.logic.known import has_negations

    try:
        found = report(formula, where, also)
    except FormulaError as error:
        raise ConfigError("align recipes logic", [(error.argument, error.problem)]) from None
    Console(highlight=False).print(_truth_table(found))
    lines = [
        ("name", found.name or "none that is known"),
        ("loss", f"f(rho), rho = {found.closed_form or 'a sum of many terms'}"),
    ]
    lines += [("the same as", f"{same} (f: {f}, norm: {norm})") for (f, norm), same in found.same.items()]
    for relation, words in RELATIONS.items():
        others = [name for name, is_ in found.relations.items() if is_ == relation]
        lines += [(words, ", ".join(others))] if others else []
    lines.append(("monotone", "yes" if found.not_monotone is None else f"NO: {found.not_monotone}"))
    if has_negations(found.structure):
        lines.append(("needs", "norm: mean; rho has probabilities 1 - P, and with norm: sum they are 1 to all digits"))
    print("\n".join(f"{what:<13} {text}" for what, text in lines))
    if found.relations:
        print("\nWhat entails another has the smaller rho. (?): not certain to be the name in arXiv:2412.17696.")


def _truth_table(found: Report) -> Table:
    """Worlds and their states; of a large number, those that count."""
    from rich.table import Table

    worlds = list(found.structure.worlds())
    table = Table(*map(str, found.structure.atoms), "world is", box=None, pad_edge=False)
    if len(worlds) > SHOWN_WORLDS:
        worlds = [world for world in worlds if world[1] != "neither"]
        table.caption = f"{min(len(worlds), SHOWN_WORLDS)} of the {len(worlds)} worlds that count"
    for truths, state in worlds[:SHOWN_WORLDS]:
        table.add_row(*("1" if true else "0" for true in truths), state)
    return table
