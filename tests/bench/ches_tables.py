"""The CHES study's tables and plots, of the pieces that are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from align.evals.displacement import largest_decreases
from align.evals.statistics import bootstrap_interval
from align.losses import SequenceLogps

Piece = dict[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73")
MEASURES = {
    "ches": "CHES",
    "last_inner": "last hidden states, inner product",
    "edit": "edit distance, as likeness",
}


def write_results(cache: Path, output: Path) -> None:
    """The table, and beside it the plots."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(cache.glob("*.json"))}
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = [_no_never(found, output), _windows(found, output), _filtered(found)]
    output.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _of(found: dict[str, Piece], prefix: str) -> list[Piece]:
    return [piece for name, piece in found.items() if name.startswith(prefix)]


def _no_never(found: dict[str, Piece], output: Path) -> str:
    lines = [
        "| trained | prompts | P(Yes) | P(No) | P(Never) | Yes rose | No fell | largest fall of P(No) | most gained |",
        "| --- " * 9 + "|",
    ]
    curves = {}
    for key, name in (("lora", "LoRA"), ("whole", "all weights")):
        pieces = _of(found, f"no_never-{key}-")
        if not pieces:
            continue
        tracked = {word: np.array([piece["tracked"][word] for piece in pieces]) for word in ("Yes", "No", "Never")}
        curves[name] = tracked
        steps = [torch.tensor(step).log() for step in tracked["No"].T]
        one = torch.ones(len(pieces), dtype=torch.long)
        fall = largest_decreases([SequenceLogps(step, one) for step in steps])
        gained = Counter(token for piece in pieces for token, *_ in piece["gained"])
        moves = [_move(values[:, 0], values[:, -1]) for values in tracked.values()]
        rose = int((tracked["Yes"][:, -1] > tracked["Yes"][:, 0]).sum())
        fell = int((tracked["No"][:, -1] < tracked["No"][:, 0]).sum())
        tokens = ", ".join(f"{token} ({count})" for token, count in gained.most_common(4))
        counts = f"{rose} of {len(pieces)} | {fell} of {len(pieces)}"
        lines.append(f"| {name} | {len(pieces)} | {' | '.join(moves)} | {counts} | {fall.mean():.4f} | {tokens} |")
    if not curves:
        return ""
    _plot_no_never(curves, output.with_name("ches_no_never.svg"))
    return "### No over Never\n\n" + "\n".join(lines)


def _windows(found: dict[str, Piece], output: Path) -> str:
    head = "| set | measure | lowest | 25 % | middle | 75 % | highest | rank correlation, by run | of the means |"
    lines = [head, "| --- " * 9 + "|"]
    drawn = {}
    for name in ("quickstart", "hh_harmless", "personas"):
        for measure, words in MEASURES.items():
            pieces = _of(found, f"windows-{name}-{measure}-")
            if not pieces:
                continue
            changes = np.array([[window["chosen"] for window in piece["windows"]] for piece in pieces])
            means = " | ".join(_runs(column) for column in changes.T)
            each = ", ".join(f"{_rank(row):+.1f}" for row in changes)
            lines.append(f"| {name} | {words} | {means} | {each} | {_rank(changes.mean(axis=0)):+.1f} |")
            drawn[name, measure] = changes
    if not drawn:
        return ""
    _plot_windows(drawn, output.with_name("ches_windows.svg"))
    return (
        "### Change of the chosen answers' log-prob, nats an answer, by window of the measure\n\n"
        + "\n".join(lines)
        + "\n\n"
        + _window_facts(found)
    )


def _window_facts(found: dict[str, Piece]) -> str:
    """Share of chosen answers that fell, per-token change and length, of the CHES windows."""
    lines = ["| set, CHES | | lowest | 25 % | middle | 75 % | highest |", "| --- " * 7 + "|"]
    for name in ("quickstart", "hh_harmless", "personas"):
        pieces = _of(found, f"windows-{name}-ches-")
        for key, words in (
            ("chosen_per_token", "nats a token"),
            ("fell", "share that fell"),
            ("rejected", "rejected, nats an answer"),
            ("tokens", "tokens of the chosen answer"),
        ):
            if pieces:
                values = np.mean([[window[key] for window in piece["windows"]] for piece in pieces], axis=0)
                lines.append(f"| {name} | {words} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return "\n".join(lines)


def _filtered(found: dict[str, Piece]) -> str:
    lines = [
        "| trained on | runs | chosen, trained pairs | chosen, held out | fell, held out | ranked right, held out |",
        "| --- " * 6 + "|",
    ]
    for how, words in (("lowest", "lowest length-normalised CHES"), ("random", "random pairs")):
        pieces = _of(found, f"filter-quickstart-{how}-")
        if pieces:
            cells = [
                _runs([piece[part][key] for piece in pieces])
                for part, key in (
                    ("train", "chosen_per_token"),
                    ("held_out", "chosen_per_token"),
                    ("held_out", "fell"),
                    ("held_out", "accuracy"),
                )
            ]
            lines.append(f"| {words} | {len(pieces)} | {' | '.join(cells)} |")
    return "### Filtered and random data (nats a token)\n\n" + "\n".join(lines) if len(lines) > 2 else ""


def _rank(changes: np.ndarray) -> float:
    """Spearman's correlation of the window's place and the change; -1: the higher, the further it fell."""
    return float(spearmanr(range(len(changes)), changes).statistic)


def _move(before: np.ndarray, after: np.ndarray) -> str:
    """Means before and after, and their difference with its interval over prompts."""
    change = bootstrap_interval(after - before)
    interval = "" if change.low is None else f" ({change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])"
    return f"{before.mean():.3f} → {after.mean():.3f}{interval}"


def _runs(values: Sequence[float] | np.ndarray) -> str:
    """Mean over runs, with the lowest and the highest: of three runs there is no more to say."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _plot_no_never(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    def draw(axes: Any, title: str) -> None:
        for (word, values), colour in zip(curves[title].items(), COLOURS, strict=True):
            mean = values.mean(axis=0)
            axes.plot(mean, label=word, color=colour)
            axes.fill_between(range(len(mean)), *np.quantile(values, [0, 1], axis=0), color=colour, alpha=0.12, lw=0)
        axes.set_xlabel("step")
        axes.set_ylabel("probability")

    _draw(list(curves), draw, path)


def _plot_windows(drawn: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    sets = list(dict.fromkeys(name for name, _ in drawn))

    def draw(axes: Any, title: str) -> None:
        for measure, colour in zip(MEASURES, COLOURS, strict=True):
            changes = drawn.get((title, measure))
            if changes is not None:
                axes.plot([0, 25, 50, 75, 100], changes.mean(axis=0), "o-", color=colour, label=MEASURES[measure])
                for row in changes:
                    axes.plot([0, 25, 50, 75, 100], row, color=colour, alpha=0.3, lw=0.7)
        axes.axhline(0, color="#888", lw=0.6)
        axes.set_xlabel("percentile of the measure")
        axes.set_ylabel("chosen, nats an answer")

    _draw(sets, draw, path)


def _draw(titles: Sequence[str], draw: Any, path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 8}):
        figure = Figure(figsize=(3.1 * len(titles), 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
            draw(axes, title)
            axes.set_title(title, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=7)
        figure.savefig(path, metadata={"Date": None})
