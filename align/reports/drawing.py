"""Drawings for pages and for trackers: SVG that takes its colours from the page, the same bytes for the same numbers,
and PNG of the same figure.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# The colours of the light page, as report.css has them. In the SVG they give way to the page's own, so that one
# drawing serves the light and the dark page; a PNG keeps them.
INK = "#1d1f21"
COLOURS = ("#0a6a86", "#b5501b", "#4d7a1f", "#8545a5", "#c2316f", "#8a6d00")
NAMES = ("first", "second", "third", "fourth", "fifth", "sixth")
PAGE_COLOURS = {INK: "currentColor", **{c: f"var(--{n})" for c, n in zip(COLOURS, NAMES, strict=True)}}
MARKERS = ("o", "s", "^", "D", "v", "P")
FILLS: Any = ("full", "none", "left", "top", "right", "bottom")
DOTS: Any = (0, (1, 1.5))
DASHES: Any = (0, (4, 1.5))
LONGEST = 28  # characters of a name beside a line, or in a legend
MARKS = 6
"""Markers along a line that shares its drawing with others of its kind, about."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Attributes:
        title: its heading.
        svg: the drawing; its text alternative is part of it.
        caption: what is drawn and in which unit.
        figure: what was drawn.
    """

    title: str
    svg: Markup
    caption: str
    figure: Figure = field(repr=False, compare=False)

    def png(self) -> bytes:
        """The same drawing as an image, on white."""
        raw = io.BytesIO()
        with _style(self.title):
            FigureCanvasAgg(self.figure)
            self.figure.patch.set_alpha(1)  # the SVG has the page behind it
            self.figure.savefig(raw, format="png", dpi=160, facecolor="white", metadata={"Software": None})
            self.figure.patch.set_alpha(0)
        return raw.getvalue()


@dataclass(frozen=True)
class Series:
    """Named values; ``x`` is empty in a histogram.

    Attributes:
        name: in the legend, and in the text alternative.
        y, x: the values.
        low, high, left, right: ends of the intervals of y and of x, where there are any.
        colour: number of its colour and its marker; its place among the series where it is not given.
        dashed: second kind of line of a colour; every second line where no colours are given.
        dotted: third kind.
        fill: number of the way in which its markers are filled, where several series have one colour and marker.
        legend: whether it stands there.
    """

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    left: Sequence[float | None] = ()
    right: Sequence[float | None] = ()
    colour: int | None = None
    dashed: bool | None = None
    dotted: bool = False
    fill: int = 0
    legend: bool = True


def curve(title: str, label: str, caption: str, series: Sequence[Series], by: str = "step") -> Picture:
    """Values by step, with a band where they have intervals. The second series is dashed as well as coloured; coloured
    ones have markers of their own, a single place that is not filled a large one.
    """
    with _style(title):
        figure, axes = _axes()
        for place, line in enumerate(series):
            every = max(1, len(line.x) // MARKS)
            marker = MARKERS[line.colour % 6] if line.colour is not None else "o" if len(line.x) < 2 else ""
            offset = 0 if line.colour is None else line.colour * every // 6
            marks = (min(offset, len(line.x) - 1), every)
            style = _line(line, place)
            if len(line.low) and None not in (*line.low, *line.high):
                axes.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)  # type: ignore[arg-type]
            axes.plot(
                *(line.x, line.y),
                label=_legend(line),
                linewidth=1.4,
                marker="" if line.dotted else marker,
                markersize=9 if line.fill else 3.5,
                fillstyle=FILLS[line.fill],
                markevery=marks,
                **style,
            )
        axes.set_xlabel(by)
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if any(min(line.y) < 0 < max(line.y) for line in series):
            axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
        alternative = f"{title} by {by}. " + " ".join(f"{line.name}: {_ends(line, by)}." for line in series)
        return _picture(figure, axes, title, caption, alternative)


def histogram(title: str, label: str, caption: str, series: Sequence[Series], cuts: Sequence[float] = ()) -> Picture:
    """Counts in shared bins, and lines at the cuts. More than two series are drawn as outlines."""
    with _style(title):
        figure, axes = _axes()
        edges = _edges(np.concatenate([np.asarray(s.y, dtype=float) for s in series]), cuts)
        for place, values in enumerate(series):
            counts, _ = np.histogram(values.y, bins=edges)
            style = _line(values, place)
            axes.stairs(counts, edges, label=_legend(values), linewidth=1.4, **style)
            if len(series) <= 2:
                axes.stairs(counts, edges, fill=True, color=style["color"], alpha=0.15)
        for cut in cuts:
            axes.axvline(cut, color=INK, linewidth=1.0, linestyle=(0, (2, 2)))
        axes.set_xlabel(label)
        axes.set_ylabel("count")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        alternative = f"{title}, histogram. " + " ".join(
            f"{s.name}: mean {np.mean(s.y):.4g}, from {min(s.y):.4g} to {max(s.y):.4g}." for s in series if len(s.y)
        )
        if cuts:
            alternative += f" Cut at {' and '.join(f'{cut:.4g}' for cut in cuts)}."
        return _picture(figure, axes, title, caption, alternative)


def bars(title: str, label: str, caption: str, names: Sequence[str], series: Sequence[Series]) -> Picture:
    """Two values a name, one bar under the other; the first name is on top."""
    with _style(title):
        figure, axes = _axes()
        places = np.arange(len(names))
        for place, (shift, values) in enumerate(zip((-0.2, 0.2), series, strict=True)):
            axes.barh(places + shift, values.y, height=0.36, color=_colour(values, place), label=values.name)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        return _picture(figure, axes, title, caption, f"{title}. {_by_name(names, series)}")


def dots(
    title: str, label: str, caption: str, names: Sequence[str], series: Sequence[Series], mark: float | None = None
) -> Picture:
    """Estimates with their intervals, a line a name, the first on top; NaN where a name has none.

    Args:
        title, label, caption: as everywhere.
        names: of the lines.
        series: a value a name each.
        mark: the value that means nothing happened.
    """
    with _style(title):
        figure, axes = _axes(height=max(2.1, 0.9 + 0.24 * len(names) * max(1.0, 0.55 * len(series))))
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7)
        places = np.arange(len(names), dtype=float)
        for place, values in enumerate(series):
            at = places + (place - (len(series) - 1) / 2) * 0.7 / len(series)
            axes.errorbar(
                values.y,
                at,
                xerr=_reach(values.y, values.low, values.high),
                fmt=MARKERS[place if values.colour is None else values.colour],
                markersize=4,
                elinewidth=1.2,
                color=_colour(values, place),
                label=_legend(values) if len(series) > 1 else None,
            )
        axes.set_yticks(places, [_tail(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        return _picture(figure, axes, title, caption, f"{title}. {_by_name(names, series)}")


def points(
    title: str,
    labels: tuple[str, str],
    caption: str,
    series: Sequence[Series],
    *,
    joined: bool = True,
    square: tuple[float, float] | None = None,
) -> Picture:
    """Pairs of numbers with intervals, each series with a marker of its own.

    Args:
        title, caption: as everywhere.
        labels: of x and y.
        series: one a kind.
        joined: by a line, in the order given.
        square: limits of x, where x and y are of one kind; the line x = y is then drawn.
    """
    with _style(title):
        figure, axes = _axes(height=3.6)
        if square is not None:
            axes.plot(square, square, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7)
        for place, line in enumerate(series):
            axes.errorbar(
                line.x,
                line.y,
                yerr=_reach(line.y, line.low, line.high),
                xerr=_reach(line.x, line.left, line.right),
                marker=MARKERS[(place if line.colour is None else line.colour) % 6],
                markersize=4.5,
                fillstyle=FILLS[line.fill % len(FILLS)],
                elinewidth=0.7,
                linewidth=1.2 if joined and len(line.x) > 1 else 0,
                label=_legend(line),
                **_line(line, place),
            )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        alternative = f"{title}. {labels[1]} by {labels[0]}. " + " ".join(
            f"{line.name}: " + ", ".join(f"{y:.4g} at {x:.4g}" for x, y in zip(line.x, line.y, strict=True)) + "."
            for line in series
        )
        return _picture(figure, axes, title, caption, alternative)


def _style(salt: str) -> AbstractContextManager[None]:
    """Our settings, for one drawing; the salt makes its ids the same every time and its own within the page."""
    settings: Any = {**SETTINGS, "svg.hashsalt": salt}
    return matplotlib.rc_context(settings)


def _axes(height: float = 2.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _colour(series: Series, place: int) -> str:
    return COLOURS[(place if series.colour is None else series.colour) % len(COLOURS)]


def _line(series: Series, place: int) -> dict[str, Any]:
    dashed = series.dashed if series.dashed is not None else series.colour is None and place % 2 == 1
    return {"color": _colour(series, place), "linestyle": DOTS if series.dotted else DASHES if dashed else "-"}


def _legend(series: Series) -> str:
    return _tail(series.name) if series.legend else "_nolegend_"


def _tail(name: str) -> str:
    """The end of a long name, which is where names differ; matplotlib cannot draw half of a surrogate pair."""
    name = name.encode("utf-8", "replace").decode("utf-8")
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _reach(
    values: Sequence[float], low: Sequence[float | None], high: Sequence[float | None]
) -> list[list[float]] | None:
    """How far intervals go below and above; nothing where there are none."""
    if not len(low):
        return None
    below = [0.0 if end is None else max(0.0, value - end) for value, end in zip(values, low, strict=True)]
    return [below, [0.0 if end is None else max(0.0, end - value) for value, end in zip(values, high, strict=True)]]


def _picture(figure: Figure, axes: Axes, title: str, caption: str, alternative: str) -> Picture:
    entries = axes.get_legend_handles_labels()[1]
    if entries:
        columns = 2 if len(entries) <= 2 or max(map(len, entries)) > 14 else 3
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0)
    raw = io.StringIO()
    FigureCanvasSVG(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has the font
        figure.savefig(raw, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = raw.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same on every drawing: ids must differ within a page
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)  # the family is the page's
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    _, _, width, height = re.search(r'viewBox="([\d.]+) ([\d.]+) ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    label = Markup.escape(alternative)
    opening = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return Picture(title, Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)), caption, figure)


def _by_name(names: Sequence[str], series: Sequence[Series]) -> str:
    return " ".join(
        f"{name}: "
        + ", ".join(f"{values.name} {value:.3g}" for values, value in zip(series, several, strict=True))
        + "."
        for name, *several in zip(names, *(values.y for values in series), strict=True)
    )


def _ends(line: Series, by: str) -> str:
    points = zip(line.x, line.y, strict=True)
    first, *_, last = points if len(line.x) > 1 else (*points, None)
    return ", ".join(f"{y:.4g} at {by} {x:g}" for x, y in (p for p in (first, last) if p))


def _edges(values: np.ndarray[Any, Any], cuts: Sequence[float] = ()) -> np.ndarray[Any, Any]:
    """At most 24 bins over all values, an edge at the first cut; one bin around values that are all the same."""
    if not len(values) or values.min() == values.max():
        middle = values[0] if len(values) else 0.0
        return np.array([middle - 0.5, middle + 0.5])
    edges = np.histogram_bin_edges(values, bins="auto")
    edges = edges if len(edges) <= 25 else np.linspace(values.min(), values.max(), 25)
    if cuts and values.min() < cuts[0] < values.max():
        width = edges[1] - edges[0]
        first, last = (round((end - cuts[0]) / width + side) for end, side in ((edges[0], -0.5), (edges[-1], 0.5)))
        edges = cuts[0] + width * np.arange(first, last + 1)
    return edges
