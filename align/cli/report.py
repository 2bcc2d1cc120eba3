"""``align report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.errors import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="A result of align eval, to show too; can be given again."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page of several runs.", show_default="compare.html"),
    ] = None,
) -> None:
    """Write a run's report.html again, or one page that compares several runs.

    align report runs/a runs/b --eval frontier.json
    """
    if len(runs) > 1:
        from align.reports.compare import render_comparison

        print(render_comparison(runs, results or [], output or Path("compare.html")))
        return
    if output is not None:
        raise ConfigError("align report", [("--output", "is of several runs; one run's page is its report.html")])
    from align.reports.report import render_report

    print(render_report(runs[0], results or []))
