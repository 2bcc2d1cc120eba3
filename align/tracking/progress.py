"""A bar for work that is counted in rows; lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far ``total`` rows of ``what`` are, on standard error; yields a function of rows done since."""
    if sys.stderr.isatty():
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda rows: bar.advance(task, rows)
        return
    done, said = 0, time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, said
        done += rows
        if done == total or time.monotonic() - said > LINE_EVERY:
            said = time.monotonic()
            print(f"{what}: {done:,}/{total:,}", file=sys.stderr, flush=True)

    yield advance
