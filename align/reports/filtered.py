"""The page of ``align filter``: what a filter keeps of a data set, and what it drops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from align.tracking.files import write_text

from .drawing import Picture
from .record import FaultGroup
from .report import asset, html_environment


@dataclass(frozen=True)
class Example:
    """A row of the data.

    Attributes:
        place: ``number 1 of 657``.
        score: in words.
        kept: whether it stays.
        flags: what else to know of it.
        prompt: its text.
        answers: by name.
    """

    place: str
    score: str
    kept: bool
    flags: Sequence[str]
    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Ends:
    """Rows from both ends of a column, the outermost first."""

    column: str
    lowest: Sequence[Example]
    highest: Sequence[Example]


@dataclass(frozen=True)
class Composition:
    """Before and after: one line a part, ``(part, before, after)``."""

    caption: str
    lines: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class FilterPage:
    """What the page says.

    Attributes:
        title: its heading.
        what: facts under it.
        pictures: histograms.
        compositions: tables of before and after.
        ends: examples, by column.
        faults: rows that could not be judged.
    """

    title: str
    what: Sequence[tuple[str, str]]
    pictures: Sequence[Picture]
    compositions: Sequence[Composition]
    ends: Sequence[Ends]
    faults: Sequence[FaultGroup] = field(default_factory=list)


def write_filter_page(path: Path, page: FilterPage) -> None:
    """Write the page, which needs nothing but itself."""
    text = html_environment().get_template("filtered.html.j2").render(page=page, css=Markup(asset("report.css")))
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
