"""``align report diff``, and what of ``align report`` is which command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from align.errors import ConfigError

COLOURS = {"worse": "bold red", "better": "green", "same": "", "told": "dim"}
PAGE = "page"


class ReportGroup(TyperGroup):
    """``align report RUN...`` is ``align report page RUN...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words, with the command that they leave out."""
        if args and args[0] not in (*self.commands, "--help"):
            args = [PAGE, *args]
        return super().parse_args(ctx, args)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result of align eval, or eval/*.json of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The same of another model, or of a later day.")],
    level: Annotated[float, typer.Option(help="Coverage of the intervals; 0.99 fails less easily.")] = 0.95,
) -> None:
    """Compare two results. Exit code 1 where B is worse beyond a metric's interval, or lacks one that A has, for CI.

    Intervals are of one metric each: of twenty that did not change, one is outside on average. What has no interval,
    or is neither better nor worse when it changes (length, ties, KL), is told and never fails.
    """
    from rich.table import Table
    from rich.text import Text

    from align.evals.difference import changes, only_in_one, unshared_rows
    from align.suites.shown import estimate, printer

    results = [_read(path) for path in (first, second)]
    try:
        found = changes(*results, level=level)
    except ValueError as error:
        raise ConfigError("align report diff", [(f"{first} {second}", str(error))]) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("align report diff", [(f"{first} {second}", f"no results: {error!r}")]) from None
    console = printer()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("", "A", "B", "B less A", "", ""):
        table.add_column(column, justify="right" if column else "left")
    named: str | None = None
    for change in found:
        if change.model != named:
            named = change.model
            table.add_row(Text(named or "", "bold"))
        direction = {1: "", -1: "less is better", 0: "neither is better", None: "not known what is better"}
        table.add_row(
            Text(change.metric),
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            estimate(change.difference.as_dict(), "+.4g"),
            Text(change.status, COLOURS[change.status]),
            Text(
                ", ".join(filter(None, ("paired" if change.paired else "unpaired", direction[change.direction]))),
                "dim",
            ),
        )
    console.print(table)
    lost, new = only_in_one(*results)
    for style, lines in (
        ("bold red", lost),
        ("dim", new),
        ("yellow", [*unshared_rows(*results), *_settings(*results)]),
    ):
        for line in lines:
            console.print(Text(line), style=style, soft_wrap=True)
    worse = [change for change in found if change.status == "worse"]
    lacks = f"; {len(lost)} that only A has" if lost else ""
    console.print(f"\n{len(worse)} of {len(found)} metrics worse beyond {level:.0%} intervals{lacks}")
    if worse or lost:
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("align report diff", [(str(path), f"cannot be read: {error}")]) from None
    if not isinstance(found, dict) or not {"suite", "schema"} <= found.keys():
        raise ConfigError("align report diff", [(str(path), "is no result of a suite: it has no suite and schema")])
    return found


def _settings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Settings that differ, in words."""
    one, two = (result.get("settings") or {} for result in (first, second))
    different = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
    return [f"settings differ: {key} is {one.get(key)!r} and {two.get(key)!r}" for key in different]
