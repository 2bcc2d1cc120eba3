"""How results are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.evals.statistics import CLEAR

WIDTH = 400


def printer() -> Console:
    """Where results are printed; a log or a pipe has no edge to fold at."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def estimate(entry: Mapping[str, Any], form: str) -> str:
    """``-0.062 [-0.082, -0.042]``."""
    value, *ends = (format(entry[key], form) for key in ("value", "low", "high") if entry[key] is not None)
    return f"{value} [{', '.join(ends)}]" if ends else value


def plain_table(*columns: str) -> Table:
    """A table without lines; the first column is of names."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    return table


def show_metrics(
    console: Console, models: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]
) -> None:
    """Print a line a model; ``columns`` are metrics and how they read, by heading."""
    table = plain_table("", *columns)
    for name, found in models.items():
        metrics = found["metrics"]
        cells = [estimate(metrics[m], form) if m in metrics else "" for m, form in columns.values()]
        table.add_row(Text(name, no_wrap=True), *cells)
    console.print(table)


def show_comparisons(console: Console, comparisons: Sequence[Mapping[str, Any]], form: str) -> None:
    """Print paired differences; ``*`` marks those that are clear among all comparisons of the result."""
    if not comparisons:
        return
    count = len(comparisons)
    family = f"clear among all {count} comparisons (Holm)" if count > 1 else f"clear (p < {CLEAR})"
    for against in dict.fromkeys(one["against"] for one in comparisons):
        title = f"\nDifference to {against}, paired; * {family}"
        console.print(Text(title, "dim"), soft_wrap=True)
        table = plain_table("", "", "difference", "p", "p, Holm", "")
        for one in comparisons:
            if one["against"] == against:
                cells = estimate(one, form), f"{one['p']:.2g}", f"{one['p_holm']:.2g}", "*" if one["clear"] else ""
                table.add_row(Text(one["model"]), Text(one["metric"]), *cells)
        console.print(table)
