"""Curves and histograms as inline SVG that takes its colours from the page: the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .record import RunRecord

# Stand-ins that are replaced in the SVG text, so that one drawing serves the light and the dark page.
INK, FIRST, SECOND = "#010203", "#010204", "#010205"
PAGE_COLOURS = {INK: "currentColor", FIRST: "var(--first)", SECOND: "var(--second)"}
STYLES: tuple[dict[str, Any], ...] = (
    {"color": FIRST, "linestyle": "-"},
    {"color": SECOND, "linestyle": (0, (4, 1.5))},
)
LONGEST_NAME = 24  # characters of a bar's name
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
    """

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Series:
    """Named values; ``x`` is empty in a histogram."""

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()


CURVES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Loss",
        "",
        "What training minimises, as the recipe defines it.",
        (("training", "loss"), ("held-out", "eval_loss")),
    ),
    (
        "Accuracy",
        "",
        "Share of pairs whose chosen answer has the higher reward; 0.5 is chance.",
        (("training", "rewards/accuracies"), ("held-out", "eval_rewards/accuracies")),
    ),
    (
        "Accuracy",
        "",
        "Share of answers on their thumb's side of the reward's threshold (bco: the shift; kto: 0); 0.5 is chance.",
        (("training", "thumbs/accuracy"), ("held-out", "eval_thumbs/accuracy")),
    ),
    (
        "Reward shift",
        "",
        "BCO's delta: the point between the rewards of thumbs up and those of thumbs down.",
        (("shift", "bco/shift"),),
    ),
    ("Reward", "", "Mean over the answers that the model drew in training.", (("training", "reward"),)),
    (
        "Good answers",
        "",
        "Share of the answers drawn in training that reach the references of all rewards.",
        (("training", "good/all"),),
    ),
    (
        "Win rate",
        "",
        "Online training: held-out answers preferred to those before training, by the annotator; 0.5 is no change.",
        (("held-out", "eval_win_rate"),),
    ),
    (
        "KL",
        "nats per answer",
        "Online training: log-ratio to the reference of the answers that were learnt from, and of the policy's own to "
        "held-out prompts, where its mean is the KL.",
        (("training", "kl/k1"), ("held-out", "eval_kl")),
    ),
    (
        "Answer length",
        "tokens",
        "Online training: answers that were learnt from, and the policy's own to held-out prompts.",
        (("training", "length/tokens"), ("held-out", "eval_length")),
    ),
    (
        "Entropy",
        "nats per token",
        "Of the policy, at the tokens of these answers.",
        (("training", "entropy"), ("held-out", "eval_entropy")),
    ),
    (
        "KL",
        "nats",
        "grpo: to the model before training, a token. kto: its reference point, the mean log-ratio of other answers.",
        (("training", "kl"),),
    ),
    (
        "Margin",
        "",
        "Reward of chosen answers (thumbs up) less that of rejected ones (thumbs down).",
        (("training", "rewards/margins"), ("held-out", "eval_rewards/margins")),
    ),
    (
        "Log-prob change",
        "nats per answer",
        "Change from the reference, training data. Chosen below 0: the preferred answers became less likely too.",
        (("chosen", "displacement/chosen_delta"), ("rejected", "displacement/rejected_delta")),
    ),
    (
        "Log-prob change, per token",
        "nats per token",
        "Change from the reference, training data, the mean over answers of each answer's own mean.",
        (
            ("chosen", "displacement/chosen_delta_per_token"),
            ("rejected", "displacement/rejected_delta_per_token"),
        ),
    ),
    (
        "Chosen answers that fell",
        "",
        "Share of the chosen answers that are less likely than under the reference.",
        (("training", "displacement/frac_chosen_down"), ("held-out", "eval_displacement/frac_chosen_down")),
    ),
    (
        "Largest fall",
        "nats",
        "Of a chosen answer, from the reference, among those of a log's batches; 0 where none fell.",
        (("training", "displacement/largest_fall"), ("held-out", "eval_displacement/largest_fall")),
    ),
    (
        "Token accuracy",
        "",
        "Share of answer tokens that were the likeliest.",
        (("training", "mean_token_accuracy"), ("held-out", "eval_mean_token_accuracy")),
    ),
    ("Gradient norm", "", "Before clipping.", (("training", "grad_norm"),)),
)


def training_pictures(record: RunRecord) -> list[Picture]:
    """Curves of what was logged; a curve without a single value is left out."""
    pictures = []
    for title, label, caption, names in CURVES:
        series = [s for name, key in names if (s := _logged(record.metrics, name, key)) is not None]
        if title == "Token accuracy" and any("rewards/accuracies" in row for row in record.metrics):
            continue  # says nothing about pairs
        if series:
            pictures.append(curve(title, label, caption, series))
    return pictures


def evaluation_pictures(record: RunRecord) -> list[Picture]:
    """Histograms over the rows of the evaluations."""
    thumbs, preference, displacement, generation = (
        record.evals.get(suite, {}).get("rows", []) for suite in ("thumbs", "preference", "displacement", "generation")
    )
    reward = [row for row in record.evals.get("reward", {}).get("rows", []) if "chosen_reward" in row]
    wanted = (
        ("Rewards of held-out pairs", "implicit reward", "pairs", preference, "chosen_reward", "rejected_reward"),
        ("Rewards of held-out answers", "reward", "pairs", reward, "chosen_reward", "rejected_reward"),
        ("Log-prob change, held-out", "nats per answer", "pairs", displacement, "chosen_delta", "rejected_delta"),
    )
    pictures = [
        histogram(title, label, f"{len(rows):,} {what}.", [_column(rows, "chosen", a), _column(rows, "rejected", b)])
        for title, label, what, rows, a, b in wanted
        if rows
    ]
    if gained := record.evals.get("displacement", {}).get("gained"):
        pictures.append(_gained_tokens(gained))
    if thumbs:
        sides = [
            Series(name, _finite([row["reward"] for row in thumbs if row["up"] is up]))
            for name, up in (("thumbs up", True), ("thumbs down", False))
        ]
        pictures.append(
            histogram("Rewards of held-out answers", "implicit reward", f"{len(thumbs):,} answers.", sides)
        )
    for title, label, key in (("Scores of the answers", "score", "reward"), ("Answer length", "tokens", "tokens")):
        if generation:
            sides = [Series(side, _finite([row[side][key] for row in generation])) for side in ("before", "after")]
            pictures.append(histogram(title, label, f"{len(generation):,} held-out prompts.", sides))
    return pictures


def curve(title: str, label: str, caption: str, series: Sequence[Series]) -> Picture:
    """Values by step. The second series is dashed as well as coloured."""
    with _style(title):
        figure, axes = _axes()
        for line, style in zip(series, STYLES, strict=False):
            marker = "o" if len(line.x) < 2 else ""
            axes.plot(line.x, line.y, label=line.name, linewidth=1.4, marker=marker, markersize=3, **style)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if any(min(line.y) < 0 < max(line.y) for line in series):
            axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
        alternative = f"{title} by step. " + " ".join(f"{line.name}: {_ends(line)}." for line in series)
        return Picture(title, _svg(figure, axes, series, alternative), caption)


def histogram(title: str, label: str, caption: str, series: Sequence[Series], cuts: Sequence[float] = ()) -> Picture:
    """Counts in shared bins, and lines at the cuts."""
    with _style(title):
        figure, axes = _axes()
        edges = _edges(np.concatenate([np.asarray(s.y, dtype=float) for s in series]), cuts)
        for values, style in zip(series, STYLES, strict=False):
            counts, _ = np.histogram(values.y, bins=edges)
            axes.stairs(counts, edges, label=values.name, linewidth=1.4, **style)
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
        return Picture(title, _svg(figure, axes, series, alternative), caption)


def bars(title: str, label: str, caption: str, names: Sequence[str], series: Sequence[Series]) -> Picture:
    """Two values a name, one bar under the other; the first name is on top."""
    with _style(title):
        figure, axes = _axes()
        places = np.arange(len(names))
        for shift, values, style in zip((-0.2, 0.2), series, STYLES, strict=True):
            axes.barh(places + shift, values.y, height=0.36, color=style["color"], label=values.name)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        alternative = f"{title}. " + " ".join(
            f"{name}: "
            + ", ".join(f"{values.name} {value:.3g}" for values, value in zip(series, pair, strict=True))
            + "."
            for name, *pair in zip(names, *(values.y for values in series), strict=True)
        )
        return Picture(title, _svg(figure, axes, series, alternative), caption)


def _gained_tokens(gained: Sequence[Mapping[str, Any]]) -> Picture:
    return bars(
        "Tokens that gained, held-out",
        "probability as an answer's first token",
        "Where probability went: the tokens that gained most at the beginning of an answer, mean over prompts.",
        [repr(token["token"])[:LONGEST_NAME] for token in gained],  # some vocabularies have whole lines as one token
        [Series(side, [token[side] for token in gained]) for side in ("before", "after")],
    )


def _style(salt: str) -> AbstractContextManager[None]:
    """Our settings, for one drawing; the salt makes its ids the same every time and its own within the page."""
    settings: Any = {**SETTINGS, "svg.hashsalt": salt}
    return matplotlib.rc_context(settings)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 2.7), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, axes: Axes, series: Sequence[Series], alternative: str) -> Markup:
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    raw = io.StringIO()
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
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1))


def _ends(line: Series) -> str:
    points = zip(line.x, line.y, strict=True)
    first, *_, last = points if len(line.x) > 1 else (*points, None)
    return ", ".join(f"{y:.4g} at step {x:g}" for x, y in (p for p in (first, last) if p))


def _logged(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Series | None:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return Series(name, [y for _, y in points], [x for x, _ in points]) if points else None


def _column(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> Series:
    return Series(name, _finite([row[key] for row in rows]))


def _finite(values: Sequence[float | None]) -> list[float]:
    return [float(v) for v in values if v is not None and np.isfinite(v)]


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
