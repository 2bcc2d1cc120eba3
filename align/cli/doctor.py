"""``align doctor``."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Look at versions, processor, memory, disk and models; say what to do. Exit code 1 if something must be fixed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from align.doctor import examine

    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    console = Console()
    with console.status("looking at the machine"):
        checks = list(examine())
    for check in checks:
        table.add_row(Text(check.status, colours[check.status]), check.name, Text(check.detail))
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(f"\n{len(checks)} checks: {failed} failed, {warned} warnings", highlight=False)
    if failed:
        raise typer.Exit(1)
