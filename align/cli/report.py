"""``align report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")]) -> None:
    """Write each run's report.html again, from what its folder holds."""
    from align.reports.report import render_report

    for run in runs:
        print(render_report(run))
