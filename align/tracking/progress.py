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
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far ``total`` rows of ``what`` are, on standard error; yields a function of rows done since.

    Args:
        done: rows that an earlier run has done; they do not count for the speed.
    """
    if sys.stderr.isatty():
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda rows: bar.advance(task, rows)
        return
    began = said = time.monotonic()
    before = done

    def advance(rows: int) -> None:
        nonlocal done, said
        done += rows
        now = time.monotonic()
        if done == total or now - said > LINE_EVERY:
            said = now
            left = (now - began) / (done - before) * (total - done) if done > before else 0.0
            when = f" · {int(left // 60)}:{int(left % 60):02} left" if done < total else ""
            print(f"{what}: {done:,}/{total:,}{when}", file=sys.stderr, flush=True)

    yield advance
